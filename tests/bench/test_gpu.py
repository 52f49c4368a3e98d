"""The measurements for a GPU, run on a CPU in Triton's interpreter: that everything runs, is checked and is written."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.ops.registry import ATTENTION, JUDGED, OPERATIONS
from tests.support import kernel_cases

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    from bench.gpu import main as gpu

    return gpu


def dry_run_here(bench, *options):
    return bench.run(bench.parser().parse_args(["--dry-run", *map(str, options)]))


# The whole program in a process that must not ask anything of the GPU, as its children are forked.
UNTOUCHED = """
import os, sys, torch
parent = os.getpid()
for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_name", "current_device"):
    def asked(*args, name=name, real=getattr(torch.cuda, name), **options):
        assert os.getpid() != parent, name
        return real(*args, **options)
    setattr(torch.cuda, name, asked)
from tests.support.interpreter import hasten
hasten()
from bench.__main__ import main
sys.exit(main(['gpu', *sys.argv[1:]]))
"""


def interpreted():
    return {**os.environ, "TRITON_INTERPRET": "1"}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_shot_checks_measures_and_tunes_everything(bench, tmp_path):
    from bench.compile import tune

    path = tmp_path / "new" / "results.jsonl"
    command = [sys.executable, "-c", UNTOUCHED, "--one-shot", "--dry-run", "--results", path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=interpreted(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    by_kind = {}
    for row in read(path):
        assert {"date", "gpu", "git", "versions", "copy_gb_per_s"} <= row.keys()
        by_kind.setdefault(row["kind"], []).append(row)
    assert len(by_kind["device"]) == 1
    assert {row["op"] for row in by_kind["check"]} == set(ATTENTION)
    assert not [row for row in by_kind["check"] if "failed" in row]
    by_operation = {}
    for row in by_kind["time"]:
        by_operation.setdefault(row["op"], {})[row["impl"]] = row
        assert {"model", "shape", "dtype"} <= row.keys()
        # Only what a CPU does not have fails: fused backends, and FlexAttention's backward pass.
        assert "failed" not in row or "No viable backend" in row["failed"] or "backward on CPU" in row["failed"], row
    assert set(by_operation) == set(OPERATIONS)
    for operation, impls in by_operation.items():
        ours = impls[bench.contest.OURS]
        assert "failed" not in ours and ours["launches"], operation
        assert ours["p20"] <= ours["p50"] <= ours["p80"]
        assert "failed" not in impls["eager"], operation
    for operation in ("biased_attention", "regulated_attention"):
        assert {"SDPA math, mask", "SDPA flash, low rank", "FlexAttention"} <= by_operation[operation].keys()
    for operation in ("regulate", "regulated_layer"):
        assert {"published", "published, no sync", "torch.compile"} <= by_operation[operation].keys()
    assert [row["kernel"] for row in by_kind["tuned"]] == list(tune.FIRST)[:2]
    assert not [row for row in by_kind["tuned"] if "failed" in row]
    assert json.loads((path.parent / "none-dry-run.json").read_text())["gpu"] == "none (dry run)"
    stages = [row["stage"] for row in by_kind["stage"]]
    assert stages[:4] == ["device", "checks", "times", "tuning"] and stages[-3:] == [
        "compiled rivals",
        "memory",
        "further",
    ]
    for row in by_kind["stage"]:
        assert row["done"] == row["planned"], row
    right = f"{len(ATTENTION)} of {len(ATTENTION)} checks right"
    assert right in done.stdout and f"results: {path}" in done.stdout


def test_what_the_time_does_not_reach_is_named(bench, monkeypatch, tmp_path, capsys):
    real = bench.stages.run

    def run(items, *rest):
        known = all(item.row["kind"] == "device" for item in items)
        return real(items, *rest) if known else bench.stages.Outcome(list(items), 0.0, 0)

    monkeypatch.setattr(bench.stages, "run", run)
    path = tmp_path / "results.jsonl"
    assert dry_run_here(bench, "--one-shot", "--only", "gaussian_bias", "--results", path) == 0
    assert "not reached: checks: attention Case(m=16" in capsys.readouterr().out
    assert {row["stage"]: row["done"] for row in read(path) if row["kind"] == "stage"} == {
        **dict.fromkeys(("checks", "times", "tuning", "compiled rivals", "memory", "further"), 0),
        "device": 1,
    }


def test_a_gpu_that_starts_slowly_is_waited_for(bench, monkeypatch):
    ends = []

    def run(items, until, write, check):
        ends.append(until - program.start)
        assert all(item.seconds < ends[-1] for item in items), "so that a row says that it took too long"
        return bench.stages.Outcome([], 1.0, 0)

    monkeypatch.setattr(bench.stages, "run", run)
    given = {"dry_run": True, "only": "", "cache": None, "results": None, "commit": None, "seconds": 99.0}
    program = bench.Program(argparse.Namespace(**given))
    assert not program.device()
    program.stage("next", 30, [])
    assert ends == [pytest.approx(60), pytest.approx(50)]


def test_without_a_gpu_the_exit_status_says_so(bench, monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu", "--dry-run", "--only", "regullate"]) == 2
    assert "is in the name of no operation" in capsys.readouterr().err
    assert main(["gpu", "--one-shot"]) == 2
    assert "TRITON_INTERPRET=1 goes with it alone" in capsys.readouterr().err
    monkeypatch.setattr(bench._launch, "INTERPRETED", False)
    assert main(["gpu", "--one-shot", "--results", str(tmp_path / "results.jsonl")]) == 2
    assert "no GPU that PyTorch sees" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_killed_keeps_its_rows(tmp_path, number, status):
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--results", str(path)]
    with subprocess.Popen(command, cwd=ROOT, env=interpreted(), stdout=subprocess.PIPE, text=True) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("attention_all"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
    assert process.returncode == status
    rows = read(path)
    assert {"attention", "attention_all"} <= {row["op"] for row in rows if row["kind"] == "time"}
    assert len(rows) >= len(printed)
    if number == signal.SIGTERM:
        assert f"results: {path}" in rest


def test_a_kernel_that_is_wrong_fails_its_check_and_no_other(bench, monkeypatch, tmp_path):
    right = kernel_cases.run_triton

    def run_triton(name, case, t, *how):
        if name == "attention":
            os.kill(os.getpid(), signal.SIGKILL)
        outputs = right(name, case, t, *how)
        return {**outputs, "out": 2 * outputs["out"]} if name == "region_attention" else outputs

    monkeypatch.setattr(kernel_cases, "run_triton", run_triton)
    path = tmp_path / "results.jsonl"
    assert dry_run_here(bench, "--one-shot", "--only", "gaussian_bias", "--results", path) == 1
    rows = read(path)
    failed = {row["op"]: row["failed"] for row in rows if row["kind"] == "check" and "failed" in row}
    assert failed["attention"] == "its process ended by signal 9" and "AssertionError" in failed["region_attention"]
    assert len(failed) == 2
    timed = [row["impl"] for row in rows if row["kind"] == "time" and row["op"] == "gaussian_bias"]
    assert timed[0] == "triton"


def test_the_aims_come_first_and_everything_comes_once(bench):
    from bench.gpu import plan

    first, rest = plan.tasks()
    assert len({*first, *rest}) == len(first) + len(rest)
    assert [(t.operation, t.layer) for t in first[:4]] == [
        (operation, layer) for operation in ("regulate", "regulated_layer") for layer in (plan.SMALL, plan.LARGE)
    ]
    assert (plan.SMALL.heads, plan.SMALL.image_tokens) == (20, 256)
    assert (plan.LARGE.heads, plan.LARGE.image_tokens) == (20, 1024)
    attention = {(t.layer.model, t.layer.grid) for t in first if t.operation == "attention" and t.layer.batch == 2}
    assert attention == {(layer.model, layer.grid) for layer in plan.LAYERS}
    assert {t.operation for t in first} == set(OPERATIONS)
    assert all(t.compiled for t in plan.rivals()) and plan.rivals()[0].operation == "regulated_layer"
    for part in (first, plan.rivals()):
        (region,) = [t.layer for t in part if t.operation == "region_attention" and t.layer.tokens == 4096]
        assert region.image_tokens == 4096


def test_checks_cover_every_size_and_start_with_gradients(bench):
    module = bench.children.correctness
    names = set(JUDGED)
    first, further = module.first_checks(), module.further_checks()
    backward = [check for check in first if check.backward]
    assert first[: len(backward)] == backward
    assert [check.case.m for check in backward] == sorted(check.case.m for check in backward)
    assert {(c.name, c.case.m) for c in backward} == set(itertools.product(names, module.IMAGE_TOKENS))
    assert {(c.name, c.case.dtype) for c in first} == set(itertools.product(names, module.DTYPES))
    attention = [c for c in (*first, *further) if c.backward and c.name in ATTENTION]
    for values, of in ((module.TOKENS, "n"), (module.WIDTHS, "d"), (module.DTYPES, "dtype")):
        assert {(c.name, getattr(c.case, of)) for c in attention} == set(itertools.product(ATTENTION, values))
    assert {c.name for c in module.sanitized()} <= names and len(module.sanitized()) == module.SANITIZED


@pytest.mark.parametrize(
    ("installed", "stale", "compiled", "needed"),
    [(9, 0, 0, False), (9, 1, 0, True), (9, 0, 1, True), (None, 0, 2, True)],
)
def test_what_did_not_travel_is_compiled_by_all_cores(bench, monkeypatch, tmp_path, installed, stale, compiled, needed):
    folder = tmp_path / ("kernels" if installed else "nowhere")
    (tmp_path / "kernels").mkdir()
    made = []

    def run(items, until, write, check):
        for item in items:
            function = getattr(item.run, "func", item.run)
            made.append(function)
            if function is bench.children.install:
                write({"kind": "cache", "installed": installed, "stale": stale, "launchers": 3})
        return bench.stages.Outcome([], 1.0, compiled if bench.children.prove in made else 0)

    monkeypatch.setattr(bench.stages, "run", run)
    given = {"dry_run": False, "only": "", "cache": folder, "results": None, "commit": None, "seconds": 99.0}
    program = bench.Program(argparse.Namespace(**given))
    program.about = {"gpu": "NVIDIA H200"}
    program.log.rows.append({"kind": "device", "target": ("cuda", 90, 32)})
    program.kernels()
    expected = [*([bench.children.install] if installed else []), bench.children.prove]
    assert made == [*expected, *([bench.children.compile_all] if needed else [])]


def test_memory_errors_are_rows_of_their_cases(bench, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    said = ["========= COMPUTE-SANITIZER", "case attention", "case region_attention"]
    said += ["========= Invalid __global__ read of size 4 bytes", "=========     at kernel+0x10", "case gaussian_bias"]
    tool.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    rows = []
    bench.children.sanitize(rows.append)
    assert rows == [
        {"kind": "memory", "op": "attention"},
        {"kind": "memory", "op": "region_attention", "failed": "Invalid __global__ read of size 4 bytes"},
        {"kind": "memory", "op": "gaussian_bias"},
    ]


def test_a_contender_that_is_wrong_or_fails_is_not_timed(bench, monkeypatch):
    from bench.ops.base import Comparison, Contender, Judge

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
    made = Comparison(contenders, Judge(lambda r: (r,), (x.double(),), 1e-3), 16, 8)
    monkeypatch.setattr(bench.contest, "comparison", lambda *_: made)
    clock = bench.children.Clock(torch.device("cpu"))
    records = {
        r["impl"]: r for r in bench.contest.measure(bench.Task("op", bench.children.TINY, torch.float32), clock, 1e9)
    }
    assert [name for name, r in records.items() if "p50" in r] == ["triton", "other"]
    assert "allowed 0.001" in records["off"]["failed"] and "nan" in records["nan"]["failed"]
    assert records["broken"]["failed"] == "RuntimeError: no such backend"
    assert records["triton"]["max_error"] == 0 and (records["triton"]["bytes"], records["triton"]["flops"]) == (16, 8)


def test_a_contender_that_breaks_the_context_ends_the_comparison(bench, monkeypatch):
    from bench.ops.base import Comparison, Contender, Judge

    def broken():
        raise RuntimeError("an illegal memory access")

    made = Comparison({"triton": Contender(lambda: broken)}, Judge(tuple, (), 0.0), 0, 0)
    monkeypatch.setattr(bench.contest, "comparison", lambda *_: made)
    clock = bench.children.Clock(torch.device("cpu"))
    monkeypatch.setattr(clock, "synchronise", broken)
    with pytest.raises(RuntimeError, match="triton broke the GPU's context: RuntimeError: an illegal memory access"):
        bench.contest.measure(bench.Task("op", bench.children.TINY, torch.float32), clock, 1e9)


def record(op, layer, impl, p50, graph=None):
    times = None if graph is None else {"p50": graph}
    where = {"kind": "time", "op": op, "model": layer.model, "shape": layer.sizes, "dtype": "float16", "impl": impl}
    return {**where, "p50": p50, "graph": times}


def test_aims_are_judged(bench):
    contest = bench.contest
    layer = contest.LAYERS[0]._replace(batch=2)
    records = [
        record("attention", layer, "triton", 30.0, 10.0),
        record("attention", layer, "SDPA flash", 20.0, 11.0),
        record("attention", layer, "SDPA math", 9.0),
        record("regulate", contest.SMALL, "triton", 80.0, 59.0),
        record("regulate", contest.LARGE, "triton", 210.0, 201.0),
        record("regulated_layer", contest.SMALL, "triton", 150.0, 90.0),
        record("regulated_layer", contest.SMALL, "plain layer", 20.0, 10.0),
        record("regulated_layer", contest.SMALL, "published", 15000.0),
        record("regulated_layer", contest.SMALL, "eager", 3000.0, 700.0),
        record("regulated_layer", contest.SMALL, "torch.compile", 2000.0, 400.0),
    ]
    lines = list(contest.aims(records))
    assert [text.partition(":")[0] for text in lines] == ["MISSED", "met", "MISSED", "MISSED", "met", "met", "MISSED"]
    assert "10.0 us, SDPA math 9.0 us" in lines[0]
    assert "130.0 us over a plain one" in lines[3] and "80.0 us over a plain one" in lines[4]
    assert "100 times faster" in lines[5] and "4.4 times faster than stock PyTorch (torch.compile)" in lines[6]
    assert list(contest.aims([])) == []


def test_tuner_dry_run_writes_a_table(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert main(["tune", "--dry-run", "--only", "gaussian_bias", "--output", str(path)]) == 0
    table = json.loads(path.read_text())
    assert table["margin"] == 0.05 and set(table["rules"]) <= {"gaussian_bias_fwd", "gaussian_bias_bwd"}
    said = capsys.readouterr().out
    assert said.count("gaussian_bias_fwd tiny") == said.count("gaussian_bias_bwd tiny") == 1, said
    assert "failed" not in said


def test_tuner_knows_every_kernel_and_setting(bench):
    from bench.compile import tune

    table = bench._launch.read_table("default")
    assert set(tune.JUDGED_BY) == set(table) > set(tune.FIRST)
    used = [rule["use"] for rules in table.values() for rule in rules]
    for amd in (False, True):
        assert {name for use in used for name in bench._launch.compiled_with(use, amd)} <= set(tune.VALUES)
    assert {name for names in tune.JUDGED_BY.values() for name in names} <= set(OPERATIONS)


def test_a_configuration_that_no_rule_can_give_is_a_row(bench, tmp_path):
    given = {"dry_run": True, "only": "", "cache": tmp_path, "results": tmp_path / "r.jsonl", "commit": None}
    program = bench.Program(argparse.Namespace(**given, seconds=9.0))
    program.about = {"gpu": "NVIDIA H200"}
    row = {"kind": "tuned", "kernel": "regulate_fwd", "sizes": {"cells": 256, "targets": 2}, "ratio": 0.5}
    for warps in (2, 16):
        program.write({**row, "config": {"num_warps": warps}})
    assert [x for x in program.log.rows if "failed" in x][0]["failed"].startswith(
        "ValueError: the sizes cannot be told"
    )
    rules = json.loads((tmp_path / "nvidia-h200.json").read_text())["rules"]["regulate_fwd"]
    assert rules[0]["use"] == {"num_warps": 2}


def test_rules_give_every_size_its_configuration(bench):
    from bench.compile import tune

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
    from bench.compile import tune

    speed = {4: 100.0, 8: 90.0, 2: 80.0}
    tuner = object.__new__(tune.Tuner)
    tuner.clock, tuner.kernel, tuner.sizes = bench.children.Clock(torch.device("cpu")), "k", {"m": 64}
    tuner.default = {"num_warps": 4, "num_stages": 1}

    def times(configs):
        return [speed.get(c["num_warps"], float("inf")) - 3 * (c["num_stages"] == 2) for c in configs]

    monkeypatch.setattr(tuner, "_times", times)
    assert tuner.search() == tune.Found({"m": 64}, {"num_warps": 2, "num_stages": 2}, 0.77)
    speed.update({8: 99.0, 2: 101.0})
    assert tuner.search() == tune.Found({"m": 64}, tuner.default, 1.0)


def test_tuner_leaves_out_what_does_not_compile(bench, monkeypatch):
    from bench.compile import tune

    tuner = object.__new__(tune.Tuner)
    tuner.clock, tuner.kernel, tuner.sizes = SimpleNamespace(on_gpu=True), "k", {"m": 64}
    tuner.default = {"num_warps": 4, "num_stages": 1}
    timed = []

    def compiled(configs):
        return [x for x in configs if x["num_warps"] != 2 and x != {"num_warps": 8, "num_stages": 2}]

    def times(configs):
        timed.extend(configs)
        return [100.0 / c["num_warps"] - c["num_stages"] for c in configs]

    monkeypatch.setattr(tuner, "_compiled", compiled)
    monkeypatch.setattr(tuner, "_times", times)
    assert tuner.search(5).config == {"num_warps": 8, "num_stages": 3}
    assert timed == [x for x in timed if x in compiled(timed)] and len(timed) > 4
