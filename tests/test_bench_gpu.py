"""The measurements for a GPU, run on a CPU in Triton's interpreter: that everything runs, is checked and is written."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import gpu

    return gpu


def dry_run(script, *options):
    command = [sys.executable, str(ROOT / "bench" / script), "--dry-run", *map(str, options)]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)


def test_dry_run_measures_everything_and_checks_it(bench, tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    done = dry_run("gpu.py", "--results", path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["op"] == "correctness" and lines[0]["planned"] == lines[0]["done"] and not lines[0]["failures"]
    by_operation = {}
    for line in lines[1:]:
        by_operation.setdefault(line["op"], {})[line["impl"]] = line
    assert set(by_operation) == set(bench.OPERATIONS)
    for operation, impls in by_operation.items():
        ours = impls[bench.OURS]
        assert "failed" not in ours and ours["launches"], operation
        assert ours["p20"] <= ours["p50"] <= ours["p80"]
        assert "failed" not in impls["eager"], operation
    for line in lines[1:]:
        assert {"date", "gpu", "git", "versions", "shape", "dtype"} <= line.keys()
        # Only what a CPU does not have fails: fused backends, and FlexAttention's backward pass.
        assert "failed" not in line or "No viable backend" in line["failed"] or "backward on CPU" in line["failed"], (
            line
        )
    for operation in ("biased_attention", "regulated_attention"):
        assert {"SDPA math, mask", "SDPA flash, low rank", "FlexAttention"} <= by_operation[operation].keys()
    for operation in ("regulate", "regulated_layer"):
        assert {"published", "published, no sync", "torch.compile"} <= by_operation[operation].keys()


def test_what_the_budget_does_not_reach_is_named(bench):
    done = dry_run("gpu.py", "--budget-seconds", 0)
    assert done.returncode == 0, done.stderr
    assert f"not reached within 0 s: {len(bench.OPERATIONS)} of {len(bench.OPERATIONS)}: attention" in done.stdout


def test_the_aims_come_first_and_everything_comes_once(bench):
    planned = bench.tasks(quick=False)
    assert len(planned) == len(set(planned))
    assert [(t.operation, t.layer) for t in planned[:4]] == [
        (operation, layer) for operation in ("regulate", "regulated_layer") for layer in (bench.SMALL, bench.LARGE)
    ]
    assert (bench.SMALL.heads, bench.SMALL.image_tokens) == (20, 256)
    assert (bench.LARGE.heads, bench.LARGE.image_tokens) == (20, 1024)
    assert {t.operation for t in planned} == set(bench.OPERATIONS)
    attention = {(t.layer.model, t.layer.grid, t.layer.batch, t.dtype) for t in planned if t.operation == "attention"}
    for layer, batch, dtype in itertools.product(bench.LAYERS, (2, 8), (torch.float16, torch.bfloat16)):
        assert (layer.model, layer.grid, batch, dtype) in attention
    quick = bench.tasks(quick=True)
    assert not any(t.compiled for t in quick) and len(quick) < len(planned) / 3


def test_correctness_covers_the_whole_grid(bench):
    checks = bench.correctness.checks()
    module = bench.correctness
    outputs = {(c.name, c.case.m, c.case.n, c.case.d, c.case.dtype) for c in checks}
    names = ("attention", "target_statistics", "biased_attention", "regulated_attention")
    for place in itertools.product(names, module.IMAGE_TOKENS, module.TOKENS, module.WIDTHS, module.DTYPES):
        assert place in outputs
    gradients = {(c.name, c.case.m, c.case.n) for c in checks if c.backward}
    for place in itertools.product(names, module.IMAGE_TOKENS, module.TOKENS):
        assert place in gradients
    assert len(list(module.recorded_checks())) < len(checks) / 2


def test_a_wrong_kernel_is_a_failed_check(bench, monkeypatch):
    module = bench.correctness
    kernel_cases = module._cases()
    monkeypatch.setattr(kernel_cases, "run_triton", lambda name, case, t: {"out": 2 * t["q"], "lse": t["q"][..., 0]})
    outcome = module.run(module.checks(tiny=True)[:1], float("inf"))
    assert outcome.done == 1 and len(outcome.failures) == 1


def test_a_contender_that_is_wrong_or_fails_is_not_timed(bench, monkeypatch):
    from registry import Comparison, Contender

    x = torch.arange(1.0, 5.0)

    def broken():
        raise RuntimeError("no such backend\nat all")

    contenders = {
        "triton": Contender(lambda: lambda: x.clone()),
        "off": Contender(lambda: lambda: x * 1.01),
        "nan": Contender(lambda: lambda: x / 0 * 0),
        "broken": Contender(lambda: broken),
        "other": Contender(lambda: lambda: x + 1, checked=False),
    }
    made = Comparison("op", bench.TINY, torch.float32, contenders, (x.double(),), 1e-3, 16, 8, lambda r: (r,))
    monkeypatch.setattr(bench, "comparison", lambda *_: made)
    measured = bench.Bench(torch.device("cpu"), None)
    measured.measure(bench.Task("op", bench.TINY, torch.float32))
    records = {r["impl"]: r for r in measured.records}
    assert [name for name, r in records.items() if "p50" in r] == ["triton", "other"]
    assert "allowed 0.001" in records["off"]["failed"] and "nan" in records["nan"]["failed"]
    assert records["broken"]["failed"] == "RuntimeError: no such backend"
    assert records["triton"]["max_error"] == 0 and (records["triton"]["bytes"], records["triton"]["flops"]) == (16, 8)


def record(op, layer, impl, p50, graph=None):
    times = None if graph is None else {"p50": graph}
    where = {"op": op, "model": layer.model, "shape": layer.sizes, "dtype": "float16", "impl": impl}
    return {**where, "p50": p50, "graph": times}


def test_aims_are_judged(bench):
    layer = bench.LAYERS[0]._replace(batch=2)
    records = [
        record("attention", layer, "triton", 30.0, 10.0),
        record("attention", layer, "SDPA flash", 20.0, 11.0),
        record("attention", layer, "SDPA math", 9.0),
        record("regulate", bench.SMALL, "triton", 80.0, 59.0),
        record("regulate", bench.LARGE, "triton", 210.0, 201.0),
        record("regulated_layer", bench.SMALL, "triton", 150.0, 90.0),
        record("regulated_layer", bench.SMALL, "plain layer", 20.0, 10.0),
        record("regulated_layer", bench.SMALL, "published", 15000.0),
        record("regulated_layer", bench.SMALL, "eager", 3000.0, 700.0),
        record("regulated_layer", bench.SMALL, "torch.compile", 2000.0, 400.0),
    ]
    lines = list(bench.aims(records))
    assert [text.partition(":")[0] for text in lines] == ["MISSED", "met", "MISSED", "MISSED", "met", "met", "MISSED"]
    assert "10.0 us, SDPA math 9.0 us" in lines[0]
    assert "130.0 us over a plain one" in lines[3] and "80.0 us over a plain one" in lines[4]
    assert "100 times faster" in lines[5] and "4.4 times faster than stock PyTorch (torch.compile)" in lines[6]
    assert list(bench.aims([])) == []


def test_tuner_dry_run_writes_a_table(tmp_path):
    path = tmp_path / "gpu.json"
    done = dry_run("tune.py", "--only", "gaussian_bias", "--output", path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(path.read_text())
    assert table["margin"] == 0.05 and set(table["rules"]) <= {"gaussian_bias_fwd", "gaussian_bias_bwd"}
    assert done.stdout.count("gaussian_bias_fwd tiny") == done.stdout.count("gaussian_bias_bwd tiny") == 1, done.stdout
    assert "failed" not in done.stdout


def test_tuner_knows_every_kernel_and_setting(bench):
    import tune

    table = bench._launch.read_table("default")
    assert set(tune.JUDGED_BY) == set(table)
    assert {name for rules in table.values() for rule in rules for name in rule["use"]} <= set(tune.VALUES)
    assert {name for names in tune.JUDGED_BY.values() for name in names} <= set(bench.OPERATIONS)


def test_rules_give_every_size_its_configuration(bench):
    import tune

    default = [{"use": {"X": 0}}]

    def found(m, d, x):
        return tune.Found({"m": m, "d": d}, {"X": x}, 0.5)

    results = [found(256, 64, 1), found(64, 64, 0), found(1024, 64, 1), found(4096, 64, 2), found(256, 40, 1)]
    made = tune.rules(results, default)
    for result in results:
        assert bench._launch.choose({"": [*made, *default]}, "", result.sizes) == result.config
    assert len(made) == 3
    assert tune.rules([found(64, 64, 0)], default) == []


def test_tuner_takes_what_is_faster_by_the_margin(bench, monkeypatch):
    import tune

    speed = {4: 100.0, 8: 90.0, 2: 80.0}
    tuner = object.__new__(tune.Tuner)
    tuner.clock, tuner.kernel, tuner.sizes = bench.Clock(torch.device("cpu")), "k", {"m": 64}
    tuner.default = {"num_warps": 4, "num_stages": 1}

    def times(configs):
        return [speed.get(c["num_warps"], float("inf")) - 3 * (c["num_stages"] == 2) for c in configs]

    monkeypatch.setattr(tuner, "_times", times)
    assert tuner.search() == tune.Found({"m": 64}, {"num_warps": 2, "num_stages": 2}, 0.77)
    speed.update({8: 99.0, 2: 101.0})
    assert tuner.search() == tune.Found({"m": 64}, tuner.default, 1.0)
