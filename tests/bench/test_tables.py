"""The tables that are made of measurements and of compiled kernels."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch):
    from bench.report import tables

    yield tables


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
    where = {"kind": "time", "op": op, "model": "SD 2", "shape": "B1 H20 M256", "dtype": "float16", "impl": impl}
    return {**SETTINGS, **where, **times, "graph": graph, **more}


def write(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


def test_without_a_gpu_the_table_holds_no_number(tables, tmp_path):
    write(tmp_path / "shapes_rates.jsonl", [{"plain": 1}])
    text = tables.gpu_table(tmp_path)
    assert not any(c.isdigit() for c in text) and "|" not in text and "bench gpu" in text


def test_the_last_run_on_a_gpu_is_shown(tables, tmp_path):
    old = line("regulate", "triton", 1000.0) | {"date": "2025-01-01"}
    check = {**SETTINGS, "kind": "check", "op": "regulate", "case": "Case(m=1)", "backward": True}
    lines = [
        old,
        {**SETTINGS, "kind": "device", "multiprocessors": 132},
        *(check | {"seconds": 0.1} for _ in range(7)),
        check | {"failed": "AssertionError: off"},
        line("regulate", "triton", 99.0, 90.0),
        line("regulate", "eager", 3000.0),
        line("regulate", "torch.compile", 2000.0, 400.0),
        line("regulate", "published", 16000.0),
        line("gaussian_bias", "triton", 8.0),
        {**SETTINGS, "kind": "time", "op": "attention", "impl": "triton", "dtype": "float16", "failed": "RuntimeError"},
        {**SETTINGS, "kind": "tuned", "kernel": "regulate_fwd", "ratio": 0.9},
        line("regulate", "triton", 80.0, 40.0),
        {**SETTINGS, "kind": "stage", "stage": "tuning", "done": 1, "planned": 1},
        line("regulate", "triton", 5.0) | {"dtype": "bfloat16"},
        # A later run that timed nothing, and a row that was cut off.
        {**SETTINGS, "kind": "device", "date": "2026-02-02"},
    ]
    write(tmp_path / "nvidia-h200.jsonl", lines)
    with (tmp_path / "nvidia-h200.jsonl").open("a") as file:
        file.write('{"date": "2026-03')
    shown = tables.gpu_table(tmp_path).splitlines()
    assert len({x.count("|") for x in shown if x.startswith("|")}) == 1
    assert shown[2] == (
        "| `regulate` | SD 2 B1 H20 M256 | 40 (40 to 40) | 80 (79 to 81) | 400 (400 to 400) torch.compile | 10.0 "
        "| 1.6e+04 (1.6e+04 to 1.6e+04) | 200 |"
    )
    assert shown[3] == "| `gaussian_bias` | SD 2 B1 H20 M256 | 8 (7 to 9) | 8 (7 to 9) |  |  |  |  |"
    assert shown[5].startswith("NVIDIA H200, float16") and "7 of 8 checks right" in shown[5] and "4000 GB/s" in shown[5]


def form(op, impl, median, **more):
    times = {"q1": median - 1, "median": median, "q3": median + 1, "threads": 2}
    where = {"op": op, "model": "SD 2", "shape": "B1 H20", "dtype": "float32", "impl": impl}
    run = {"run": "2026-01-02T03:04:05", "git": "abc", "dirty": False, "device": "a CPU", "quick": False}
    return {**run, "versions": {"torch": "2.13.0"}, **where, **times, **more}


def test_operations_against_their_rivals(tables, tmp_path):
    path = tmp_path / "ops.jsonl"
    failed = {name: value for name, value in form("regulated_layer", "torch.compile", 1.0).items() if name != "median"}
    lines = [
        form("regulated_layer", "eager", 20.0),
        form("regulated_layer", "published", 200.0),
        form("regulated_layer", "published, no sync", 10.0),
        form("regulated_layer", "closed form", 30.0),
        form("regulated_layer", "another", 25.0),
        form("regulated_layer", "plain layer", 2.0),
        {**failed, "failed": "RuntimeError"},
        form("regulated_layer", "eager", 8.0, dtype="bfloat16"),
        form("gaussian_bias", "two products", 2.0),
        form("gaussian_bias", "eager", 4.0),
        {**form("gaussian_bias", None, 1.0), "impl": None, "op": "attention"},
    ]
    write(path, lines)
    shown = tables.operations_table(path, "regulate").splitlines()
    assert len({x.count("|") for x in shown if x.startswith("|")}) == 1
    assert shown[2:4] == [
        "| `regulated_layer` | SD 2 B1 H20 | 20 (19 to 21) | 25 (24 to 26) another | 1.25 | 200 (199 to 201) | 10.00 |",
        "| `regulated_layer` | SD 2 B1 H20 bfloat16 | 8 (7 to 9) |  |  |  |  |",
    ]
    assert shown[5].endswith("without torch.compile; torch 2.13.0, a CPU, commit abc.")
    others = tables.operations_table(path, None).splitlines()
    assert others[2:4] == ["| `gaussian_bias` | SD 2 B1 H20 | 4 (3 to 5) | 2 (1 to 3) two products | 0.50 |  |  |", ""]


def test_the_host_before_and_now():
    from bench.report.host_table import host_table

    common = {"git": "abc", "device": "a CPU", "versions": {"torch": "2.13.0", "triton": "3.7.1"}}

    def row(run, label, op, impl, median):
        where = {"run": run, "label": label, "op": op, "impl": impl, "shape": "B1 H2", "dtype": "float16"}
        return {**common, **where, "median": median, "q1": median - 1, "q3": median + 1, "launches": 1}

    old = [row("1", "before", "attention", *x) for x in (("SDPA", 10.0), ("eager", 50.0), ("triton", 80.0))]
    new = [row("2", "", "attention", *x) for x in (("SDPA", 10.0), ("eager", 40.0), ("triton", 32.0))]
    earlier = [row("0", label, "attention", "triton", 1.0) for label in ("before", "")]
    failed = {name: x for name, x in row("2", "", "regulate", "triton", 1.0).items() if name != "median"}
    shown = host_table([*earlier, *old, *new, row("2", "", "other", "triton", 2.0), failed]).splitlines()
    assert shown[2:4] == ["| `attention` | 1 | 80 (79 to 81) | 32 (31 to 33) | 2.5 |", ""]
    assert "takes 5.0 times before and 4.0 times now what SDPA takes" in shown[4]


def test_the_newest_run_of_a_case_is_shown(tables, tmp_path):
    path = tmp_path / "ops.jsonl"
    quick = {"quick": True, "run": "2026-01-05", "git": "new", "dirty": True}
    lines = [
        form("similarity_loss", "eager", 2.0),
        form("similarity_loss", "closed form", 3.0),
        form("similarity_loss", "eager", 4.0, run="2026-01-04"),
        form("similarity_loss", "eager", 8.0, **quick),
        form("smooth_maps", "eager", 8.0, **quick),
        form("smooth_maps", "torch.compile", 16.0, **quick),
    ]
    write(path, lines)
    shown = tables.operations_table(path, "similarity").splitlines()
    assert shown[2:4] == ["| `similarity_loss` | SD 2 B1 H20 | 4 (3 to 5) |  |  |  |  |", ""]
    others = tables.operations_table(path, None).splitlines()
    assert "| 16 (15 to 17) torch.compile | 2.00 |" in others[2]
    assert others[4].endswith("with torch.compile; torch 2.13.0, a CPU, commit new-dirty, a quick run.")


def test_nothing_is_written_when_a_table_cannot_be_made(tables, tmp_path, monkeypatch):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- table:one -->\n<!-- /table -->\n")
    bad.write_text("<!-- table:two -->\n<!-- /table -->\n")
    monkeypatch.setattr(tables, "PAGES", (good, bad))
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 1 |"})
    report = tables.parser().parse_args([])
    with pytest.raises(ValueError, match="there is no table 'two'; the tables are one"):
        tables.run(report)
    assert "| 1 |" not in good.read_text()


def test_report_checks_or_writes(tables, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table:one -->\nold\n<!-- /table -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", (page,))
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| 1 |"})
    assert tables.run(tables.parser().parse_args(["--check"])) == 1
    assert "page.md has a table" in capsys.readouterr().err and "old" in page.read_text()
    assert tables.run(tables.parser().parse_args([])) == 0
    assert page.read_text() == "<!-- table:one -->\n| 1 |\n<!-- /table -->\n"
    assert tables.run(tables.parser().parse_args(["--check"])) == 0


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
        assert tables.fill(text) == text, "run python -m bench report"
    assert "<!-- table:speed -->" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:resources -->" in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
