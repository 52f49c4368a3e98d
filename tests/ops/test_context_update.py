"""attention_with_context_gradient, context_update, context_energy and composed_attention against float64 truth."""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys

import pytest
import torch

from attnctl_fast import ops
from attnctl_fast.ops import _library, _tiled
from bench.ops.inputs import attention_inputs, fenced, rand, randn
from tests.support.marks import full, full_pairs, pairs
from tests.support.numerics import (
    DEVICE,
    FAST,
    IMPLS,
    TRITON,
    Plain,
    assert_right,
    assert_rows_close,
    carried_to_gradients,
    orders,
    plain_gradients,
    plain_results,
    widest,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, d): kept on chip and not, one part and several, one piece and two of the head and of the context.
SHAPES = [(1, 1, 8), (63, 77, 40), (200, 77, 64), (64, 120, 80), (256, 20, 160), (64, 154, 16)]
SIZES = ((1, 63, 256, 1024, 4096), (1, 77, 120, 154, 333), (40, 64, 80, 128, 160))
# (M, lengths, d) of a composition, and (H, N, d) of a layer whose context moves.
SIDES = [(1, (1,), 8), (63, (77, 9, 154), 40), (64, (20, 20), 160)]
HEADS = [(1, 1, 8), (3, 77, 40), (2, 150, 80), (1, 20, 160)]


def plain_out(q, k, v):
    return (q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1) @ v


def plain_update(q, k, queries, weight):
    """The columns' softmax; `queries` are the same as values, whose width is not reordered."""
    weighted = queries if weight is None else queries * weight[:, None, :, None].to(queries.dtype)
    return (q.shape[-1] ** -0.5 * (k @ q.mT)).softmax(-1) @ weighted


def plain_composed(q, k, *others):
    """Of keys side by side in `k`, as one tensor so that the width can be reordered."""
    *values, shares, lengths = others
    out = 0.0
    for part, v, share in zip(k.split(lengths, 2), values, shares, strict=True):
        out = out + share * ((q.shape[-1] ** -0.5 * (q @ part.mT)).softmax(-1) @ v)
    return out


def check_forward(impl, dtype, m, n, d, masked):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, 2.0, strided=True)
    weight = rand(2, m) if masked else None
    out, update = ops.attention_with_context_gradient(
        q, k, v, query_weight=None if weight is None else fenced(weight), impl=impl
    )
    assert out.dtype == dtype and update.dtype == torch.float32
    assert_right(out, plain_out, q, k, v)
    assert_rows_close(update, plain_results(plain_update, q, k, q, weight), dtype, "update")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d", "masked"), pairs(IMPLS, DTYPES, SHAPES, [False, True]))
def test_attention_with_context_gradient(impl, dtype, m, n, d, masked):
    check_forward(impl, dtype, m, n, d, masked)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize(("d", "programs"), [(40, 1), (64, 12), (160, 12), full(40, 12), full(64, 1), full(160, 1)])
def test_a_program_goes_over_several_tiles(d, programs, monkeypatch):
    """All of them in one program, and three parts of three tiles, the last one shorter, merged by twos."""
    launch, kernels = (
        importlib.import_module(f"attnctl_fast.kernels.{x}") for x in ("_launch", "attention_with_context_gradient")
    )
    monkeypatch.setattr(kernels, "MERGED", 2)
    use = launch.read_table("default")["context_gradient_fwd"][0]["use"]
    with launch.forced({"context_gradient_fwd": [{"use": {**use, "BLOCK_M": 16, "PROGRAMS": programs}}]}):
        check_forward("triton", torch.float16, 132, 77, d, True)


def offset(q, k, by):
    """Moves the logits of text token n by by[n], through the last of the head's numbers."""
    q, k = q.clone(), k.clone()
    q[..., -1], k[..., -1] = 1, (by * q.shape[-1] ** 0.5).to(k)
    return q, k


# What is done to (q, k, v, weight), and whether one exponential can then serve both softmaxes.
EXTREMES = {
    "columns from -30 to 30": (lambda q, k, v, w: (*offset(q, k, torch.linspace(-30, 30, 77)), v, w), True),
    "all at 35": (lambda q, k, v, w: (*offset(q, k, torch.full((77,), 35.0)), v, w), True),
    "one column at -100": (lambda q, k, v, w: (*offset(q, k, torch.arange(77).eq(3) * -100.0), v, w), False),
    "one column at 100": (lambda q, k, v, w: (*offset(q, k, torch.arange(77).eq(3) * 100.0), v, w), False),
    "all at -100": (lambda q, k, v, w: (*offset(q, k, torch.full((77,), -100.0)), v, w), False),
    "one sharp row": (lambda q, k, v, w: (q * (1 + 60 * torch.arange(333).eq(5).to(q)[:, None]), k, v, w), False),
    "large values": (lambda q, k, v, w: (q, k, v * 1e34, w), False),
    "large weights": (lambda q, k, v, w: (*offset(q, k, torch.full((77,), 35.0)), v, w * 1e30), False),
    "plain": (lambda q, k, v, w: (q, k, v, w), True),
}


@pytest.mark.parametrize("small", [False, True], ids=["tiles", "whole"])
@pytest.mark.parametrize("name", EXTREMES)
def test_eager_with_logits_of_any_size(name, small, monkeypatch):
    """In several tiles, the last of them shorter, or with two softmaxes of the whole map."""
    module = importlib.import_module("attnctl_fast.ops.attention_with_context_gradient")
    monkeypatch.setattr(_tiled, "TILE", 2 * 50 * 80)
    monkeypatch.setattr(module, "SMALL_MAP", 1 << 20 if small else 0)
    make, shared = EXTREMES[name]
    q, k, v, weight = make(*attention_inputs(2, 2, 333, 77, 40, torch.float32, strided=True), 0.5 + rand(2, 333))
    scale = q.shape[-1] ** -0.5
    if DEVICE.type == "cpu":
        assert (module._shared_map(q, k, v, weight, scale, None) is not None) == shared
    out, update = ops.attention_with_context_gradient(q, k, v, query_weight=weight, impl="eager")
    assert_right(out, plain_out, q, k, v)
    assert_right(update, plain_update, q, k, q, weight, what="update")


@pytest.mark.parametrize(
    ("impl", "dtype", "m", "n", "d"),
    full_pairs(FAST, DTYPES, *SIZES),
)
def test_attention_with_context_gradient_at_every_size(impl, dtype, m, n, d):
    check_forward(impl, dtype, m, n, d, True)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_through_both_results(impl, dtype):
    m, n, d = 64, 77, 40
    leaves = [x.requires_grad_() for x in (*attention_inputs(1, 2, m, n, d, dtype), rand(1, m))]
    of_out, of_update = randn(1, 2, m, d, dtype=dtype, seed=7), randn(1, 2, n, d, dtype=dtype, seed=8)

    def total(out, update):
        return (out * of_out.to(out.dtype)).sum() + (update * of_update.to(update.dtype)).sum()

    def plain(order, q, k, v, weight):
        moved = q[..., order], k[..., order]
        return total(plain_out(*moved, v), plain_update(*moved, q, weight))

    q, k, v, weight = leaves
    ours = torch.autograd.grad(
        total(*ops.attention_with_context_gradient(q, k, v, query_weight=weight, impl=impl)), leaves
    )
    rows = carried_to_gradients(q, k, v, of_out, d**-0.5)
    columns = carried_to_gradients(k, q, q, of_update, d**-0.5)
    carried = [rows["q"] + columns["k"] + columns["v"], rows["k"] + columns["q"], rows["v"], 0.0]
    for name, a, b, extra in zip(("q", "k", "v", "weight"), ours, plain_gradients(plain, leaves), carried, strict=True):
        if name == "weight":
            a, b = a.unsqueeze(-1), b.each(lambda x: x.unsqueeze(-1))
            extra = (columns["v"] * q.detach().double().abs().sum(-1)).sum(1)
        assert_rows_close(a, b, dtype, f"d{name}", extra)


@pytest.mark.parametrize(("impl", "leaf", "result"), pairs(FAST, range(4), range(2)))
def test_only_wanted_gradients_are_made(impl, leaf, result):
    """Each alone is what it is with all others, and what a result does not depend on has none."""
    tensors = [*attention_inputs(1, 2, 16, 9, 8, torch.float32), rand(1, 16)]

    def results(leaves):
        return ops.attention_with_context_gradient(*leaves[:3], query_weight=leaves[3], impl=impl)

    every = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(results(every)[result].square().sum(), every, allow_unused=True)[leaf]
    alone = [x.clone().requires_grad_(i == leaf) for i, x in enumerate(tensors)]
    found = results(alone)[result]
    if expected is None:
        assert (result, leaf) in ((0, 3), (1, 2))
        return
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), alone[leaf])[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_where_it_is(impl):
    q, k, v = attention_inputs(2, 2, 32, 9, 8, torch.float16)
    q[0, 0, 3], k[1, 1, 4] = torch.nan, torch.nan
    out, update = ops.attention_with_context_gradient(q, k, v, impl=impl)
    assert out[0, 0, 3].isnan().all() and update[0, 0].isnan().all()
    assert out[1, 1].isnan().all() and update[1, 1, 4].isnan().all()
    assert not out[0, 1].isnan().any() and not update[0, 1].isnan().any() and not update[1, 0].isnan().any()


@pytest.mark.parametrize(("impl", "dtype", "m", "lengths", "d"), pairs(IMPLS, DTYPES, SIDES))
def test_composed_attention(impl, dtype, m, lengths, d):
    weights = [1.0, 1.3, -0.4][: len(lengths)]
    q = randn(2, 2, m, d, dtype=dtype, seed=1, strided=True)
    ks = [randn(2, 2, n, d, dtype=dtype, seed=10 + i, strided=True) for i, n in enumerate(lengths)]
    vs = [randn(2, 2, n, d, dtype=dtype, seed=20 + i, strided=True) for i, n in enumerate(lengths)]
    shares = [x / sum(weights) for x in weights]
    out = ops.composed_attention(q, ks, vs, weights, impl=impl)
    assert out.dtype == dtype
    assert_right(out, plain_composed, q, torch.cat(ks, 2), *vs, shares, lengths)


@pytest.mark.parametrize(("impl", "largest"), [*((impl, None) for impl in FAST), ("eager", 0)])
def test_composed_attention_gradients(monkeypatch, impl, largest):
    """Where the map may be held, and where it may not."""
    if largest is not None:
        monkeypatch.setattr(_library, "LARGEST_MAP", largest)
    q = randn(1, 2, 16, 8, dtype=torch.float32, seed=1)
    ks, vs = ([randn(1, 2, n, 8, dtype=torch.float32, seed=s + n) for n in (9, 5)] for s in (0, 50))

    def gradients(impl, *tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = ops.composed_attention(leaves[0], leaves[1:3], leaves[3:], [1.0, -0.4], impl=impl)
        return torch.autograd.grad(out.square().sum(), leaves)

    truth = gradients("reference", *(x.double() for x in (q, *ks, *vs)))
    for ours, exact in zip(gradients(impl, q, *ks, *vs), truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_composition_is_an_affine_combination(impl):
    """A context with itself at any weight is itself, and a negation undoes an equal conjunction."""
    q, k, v = attention_inputs(2, 2, 16, 9, 8, widest(impl))
    other = [randn(2, 2, 5, 8, dtype=q.dtype, seed=s) for s in (11, 12)]
    expected = ops.attention(q, k, v, impl=impl)
    for weight in (0.3, 2.0, -0.5):
        same = ops.composed_attention(q, [k, k], [v, v], [1.0, weight], impl=impl)
        torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    keys, values = [k, other[0], other[0]], [v, other[1], other[1]]
    undone = ops.composed_attention(q, keys, values, [1.0, 0.7, -0.7], impl=impl)
    torch.testing.assert_close(undone, expected, atol=1e-5, rtol=1e-5)


def test_weights_that_cannot_be_normalised_are_an_error():
    q, k, v = attention_inputs(1, 1, 4, 3, 8, torch.float32)
    for weights, message in (
        ([1.0, -1.0], "sum to 0; .* lower a negative weight"),
        ([1.0, -0.9999], "sum to"),
        ([1.0, torch.inf], "finite"),
        ([1.0], "1 numbers for 2 contexts"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.composed_attention(q, [k, k], [v, v], weights)
    with pytest.raises(ValueError, match="at least one"):
        ops.composed_attention(q, [], [], [])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_update_is_minus_the_gradient_of_the_energies(impl):
    """In the paper's convention, by autograd through context_energy."""
    q, k, v = attention_inputs(2, 3, 16, 9, 8, widest(impl))
    weight = randn(1, 1, 24, 5, dtype=q.dtype, seed=4)[0, 0]
    context = randn(2, 1, 9, 5, dtype=q.dtype, seed=5)[:, 0].requires_grad_()
    keys = (context @ weight.mT).unflatten(-1, (3, 8)).transpose(1, 2)
    energy = ops.context_energy(q, keys, scale=1.0, alpha=0.2, impl=impl)
    assert energy.attention.shape == energy.context.shape == (2,)
    (slope,) = torch.autograd.grad((0.3 * energy.attention + 0.7 * energy.context).sum(), context)
    _, update = ops.attention_with_context_gradient(q, keys, v, scale=1.0, impl=impl)
    found = ops.context_update(update, keys, weight, gamma_attn=0.3, gamma_norm=0.7, alpha=0.2, convention="paper")
    torch.testing.assert_close(found, -slope, atol=1e-5, rtol=1e-4)


def test_a_small_step_lowers_the_energies():
    q, k, v = attention_inputs(2, 3, 64, 9, 8, torch.float64)
    weight = randn(1, 1, 24, 24, dtype=torch.float64, seed=4)[0, 0]
    context = torch.linalg.solve(weight, k.transpose(1, 2).flatten(2).mT).mT
    before = ops.context_energy(q, k)
    _, update = ops.attention_with_context_gradient(q, k, v)
    for gammas in ((1e-4, 0.0), (0.0, 1e-4)):
        moved = context + ops.context_update(
            update, k, weight, gamma_attn=gammas[0], gamma_norm=gammas[1], convention="paper"
        )
        after = ops.context_energy(q, (moved @ weight.mT).unflatten(-1, (3, 8)).transpose(1, 2))
        index = gammas.index(0.0) ^ 1
        assert (after[index] < before[index]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_is_called_and_never_read(dtype):
    """As an adapter is: a linear module inside another, whose own weight is not the projection's."""

    class Adapted(torch.nn.Module):
        in_features = 5

        def __init__(self):
            super().__init__()
            self.base = torch.nn.Linear(5, 24)
            self.down, self.up = torch.nn.Linear(5, 2, bias=False), torch.nn.Linear(2, 24, bias=False)

        @property
        def weight(self):
            raise AssertionError("the weight was read")

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    module = Adapted().to(DEVICE, dtype).requires_grad_(False)
    whole = module.base.weight + module.up.weight @ module.down.weight
    k, update = (randn(2, 3, 9, 8, dtype=dtype, seed=s) for s in (1, 2))
    tokens = rand(2, 9)
    how = {"gamma_attn": torch.tensor(0.3, device=DEVICE), "gamma_norm": 0.7, "token_weight": tokens}
    expected = ops.context_update(update.float(), k, whole, **how)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            found = ops.context_update(update.float(), k, module, **how)
        close = {} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
        assert found.dtype == dtype and found.shape == (2, 9, 5)
        torch.testing.assert_close(found, expected, **close)


class Packed(torch.nn.Parameter):
    """As a quantised weight is: a tensor of another class."""


def _plain(module):
    return module


def _hooked(module):
    module.register_forward_hook(lambda module, arguments, out: 2 * out)
    return module


def _hooked_before(module):
    module.register_forward_pre_hook(lambda module, arguments: 2 * arguments[0])
    return module


def _replaced(module):
    module.forward = lambda x: 2 * torch.nn.functional.linear(x, module.weight)
    return module


def _packed(module):
    module.weight = Packed(module.weight.detach())
    return module


@pytest.mark.parametrize(
    ("change", "factor", "called"),
    [(_plain, 1, 0), (_hooked, 2, 1), (_hooked_before, 2, 1), (_replaced, 2, 0), (_packed, 1, 1)],
)
def test_only_a_bare_linear_module_is_its_weight(change, factor, called, monkeypatch):
    """`called`: how often the class's own forward runs."""
    torch.manual_seed(0)
    module = change(torch.nn.Linear(5, 24, bias=False).to(DEVICE))
    k, update = (randn(2, 3, 9, 8, dtype=torch.float32, seed=s) for s in (1, 2))
    how = {"gamma_attn": 0.3, "gamma_norm": 0.7}
    expected = factor * ops.context_update(update, k, module.weight.detach().as_subclass(torch.Tensor), **how)
    forward, calls = torch.nn.Linear.forward, []
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: calls.append(1) or forward(self, x))
    with torch.no_grad():
        found = ops.context_update(update, k, module, **how)
    torch.testing.assert_close(found, expected)
    assert len(calls) == called


STORED_AS_FLOAT8 = """
import torch
from attnctl_fast import ops
from attnctl_fast.ops import _library
from diffusers.hooks import apply_layerwise_casting

device = torch.device({device!r})
projection = torch.nn.Linear(5, 24, bias=False).to(device, torch.bfloat16)
weight = projection.weight.detach().to(torch.float8_e4m3fn).to(torch.bfloat16)
storage = {{"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}}
apply_layerwise_casting(torch.nn.Sequential(projection), **storage, skip_modules_pattern=())
k, update = torch.randn(2, 3, 9, 8, device=device).bfloat16(), torch.randn(2, 3, 9, 8, device=device)

def step(projection, update):
    return ops.context_update(update, k, projection, gamma_attn=0.3, gamma_norm=0.7)

for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
    with mode:
        for run in (step, torch.compile(step, backend="aot_eager")):
            found = run(projection, update)
            assert found.dtype == torch.bfloat16 and projection.weight.dtype == torch.float8_e4m3fn
            torch.testing.assert_close(found, step(weight, update))
leaves = [update.clone().requires_grad_() for _ in range(2)]
for leaf, given in zip(leaves, (projection, weight)):
    step(given, leaf).sum().backward()
torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
"""


def test_weights_that_are_only_stored_as_float8():
    """diffusers casts them for each call. In a process of its own: torch.func dies of that by a segmentation fault."""
    pytest.importorskip("diffusers")
    code = STORED_AS_FLOAT8.format(device=DEVICE.type)
    if DEVICE.type == "cuda":  # which no fork can use
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        return
    process = multiprocessing.get_context("fork").Process(target=exec, args=(code, {}))
    process.start()
    process.join()
    assert process.exitcode == 0


def _adapted():
    """A projection that is called, on the CPU."""
    return torch.nn.Sequential(torch.nn.Linear(5, 7, bias=False), torch.nn.Linear(7, 24, bias=False))


def test_an_offloaded_module_is_loaded_for_the_call():
    accelerate = pytest.importorskip("accelerate")
    module = _adapted()
    module.in_features = 5
    k, update = (randn(2, 3, 9, 8, dtype=torch.float32, seed=s) for s in (1, 2))
    how = {"gamma_attn": 0.3, "gamma_norm": 0.7}
    expected = ops.context_update(update, k, (module[1].weight @ module[0].weight).detach().to(DEVICE), **how)
    accelerate.cpu_offload(module, DEVICE)
    assert module[0].weight.is_meta
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            torch.testing.assert_close(ops.context_update(update, k, module, **how), expected)
    assert module[0].weight.is_meta


def test_a_module_made_in_inference_mode():
    with torch.inference_mode():
        module = _adapted().to(DEVICE)
    module.in_features = 5
    k, update = (randn(2, 3, 9, 8, dtype=torch.float32, seed=s) for s in (1, 2))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            weight = module[1].weight @ module[0].weight
            expected, found = (
                ops.context_update(update, k, x, gamma_attn=0.3, gamma_norm=0.7) for x in (weight, module)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_module_projects_is_differentiable(compiled):
    module = _adapted().to(DEVICE, torch.float64)
    module.in_features = 5
    k, update = (randn(2, 3, 9, 8, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))

    def step(update, k):
        return ops.context_update(update, k, module, gamma_attn=0.3, gamma_norm=0.7, impl="eager")

    torch.compiler.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    assert torch.autograd.gradcheck(run, (update, k), fast_mode=True)


def test_released_convention_and_token_weights():
    k, update = (randn(2, 3, 9, 8, dtype=torch.float64, seed=s) for s in (1, 2))
    weight = randn(1, 1, 24, 5, dtype=torch.float64, seed=4)[0, 0]
    tokens = rand(9, dtype=torch.float64)
    found = ops.context_update(update, k, weight, gamma_attn=0.3, gamma_norm=0.7, token_weight=tokens)
    keys, pull = (x.transpose(1, 2).reshape(2, 9, 24) for x in (k, update))
    share = keys.square().sum(-1).softmax(-1)
    expected = (0.3 * tokens[:, None] * pull - 0.7 * share[..., None] * keys) @ weight
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_sample_may_have_its_own_gammas(impl):
    k, update = (randn(2, 3, 9, 8, dtype=widest(impl), seed=s) for s in (1, 2))
    weight = randn(1, 1, 24, 5, dtype=k.dtype, seed=4)[0, 0]
    each = torch.tensor([[0.3, 0.1], [0.7, 0.2]], dtype=k.dtype, device=DEVICE)
    found = ops.context_update(update, k, weight, gamma_attn=each[:, 0], gamma_norm=each[:, 1], impl=impl)
    for i, (attn, norm) in enumerate(each.tolist()):
        one = slice(i, i + 1)
        alone = ops.context_update(update[one], k[one], weight, gamma_attn=attn, gamma_norm=norm, impl=impl)
        torch.testing.assert_close(found[one], alone)


def plain_step(update, k, gamma_attn, gamma_norm, tokens, alpha, convention, order=slice(None)):
    """The norms are summed in this order."""
    keys, pull = (x.transpose(1, 2).flatten(2) for x in (k.to(update.dtype), update))
    share = (keys[..., order].square().sum(-1) / (1 if convention == "official" else 2)).softmax(-1)
    return gamma_attn * tokens.to(keys).unsqueeze(-1) * (pull - alpha * keys) - gamma_norm * share.unsqueeze(-1) * keys


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("convention", ["official", "paper"])
def test_masked_columns_are_as_if_they_were_not_there(impl, convention):
    dtype = widest(impl)
    update, k = (randn(2, 2, 7, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = randn(1, 1, 16, 5, dtype=dtype, seed=3)[0, 0]
    kept = [0, 2, 3, 6]
    key_bias = torch.full((2, 7), -torch.inf, device=k.device)
    key_bias[0, kept], key_bias[1] = 0.5, 0.0
    how = {"gamma_attn": 0.3, "gamma_norm": 0.2, "alpha": 0.1, "convention": convention, "impl": impl}
    found = ops.context_update(update, k, weight, key_bias=key_bias, **how)
    alone = ops.context_update(update[:1, :, kept], k[:1, :, kept], weight, **how)
    torch.testing.assert_close(found[:1, kept], alone)
    assert not found[0, [1, 4, 5]].any()
    torch.testing.assert_close(found[1:], ops.context_update(update[1:], k[1:], weight, **how))
    nothing = ops.context_update(update, k, weight, key_bias=torch.full_like(key_bias, -torch.inf), **how)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize(
    ("impl", "dtype", "h", "n", "d", "alpha", "convention"),
    pairs(FAST, DTYPES, HEADS, [(0.0, "official"), (0.2, "paper")]),
)
def test_update_before_the_projection(impl, dtype, h, n, d, alpha, convention):
    """By a projection that does nothing; keys as a layer makes them, [B,N,H*d]; squares of up to about 60."""
    k = fenced(randn(1, 2, n, h * d, dtype=dtype, seed=1)[0] * (60 / (h * d)) ** 0.5 * 0.8)
    k = k.unflatten(-1, (h, d)).transpose(1, 2)
    update = fenced(randn(2, h, n, d, seed=2, dtype=torch.float32))
    tokens = fenced(rand(2, n))
    identity = torch.eye(h * d, dtype=dtype, device=DEVICE)
    gammas = torch.tensor([0.3, 0.7], device=DEVICE)
    how = {"token_weight": tokens, "alpha": alpha, "convention": convention, "impl": impl}
    found = ops.context_update(update, k, identity, gamma_attn=gammas[0], gamma_norm=gammas[1], **how)
    assert found.dtype == dtype

    def step(order=slice(None)):
        return plain_step(update, k, *gammas, tokens, alpha, convention, order).to(dtype)

    truth = plain_step(update.double(), k, *gammas.double(), tokens, alpha, convention)
    assert_rows_close(found, Plain(truth, [step(order) for order in orders(h * d)], step), dtype, "step")


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_a_composition_may_be_a_tensor(impl):
    q = randn(2, 2, 16, 8, dtype=widest(impl), seed=1)
    ks, vs = ([randn(2, 2, n, 8, dtype=q.dtype, seed=s + n) for n in (9, 5)] for s in (0, 50))
    weights = [1.0, -0.4]
    expected = ops.composed_attention(q, ks, vs, weights, impl=impl)
    found = ops.composed_attention(q, ks, vs, torch.tensor(weights, dtype=q.dtype, device=DEVICE), impl=impl)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"weights has shape \(3,\) for 2 contexts"):
        ops.composed_attention(q, ks, vs, torch.ones(3, device=DEVICE), impl=impl)


def test_bad_input_is_named():
    q, k, v = attention_inputs(2, 2, 16, 9, 8, torch.float32)
    for weight, message in (
        (torch.ones(15), r"query_weight is .*\(15,\).*\[16\] or \[2, 16\]"),
        (torch.ones(16, dtype=torch.int64), "float tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.attention_with_context_gradient(q, k, v, query_weight=weight.to(DEVICE))
    update, weight = torch.zeros_like(k), torch.ones(16, 5, device=DEVICE)
    good = {"gamma_attn": 0.1, "gamma_norm": 0.1}
    for changed, message in (
        ({"gamma_attn": torch.nan}, "gamma_attn is nan; it must be finite"),
        ({"gamma_norm": torch.ones(3)}, "gamma_norm has shape"),
        ({"token_weight": torch.ones(3)}, "token_weight has shape"),
        ({"gamma_attn": torch.ones((), device="meta")}, "gamma_attn is on meta but k is on"),
        ({"token_weight": torch.ones(9, device="meta")}, "token_weight is on meta but k is on"),
        ({"convention": "mine"}, "convention is 'mine'"),
        ({"update": update[:, :1]}, "update has shape"),
        ({"to_k": weight[:3]}, "H\\*d = 16"),
        ({"to_k": lambda x: x}, "in_features"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.context_update(**{"update": update, "k": k, "to_k": weight, **good, **changed})
