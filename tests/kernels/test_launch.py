"""How kernels are launched: how many times, with which configurations, and without waiting for the device."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl_fast import AttendAndExcite, AttentionRegulation, EnergyContext, by_downsampling, control, ops, use
from attnctl_fast.attach.attention import Attention
from attnctl_fast.attach.call import Call
from attnctl_fast.attach.rows import Rows
from attnctl_fast.methods import energy_context
from bench.ops.base import upstream
from bench.ops.inputs import Case
from bench.ops.registry import ATTENTION
from bench.ops.regulation import statistics_of
from tests.support import tiny
from tests.support.kernel_cases import OPERATIONS, check, gradients, run_triton
from tests.support.marks import full
from tests.support.numerics import DEVICE

pytest.importorskip("triton")
_launch = importlib.import_module("attnctl_fast.kernels._launch")
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

ROOT = Path(__file__).resolve().parents[2]
TABLE = _launch.read_table("default")
# What each setting may shrink or grow to; a kernel must give the same result at both ends.
SMALLEST = {"CUTS": 4, "num_warps": 1, "num_stages": 1, "maxnreg": 255}
LARGEST = {"CUTS": 8, "num_warps": 8, "num_stages": 3}


# Operations of PyTorch that launch nothing.
VIEWS = {
    *("aten::detach", "aten::expand", "aten::slice", "aten::select", "aten::view", "aten::_unsafe_view"),
    *("aten::alias", "aten::promote_types"),
}


class Ran(TorchDispatchMode):
    """The names of the operations that ran."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def kernel_modules():
    package = importlib.import_module("attnctl_fast.kernels")
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


@pytest.fixture
def launches(monkeypatch):
    """The names of kernels as they are launched."""
    names = []
    original = _launch.launch

    def launch(kernel, *arguments, **constants):
        names.append(kernel.fn.__name__)
        return original(kernel, *arguments, **constants)

    for module in kernel_modules():
        if getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", launch)
    return names


def regulated_layer(case, t):
    stats = ops.target_statistics(t["q"], t["k"], t["v"], **case.edit, impl="triton")
    found = ops.regulate(stats, theta=t["theta"], **case.basis, steps=3, impl="triton")
    return ops.merge_targets(stats, t["v"], bias=found.bias, **case.edit, impl="triton")


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_runs_kernels(name, launches):
    case = Case(16, 9, 8, ids=((3, 5),), pinned=((0,),))
    with torch.no_grad():
        outputs = run_triton(name, case)
    forward = len(launches)
    assert forward >= 1
    leaves = OPERATIONS[name].leaves[-1:]
    if not leaves:
        return
    found = gradients(case, case.tensors(), upstream(outputs), leaves, lambda c, t: run_triton(name, c, t))
    assert found and len(launches) > 2 * forward, "the backward pass launches kernels too"


def test_a_regulated_layer_is_at_most_four_launches_more_than_a_plain_one(launches):
    case = Case(64, 20, 16)
    t = case.tensors()
    run_triton("attention", case, t)
    assert len(launches) == 1
    launches.clear()
    regulated_layer(case, t)
    assert len(launches) <= 1 + 4
    launches.clear()
    run_triton("biased_attention", case, t)
    run_triton("regulated_attention", case, t)
    assert len(launches) == 2, "an edit with a given bias or theta is one launch"


def test_attention_regulation_adds_no_kernels_of_its_own(launches):
    """The method's average, strength and decay are part of the choosing kernel."""
    case = Case(64, 20, 16)
    t = case.tensors()
    prompts = SimpleNamespace(positions=lambda _: [[3, 5]], special=lambda: [[0, 9]], count=1)
    call = Call(None, prompts, 1, None, step=0, steps=10)
    site = SimpleNamespace(name="layer", grid=(8, 8), frames=(), heads=t["q"].shape[1])
    run = AttentionRegulation([3, 5], steps=2).start(call, [site])
    q, k, v = (t[name][:1] for name in "qkv")
    rows = Rows(1, [0], [0])
    for call.step in range(2):
        run.before_denoiser(SimpleNamespace(rows=rows, sample=q))
        launches.clear()
        with use("triton"), Ran() as ran:
            run.edit(site, Attention(q, k, v, None, 0.25, rows, module=None))
        assert len(launches) <= 1 + 4
        assert {name for name in ran.names if not name.startswith("attnctl_fast::")} <= VIEWS


def test_an_updated_layer_is_three_kernels_and_a_product(launches, monkeypatch):
    """In half precision: both softmaxes, the parts of the columns, the step before the projection; then the product
    with the key projection and the sum with the context."""
    pipe = tiny.pipeline().to(DEVICE, torch.float16)
    pipe.scheduler.set_timesteps(4)
    attend, seen = energy_context._Moving.attend, []

    def counted(self, site, attention):
        launches.clear()
        with Ran() as ran:
            attend(self, site, attention)
        if site.updates:
            seen.append((len(launches), [name for name in ran.names if name not in VIEWS]))

    monkeypatch.setattr(energy_context._Moving, "attend", counted)
    with use("triton"), control(pipe, EnergyContext(0.02, 0.02)) as handle, torch.no_grad():
        embeddings, negative = pipe.encode_prompt("a bag", DEVICE, 1, True)
        handle.begin(prompt="a bag", prompt_embeds=embeddings, negative_prompt_embeds=negative)
        latents = tiny.latents(2).to(DEVICE, torch.float16)
        pipe.unet(latents, pipe.scheduler.timesteps[0], encoder_hidden_states=torch.cat([negative, embeddings]))
    # The last layer is left alone: nobody reads what it would move.
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    assert len(seen) == len(layers) - 1
    for kernels, names in seen:
        assert kernels <= 3
        ours = [name for name in names if name.startswith("attnctl_fast::")]
        assert len(ours) == 2 and len(names) <= 4, names


@pytest.mark.parametrize("method", ["regulation", "context", "guidance"])
def test_upcast_attention_sends_no_float32_to_kernels(method):
    """As in SD 2.1, whose logits plain PyTorch has to make in float32."""
    pipe = tiny.pipeline().to(DEVICE, torch.float16)
    layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    for attn in layers:
        attn.upcast_attention = True
    methods = {
        "regulation": AttentionRegulation(["bag"], layers=["mid_block"]),
        "context": EnergyContext(0.02, 0.02),
        "guidance": AttendAndExcite(["bag"], layers=by_downsampling(2), thresholds={}),
    }
    latents = tiny.latents(1).to(DEVICE, torch.float16)
    with use("triton"), torch.no_grad(), _launch.recording() as record, control(pipe, methods[method]):
        pipe("a bag", num_inference_steps=2, latents=latents, output_type="latent")
    readers = {f"_{name}_fwd_kernel" for name in ("attention", "attention_maps", "context_gradient")}
    queries = [launch.arguments[0] for launch in record if launch.kernel.fn.__name__ in readers]
    assert queries and {x.dtype for x in queries} == {torch.float16}


def test_a_grid_larger_than_a_gpu_takes_is_an_error():
    def attention(batch):
        q = torch.zeros(batch, 1, 1, 8, device=DEVICE)
        ops.attention(q, q, q, impl="triton")

    with _launch.recording() as record:
        attention(65535)
        with pytest.raises(
            ValueError, match=r"_attention_fwd_kernel .*\(1, 65536\).* at most .* 65535 .*split the batch"
        ):
            attention(65536)
    assert [launch.grid for launch in record] == [(1, 65535)]


def test_a_grid_that_triton_would_not_count_is_an_error():
    """Its launchers multiply the axes in 32 bits, and launch nothing where the sign bit is set."""
    with _launch.recording() as record:
        _launch.launch(_launch.launch, (2**15, 2**15), DEVICE, {})
        with pytest.raises(ValueError, match=r"grid of \(65535, 65535\) programs, .* at most 2147483647 in all"):
            _launch.launch(_launch.launch, (65535, 65535), DEVICE, {})
    assert len(record) == 1


def test_a_head_that_32_bits_do_not_span_is_an_error():
    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            return lambda x, **_: grid

    def launch(rows, stride, width=8):
        x = torch.empty_strided((1, 1, rows, width), (8, 8, stride, 1), device="meta")
        return _launch._launch_by_triton(Kernel(), (1,), (x,), {}, {"num_warps": 1})

    launch(1 << 17, 1 << 13)
    launch(2, 1 << 32)  # a stride that is a 64-bit number makes 64-bit offsets
    launch(1 << 17, 1 << 16, 1 << 16)  # maps
    with pytest.raises(ValueError, match=r"\(1, 1, 262145, 8\) with 8192 elements from row to row: .* 2147483648 el"):
        launch((1 << 18) + 1, 1 << 13)


def test_recording_runs_nothing():
    case = Case(16, 9, 8, ids=((3, 5),), pinned=((0,),))
    t = case.tensors()
    with _launch.recording() as record:
        for name in OPERATIONS:
            run_triton(name, case, t)
    assert {launch.kernel.fn.__name__ for launch in record} and all(launch.config for launch in record)
    for launch in record:
        assert not set(launch.constants) & set(launch.config)


def test_every_kernel_is_launched_as_triton_would():
    """In a process of its own, for here kernels are interpreted; nothing is compiled or run."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.support.launched_alike"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {name.strip("_").removesuffix("_kernel") for name in done.stdout.split()}
    assert kernels == set(TABLE) - {"attention_bwd_special"}, "all but the form of another"


def test_a_device_is_made_current_only_where_another_one_is(monkeypatch):
    made, launched = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(_launch, "_launch_here", lambda kernel, grid, device, *rest: launched.append(device))
    for index in (0, 1):
        _launch.launch(None, (1,), torch.device("cuda", index), {})
    assert made == [torch.device("cuda", 0)] and launched == [0, 1]


def settings(rule):
    """The names that every rule of an operation sets; only some say what a thread or AMD may take."""
    return frozenset(rule["use"]) - {"maxnreg", "amd_warps"}


@pytest.mark.parametrize("operation", TABLE)
def test_every_operation_ends_with_a_rule_for_all_sizes(operation):
    rules = TABLE[operation]
    assert "when" not in rules[-1] and all(rule.get("when") for rule in rules[:-1])
    assert len({settings(rule) for rule in rules}) == 1, "rules of one operation set the same things"
    for rule in rules:
        assert set(rule) <= {"when", "use"}
        assert {"num_warps", "num_stages"} <= set(rule["use"])
        assert rule["use"].get("maxnreg", 0) * 32 * rule["use"]["num_warps"] <= 65536, "the registers of one block"
        assert all(isinstance(value, int) for value in (*rule["use"].values(), *rule.get("when", {}).values()))


def test_every_table_names_operations_of_the_default_one():
    for path in _launch.CONFIGS.glob("*.json"):
        rules = json.loads(path.read_text())["rules"]
        assert set(rules) <= set(TABLE), path
        for operation, found in rules.items():
            assert {settings(rule) for rule in found} == {settings(rule) for rule in TABLE[operation]}, path


def test_each_compiler_is_given_what_it_knows():
    use = {"BLOCK": 16, "num_warps": 8, "maxnreg": 255}
    assert _launch.compiled_with(use, amd=False) == use
    assert _launch.compiled_with(use, amd=True) == {"BLOCK": 16, "num_warps": 8}
    use["amd_warps"] = 4
    assert _launch.compiled_with(use, amd=False) == {"BLOCK": 16, "num_warps": 8, "maxnreg": 255}
    assert _launch.compiled_with(use, amd=True) == {"BLOCK": 16, "num_warps": 4}


def test_the_first_rule_whose_bounds_hold_applies():
    rules = [
        {"when": {"d": 64, "itemsize": 2}, "use": {"A": 1}},
        {"when": {"d": 64}, "use": {"A": 2}},
        {"use": {"A": 3}},
    ]
    sizes = [{"d": d, "itemsize": itemsize} for d, itemsize in ((64, 2), (64, 4), (65, 2))]
    assert [_launch.choose({"op": rules}, "op", size)["A"] for size in sizes] == [1, 2, 3]
    with pytest.raises(KeyError):
        _launch.choose({"op": rules}, "other", {})


def test_forced_tables_nest_and_end():
    one, two = ([{"use": {"A": i}}] for i in (1, 2))
    with _launch.forced({"op": one}):
        assert _launch.config("op", DEVICE) == {"A": 1}
        with contextlib.suppress(RuntimeError), _launch.forced({"op": two}):
            assert _launch.config("op", DEVICE) == {"A": 2}
            raise RuntimeError
        assert _launch.config("op", DEVICE) == {"A": 1}
        assert _launch.config("attention_fwd", DEVICE, d=40, itemsize=2, n=77)["num_warps"] >= 1
    with pytest.raises(KeyError):
        _launch.config("op", DEVICE)


PIECES = {1: (16, 0), 8: (16, 0), 40: (32, 16), 64: (64, 0), 77: (64, 16), 80: (64, 16), 160: (128, 32), 250: (256, 0)}


@pytest.mark.parametrize("size", PIECES)
def test_pieces_cover_a_size_with_little_waste(size):
    assert _launch.pieces(size) == PIECES[size]
    assert sum(_launch.pieces(size)) >= size


def test_gpu_names_are_file_names():
    assert _launch.device_slug("NVIDIA H200") == "nvidia-h200"
    assert _launch.device_slug("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"


def shipped(use):
    return use


def shrunk(use):
    return {name: SMALLEST.get(name, 16 if name.startswith("BLOCK") else 1) for name in use}


def grown(use):
    return {name: LARGEST.get(name, 2 * value if name.startswith("BLOCK") else value) for name, value in use.items()}


@pytest.mark.parametrize(
    ("name", "change"),
    # The maps of the others lie within one of their shipped blocks, as within a larger one.
    [
        full(name, change) if change is shipped and name not in ATTENTION else (name, change)
        for name, change in itertools.product(OPERATIONS, (shipped, shrunk, grown))
    ],
)
def test_results_do_not_depend_on_the_configuration(name, change):
    """As shipped (the interpreter has blocks of its own), as on a small GPU, where blocks must be small, and on a large
    one."""
    table = {operation: [{"use": change(rules[-1]["use"])}] for operation, rules in TABLE.items()}
    with _launch.forced(table):
        case = Case(63, 77, 40, heads=1, dtype=torch.float16)
        check(name, case if name in ATTENTION else replace(case, dtype=torch.float32))
        if name == "biased_attention":
            check(name, Case(64, 133, 24, heads=1))


@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)])
def test_both_kernels_for_columns_split_the_rows_alike(blocks):
    kernels = ("attention_bwd_columns", "attention_bwd_special")
    table = {k: [{"use": {**TABLE[k][-1]["use"], "BLOCK_M": rows}}] for k, rows in zip(kernels, blocks, strict=True)}
    with _launch.forced(table):
        check("biased_attention", Case(63, 20, 16, heads=1))


@pytest.mark.parametrize("change", [shrunk, grown])
@pytest.mark.parametrize("objective", ["official", "paper"])
def test_the_solver_does_not_depend_on_the_configuration(objective, change):
    case = Case(64, sharp=2.0, ids=((3, 4, 5, 6, 7),))
    t = case.tensors()
    how = {"theta": t["theta"], **case.basis, "steps": 3, "step_size": 0.1, "objective": objective}
    expected = ops.regulate(statistics_of(t), impl="reference", **how)
    table = {operation: [{"use": change(rules[-1]["use"])}] for operation, rules in TABLE.items()}
    with _launch.forced(table):
        found = ops.regulate(statistics_of(t), impl="triton", **how)
    for key in ("losses", "theta", "bias"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key), atol=1e-4, rtol=1e-4)


@on_gpu
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_waits_for_the_device(name, backward):
    case = Case(64, 77, 40, dtype=torch.float16 if name in ATTENTION else torch.float32)
    t = case.tensors()
    grads = upstream(run_triton(name, case, t))
    leaves = OPERATIONS[name].leaves if backward else ()

    def run():
        if leaves:
            return gradients(case, t, grads, leaves, lambda c, x: run_triton(name, c, x))
        return run_triton(name, case, t)

    run()  # compiles
    with _without_waiting():
        run()


@contextlib.contextmanager
def _without_waiting():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
@pytest.mark.parametrize("m", [256, 1024])
def test_a_regulated_layer_never_waits_and_is_captured_in_a_graph(m):
    case = Case(m, 77, 40, heads=8, dtype=torch.float16)
    t = case.tensors()
    with torch.cuda.stream(torch.cuda.Stream()):
        regulated_layer(case, t)  # compiles
        with _without_waiting():
            regulated_layer(case, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = regulated_layer(case, t)
    t["q"].neg_()
    graph.replay()
    torch.testing.assert_close(out, regulated_layer(case, t))


@on_gpu
def test_maps_from_a_logsumexp_are_captured_in_a_graph():
    case = Case(256, 400, 64, heads=8, dtype=torch.float16, ids=((3, 5, 300),))
    t = case.tensors()
    leaves = OPERATIONS["maps_from_lse"].leaves

    def run():
        outputs = run_triton("maps_from_lse", case, t)
        found = gradients(case, t, outputs, leaves, lambda c, x: run_triton("maps_from_lse", c, x))
        return {**outputs, **{f"gradient of {name}": x for name, x in found.items()}}

    with torch.cuda.stream(torch.cuda.Stream()):
        run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    t["q"].neg_()
    graph.replay()
    for name, x in run().items():
        torch.testing.assert_close(captured[name], x)
