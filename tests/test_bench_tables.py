"""The tables that are made of measurements and of compiled kernels."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tables

    yield tables
    sys.modules.pop("tables")


SETTINGS = {
    "date": "2026-01-02T03:04:05",
    "gpu": "NVIDIA H200",
    "git": "abc",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "copy_gb_per_s": 4000.4,
}


def line(op, impl, p50, graph=None, **more):
    times = {"p20": p50 - 1, "p50": p50, "p80": p50 + 1}
    graph = graph and {"p20": graph, "p50": graph, "p80": graph}
    where = {"op": op, "model": "SD 2", "shape": "B1 H20 M256", "dtype": "float16", "impl": impl}
    return {**SETTINGS, **where, **times, "graph": graph, **more}


def write(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


def test_without_a_gpu_the_table_holds_no_number(tables, tmp_path):
    write(tmp_path / "shapes_rates.jsonl", [{"plain": 1}])
    text = tables.gpu_table(tmp_path)
    assert not any(c.isdigit() for c in text) and "|" not in text and "bench/gpu.py" in text


def test_the_last_run_on_a_gpu_is_shown(tables, tmp_path):
    old = line("regulate", "triton", 1000.0) | {"date": "2025-01-01"}
    outcome = {**SETTINGS, "op": "correctness", "planned": 9, "done": 8, "failures": ["x"]}
    lines = [
        old,
        outcome,
        line("regulate", "triton", 80.0, 40.0),
        line("regulate", "eager", 3000.0),
        line("regulate", "torch.compile", 2000.0, 400.0),
        line("regulate", "published", 16000.0),
        line("gaussian_bias", "triton", 8.0),
        {**SETTINGS, "op": "attention", "impl": "triton", "dtype": "float16", "failed": "RuntimeError"},
        line("regulate", "triton", 5.0) | {"dtype": "bfloat16"},
    ]
    write(tmp_path / "nvidia-h200.jsonl", lines)
    shown = tables.gpu_table(tmp_path).splitlines()
    assert len({x.count("|") for x in shown if x.startswith("|")}) == 1
    assert shown[2] == (
        "| `regulate` | SD 2 B1 H20 M256 | 40 (40 to 40) | 80 (79 to 81) | 400 (400 to 400) torch.compile | 10.0 "
        "| 1.6e+04 (1.6e+04 to 1.6e+04) | 200 |"
    )
    assert shown[3] == "| `gaussian_bias` | SD 2 B1 H20 M256 | 8 (7 to 9) | 8 (7 to 9) |  |  |  |  |"
    assert shown[5].startswith("NVIDIA H200, float16") and "7 of 8 checks right" in shown[5] and "4000 GB/s" in shown[5]


def test_context_operations_against_their_rivals(tables):
    def times(median):
        return {"q1": median - 1, "median": median, "q3": median + 1, "threads": 2}

    layer = {"model": "SD 2", "heads": 20, "image_tokens": 256, "head_width": 64}
    gradient = {
        "operation": "attention_with_context_gradient",
        **{"sdpa": times(30.0), "published": times(40.0), "eager": times(20.0)},
        "ratios": {"sdpa": 1.5, "published": 2.0},
    }
    composed = {"operation": "composed_attention", "sdpa": times(9.0), "eager": times(9.0), "ratios": {"sdpa": 1.0}}
    run = {"shapes": [layer | gradient, layer | composed], "versions": {"torch": "2.13.0", "processor": "a CPU"}}
    shown = tables.context_table(run).splitlines()
    assert len({x.count("|") for x in shown if x.startswith("|")}) == 1
    assert shown[2] == (
        "| `attention_with_context_gradient` | SD 2 | 20 | 256 | 64 | 30 (29 to 31) | 40 (39 to 41) | 20 (19 to 21) "
        "| 1.50 | 2.00 |"
    )
    assert shown[3] == "| `composed_attention` | SD 2 | 20 | 256 | 64 | 9 (8 to 10) |  | 9 (8 to 10) | 1.00 |  |"
    assert shown[5].endswith("torch 2.13.0, a CPU.")


def test_maps_against_their_rivals(tables):
    times = {"q1": 9.0, "median": 10.0, "q3": 11.0, "threads": 2}
    layer = {"image_tokens": 256, "head_width": 160, "maps": 2, "published": times, "one_hot": times, "eager": times}
    run = {"shapes": [layer | {"ratios": {"published": 1.0, "one_hot": 1.0}}]}
    shown = tables.maps_table(run | {"versions": {"torch": "2.13.0", "processor": "a CPU"}}).splitlines()
    assert len({x.count("|") for x in shown if x.startswith("|")}) == 1
    assert shown[2] == "| 256 | 160 | 2 | 10 (9 to 11) | 10 (9 to 11) | 10 (9 to 11) | 1.0 | 1.0 |"
    assert shown[4].endswith("torch 2.13.0, a CPU.")


def test_resources_are_summed_up_by_kernel(tables, tmp_path):
    kernels = {
        target: {"a_fwd: x": ["k", 100, 0, 2048, 8, 512], "a_fwd: y": ["k", 50, 0, 4096, 0, 512]}
        for target in ("sm_80", "gfx942")
    }
    fields = ["key", "registers", "spilled", "shared", "matrix", "code"]
    path = tmp_path / "resources.json"
    path.write_text(json.dumps({"triton": "3.6.0", "fields": fields, "kernels": kernels}))
    assert tables.resources_table(path).splitlines() == [
        "| kernel | variants | sm_80 | gfx942 |",
        "| --- | ---: | ---: | ---: |",
        "| `a_fwd` | 2 | 100, 4, 0 | 100, 4, 0 |",
        "",
        "Registers per thread, KiB of shared memory, bytes spilled; Triton 3.6.0.",
    ]


def test_pages_show_what_the_result_files_hold(tables):
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.fill(text) == text, "run python bench/tables.py"
    assert "<!-- table:gpu -->" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:resources -->" in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
