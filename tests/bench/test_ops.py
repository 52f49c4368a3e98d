"""The operation table: what is registered, and how it is measured on a CPU, at a tiny layer."""

from __future__ import annotations

import inspect
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnctl_fast import _impl, ops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `operations` with the shortest turns and shapes called `tiny`, as without Triton's interpreter."""
    monkeypatch.setattr(_impl, "INTERPRETED", False)
    from bench.ops import main as operations

    layer = operations.Layer("tiny", 2, (4, 4), 8, tokens=9, steps=2)
    monkeypatch.setattr(operations, "QUICK", operations.Effort(1, 1e-3))
    tiny = [operations.Case(name, layer) for name in operations.OPERATIONS]
    monkeypatch.setitem(operations.SHAPES, "tiny", lambda: iter(tiny))
    yield operations


def command(*options: Any) -> int:
    from bench.__main__ import main

    return main(["ops", "--quick", "--device", "cpu", "--shapes", "tiny", *map(str, options)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def competing(bench: Any, monkeypatch: pytest.MonkeyPatch, operation: str, **others: Any) -> None:
    """Puts other forms, by name what builds them, among those of an operation that need no compiler."""
    registered = bench.comparison

    def comparison(name: str, *rest: Any) -> Any:
        made = registered(name, *rest)
        if name != operation:
            return made
        from bench.ops.base import Contender

        kept = {k: contender for k, contender in made.contenders.items() if not contender.compiles}
        return replace(made, contenders=kept | {k: Contender(v) for k, v in others.items()})

    monkeypatch.setattr(bench, "comparison", comparison)


def test_every_public_operation_is_registered(bench: Any) -> None:
    public = [
        name
        for name in ops.__all__
        if inspect.isfunction(getattr(ops, name)) and "impl" in inspect.signature(getattr(ops, name)).parameters
    ]
    assert {"attention", "context_energy", "regulate"} <= set(public)
    assert set(public) <= set(bench.OPERATIONS)
    assert {case.operation for case in bench.small()} == set(bench.OPERATIONS)


def test_ours_is_what_the_device_runs(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (bench.ours(CPU), bench.ours(torch.device("cuda"))) == ("eager", "triton")
    monkeypatch.setattr(_impl, "INTERPRETED", True)
    assert bench.ours(CPU) == "triton"


@pytest.mark.parametrize(
    ("operation", "form"),
    [
        ("attention", "SDPA math"),
        ("attention_all", "SDPA math"),
        ("region_attention", "published"),
        ("biased_attention", "SDPA math, mask"),
        ("biased_attention_all", "SDPA math, mask"),
        ("regulated_attention", "SDPA math, mask"),
        ("gaussian_bias", "two products"),
        ("gaussian_bias_all", "two products"),
        ("attention_with_maps", "published"),
        ("attention_with_maps_guidance", "published"),
        ("maps_from_lse", "closed form"),
        ("maps_from_lse_all", "closed form"),
        ("attention_with_context_gradient", "published"),
        ("context_energy", "logits in memory"),
        ("composed_attention", "SDPA math, each"),
    ],
)
def test_flops_are_those_of_a_form_that_repeats_nothing(bench: Any, operation: str, form: str) -> None:
    layer = bench.Layer("tiny", 3, (4, 6), 8, tokens=9, batch=2)
    this = bench.comparison(operation, layer, torch.float32, CPU)
    run = this.contenders[form].build()
    with FlopCounterMode(display=False) as counted:
        run()
    assert this.flops == counted.get_total_flops() > 0


def test_a_row_says_what_was_measured(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "ops.jsonl"
    path.parent.mkdir()
    path.write_text('{"run": "an earlier one"}\n')
    threads = torch.get_num_threads()
    assert command("--only", "attention_with_maps", "--results", path) == 0
    assert torch.get_num_threads() == threads
    earlier, *found = rows(path)
    assert earlier == {"run": "an earlier one"}
    forms = {"eager", "SDPA flash, one-hot", "SDPA math, one-hot", "published"}
    assert {row["impl"] for row in found if row["op"] == "attention_with_maps"} == {*forms, "plain attention"}
    assert {row["impl"] for row in found if row["op"] == "attention_with_maps_guidance"} == forms
    for row in found:
        assert {"run", "git", "dirty", "device", "versions"} <= row.keys() and row["quick"] is True
        assert (row["model"], row["shape"], row["dtype"]) == ("tiny", "B1 H2 M16 N9 d8 T2", "float32")
        assert 0 < row["q1"] <= row["median"] <= row["q3"] and row["samples"] >= 3
        assert row["threads"] in (1, 2) and row["bytes"] > 0 and row["flops"] > 0
        assert row["impl"] == "plain attention" or row["relative_error"] < 1e-5
    assert "0 failed" in capsys.readouterr().out


def test_other_dtypes(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    assert command("--only", "context_energy", "--dtype", "bfloat16", "--results", path) == 0
    assert {(row["impl"], row["dtype"]) for row in rows(path)} == {
        ("eager", "bfloat16"),
        ("logits in memory", "bfloat16"),
    }


def test_what_fails_is_a_row_and_the_others_are_measured(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unbuildable() -> Any:
        raise RuntimeError("no such backend\nat all")

    def tired() -> Any:
        calls = iter(range(3))
        truth = bench.comparison("region_attention", *given).judge.truth
        return lambda: (next(calls), truth[0])[1]

    given = (next(bench.SHAPES["tiny"]()).layer, torch.float32, CPU)
    competing(bench, monkeypatch, "region_attention", broken=unbuildable, tired=tired)
    path = tmp_path / "ops.jsonl"
    assert command("--only", "region", "--results", path) == 0
    found = {row["impl"]: row for row in rows(path)}
    assert found["broken"]["failed"] == "RuntimeError: no such backend"
    assert found["tired"]["failed"].startswith("StopIteration") and "median" not in found["tired"]
    assert all("median" in found[name] for name in ("eager", "published", "plain attention"))


def test_what_is_wrong_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def off() -> Any:
        layer = next(bench.SHAPES["tiny"]()).layer
        exact = bench.comparison("gaussian_bias", layer, torch.float32, CPU).judge.truth[0]
        return lambda: (calls.append(1), 1.001 * exact)[1]

    competing(bench, monkeypatch, "gaussian_bias", eager=off)
    path = tmp_path / "ops.jsonl"
    assert command("--only", "gaussian_bias", "--results", path) == 1
    found = {row["impl"]: row for row in rows(path) if row["op"] == "gaussian_bias"}
    assert "off by 0.001 of the norm" in found["eager"]["failed"] and "median" not in found["eager"]
    assert found["eager"]["relative_error"] == pytest.approx(1e-3, rel=1e-2) and len(calls) == 1
    assert "median" in found["two products"]


LAYER_OFF = "the output is off that of the bias"
BIAS_OFF = "losses at the bias are off the lowest"


@pytest.mark.parametrize(
    ("operation", "place", "wrong", "said"),
    [
        ("regulate", 0, lambda losses: 0.97 * losses, BIAS_OFF),
        ("regulate", 1, torch.zeros_like, BIAS_OFF),
        ("regulate", 1, lambda bias: bias.flip(1), BIAS_OFF),
        ("regulate", 1, lambda bias: bias * torch.nan, BIAS_OFF),
        ("regulated_layer", 1, torch.zeros_like, BIAS_OFF),
        ("regulated_layer", 2, torch.zeros_like, LAYER_OFF),
        ("regulated_layer", 2, lambda out: 1.001 * out, LAYER_OFF),
        *(("target_statistics", place, lambda x: 1.001 * x, "off by 0.001 of the norm") for place in (0, 1, 2, 4)),
    ],
)
def test_every_part_of_a_result_is_checked(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    place: int,
    wrong: Callable[[torch.Tensor], torch.Tensor],
    said: str,
) -> None:
    """A form that is right but for one part is not timed; those whose results it spoils are."""
    layer = bench.Layer("tiny", 2, (4, 4), 8, tokens=16, batch=2, steps=5)
    real = bench.comparison(operation, layer, torch.float32, CPU).contenders
    names = [name for name, contender in real.items() if contender.checked and not contender.compiles]

    def spoilt(name: str) -> Any:
        run = real[name].build()

        def spoiling() -> Any:
            result = list(run())
            result[place] = wrong(result[place])
            return result

        return lambda: spoiling

    competing(bench, monkeypatch, operation, **{f"spoilt {name}": spoilt(name) for name in names})
    with torch.no_grad():
        found = {row["impl"]: row for row in bench.measure(bench.Case(operation, layer), torch.float32, bench.QUICK)}
    for name in names:
        assert "median" in found[name], found[name]
        assert said in found[f"spoilt {name}"]["failed"]


def test_a_loss_that_its_bias_has_but_is_not_the_lowest_is_wrong(bench: Any) -> None:
    layer = bench.Layer("small", 2, (16, 16), 8, tokens=16)
    this = bench.comparison("regulate", layer, torch.float32, CPU)
    shorter = bench.comparison("regulate", layer._replace(steps=1), torch.float32, CPU)
    relative = this.judge.errors(shorter.contenders["eager"].build()())[1]
    with pytest.raises(ValueError, match="of the norm, allowed 0.02"):
        this.judge.require(relative)


def test_an_operation_that_cannot_be_compared_is_a_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registered = bench.comparison

    def comparison(name: str, *rest: Any) -> Any:
        if name == "gaussian_bias":
            raise MemoryError("too large")
        return registered(name, *rest)

    monkeypatch.setattr(bench, "comparison", comparison)
    path = tmp_path / "ops.jsonl"
    assert command("--only", "gaussian_bias", "--results", path) == 1
    first, *others = rows(path)
    assert (first["op"], first["impl"], first["failed"]) == ("gaussian_bias", None, "MemoryError: too large")
    assert {row["op"] for row in others} == {"gaussian_bias_all"}


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupt_keeps_what_was_measured(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """While results are checked, and while the turns run."""
    seen: list[int] = []

    def run() -> Any:
        seen.append(1)
        if len(seen) == call:
            raise KeyboardInterrupt
        return made

    layer = next(bench.SHAPES["tiny"]()).layer
    made = bench.comparison("gaussian_bias_all", layer, torch.float32, CPU).judge.truth
    competing(bench, monkeypatch, "gaussian_bias_all", late=lambda: run)
    path = tmp_path / "ops.jsonl"
    assert command("--only", "gaussian_bias", "--results", path) == 130
    assert [(row["op"], row["impl"]) for row in rows(path)] == [
        ("gaussian_bias", "eager"),
        ("gaussian_bias", "two products"),
    ]
    assert "what was measured is kept" in capsys.readouterr().err


def test_mistakes_are_named(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.jsonl"
    wrong = {
        ("--only", "gausian"): "'gausian' is in the name of no operation; there are attention, ",
        ("--shapes", "flux"): "'flux' is none of small, default, joint, all, tiny and no part of a model: SD 1.5, ",
        ("--results", path / "under" / "a file"): "ops.jsonl/under",
    }
    path.touch()
    for options, said in wrong.items():
        assert command("--results", path, *options) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert not path.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device_cuda(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--device", "cuda") == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_a_gpu_is_left_to_its_own_measurements(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[list[str]] = []

    def run(command: list[str], cwd: Path) -> Any:
        given.append(command)
        assert (cwd / "bench" / "gpu" / "main.py").is_file()
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.subprocess, "run", run)
    chosen = bench.parser().parse_args(["--only", "regul", "--results", str(tmp_path / "results.jsonl")])
    assert bench.run(chosen) == 1
    assert given[0][1:] == ["-m", "bench", "gpu", "--only", "regul", "--results", str(tmp_path / "results.jsonl")]
    for option in (["--dtype", "float16"], ["--shapes", "all"], ["--quick"], ["--compile"]):
        with pytest.raises(ValueError, match=f"{option[0]}: a GPU has a plan of its own"):
            bench.run(bench.parser().parse_args(option))
    assert len(given) == 1


def test_the_default_has_the_layers_of_the_tables(bench: Any) -> None:
    cases = bench.cases("", "default")
    assert len(cases) == len(set(cases))
    assert set(bench.cases("", "small")) <= set(cases)
    sizes = [(case.layer.image_tokens, case.layer.width, case.layer.targets) for case in cases]
    maps = [size for case, size in zip(cases, sizes, strict=True) if case.operation == "attention_with_maps_guidance"]
    assert {(4096, 40, 2), (4096, 40, 75), (256, 160, 75)} <= set(maps)
    sdxl = bench.cases("composed", "sdxl")
    assert {(case.operation, case.layer.model) for case in sdxl} == {("composed_attention", "SDXL")}


def test_check_names_what_is_behind(bench: Any) -> None:
    """By more than a call's checks, in three quarters of the turns, and of rivals whose results are right."""

    def rows(**turns: list[float]) -> list[dict[str, Any]]:
        same = {"op": "attention", "model": "SD 2", "shape": "M256", "relative_error": 1e-7}
        return [{**same, "impl": name, "median": statistics.median(x), "turns": x} for name, x in turns.items()]

    # For a while the machine is half as fast.
    ours = {"eager": [2.0, 2.1, 4.0, 4.1]}
    assert bench.behind(rows(**ours, stock=[2.1, 2.2, 4.1, 4.2])) == []
    assert bench.behind(rows(**ours, stock=[1.9, 2.0, 4.1, 4.2])) == []
    (text,) = bench.behind(rows(**ours, stock=[1.9, 2.0, 3.8, 4.2]))
    assert text == "behind: attention at M256: stock takes 0.95 of our time"
    (text,) = bench.behind(rows(**ours, stock=[1.0, 1.05, 2.0, 2.05], other=[1.2, 1.3, 2.4, 2.6]))
    assert text == "behind: attention at M256: stock takes 0.50 of our time"
    # A rival that takes long has fewer turns.
    assert len(bench.behind(rows(**ours, stock=[1.9, 2.0]))) == 1
    assert bench.behind(rows(eager=[0.031] * 4, stock=[0.016] * 4)) == []
    scale = rows(**ours) + [{**row, "relative_error": None} for row in rows(plain=[1.0] * 4)]
    del scale[1]["relative_error"]
    assert bench.behind(scale) == []
