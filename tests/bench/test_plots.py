"""The pictures of the measurements: on rows that are made up, and those of the repository against its result files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]
Run = Callable[..., int]
GPU = "a GPU"
COMMON: Row = {"git": "0123456789ab", "dirty": False, "device": GPU, "threads": 2, "run": "2026-01-01T00:00:00"}
COMMON["versions"] = {"attnctl-fast": "0.1.0", "torch": "2.13.0", "triton": "3.7.1", "diffusers": "0.42.1", "gpus": GPU}
SETTING: Row = {"kind": "overhead of a step", "arch": "sd15", "size": 512, "dtype": "float16"}
SETTING |= {"batch": 1, "compile": False, "still": False}
PAPER = {"published_percent": 414.6, "source": "arXiv 1, Table 1: an A4000"}
MISSING = {"published_percent": None, "source": None}


def interval(middle: float, low: float, high: float) -> Row:
    return {"low": low, "middle": middle, "high": high}


def overhead(method: str, form: str, percent: float, **other: Any) -> Row:
    row = {**COMMON, **SETTING, "method": method, "form": form, "difference": None, **MISSING}
    row |= {"percent": interval(percent, percent - 1, percent + 2), "step": interval(percent / 10, 0, 0)}
    return {**row, "image": interval(percent / 2, 0, 0), **other}


def failed(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("percent", "step", "image", "median", "q1", "q3")} | {
        "failed": "MemoryError: no"
    }


def operation(op: str, impl: str, tokens: int, median: float, **other: Any) -> Row:
    row = {**COMMON, "device": "a CPU", "op": op, "model": "SD 1.5", "dtype": "float32", "impl": impl}
    row |= {"shape": f"B1 H8 M{tokens} N77 d40 T2", "bytes": 1000 * tokens, "flops": 40_000 * tokens}
    return {**row, "median": median, "q1": 0.9 * median, "q3": 1.2 * median, **other}


def kernel(op: str, impl: str, tokens: int, p50: float) -> Row:
    row = operation(op, impl, tokens, 0.0) | {"gpu": GPU, "date": "2026-01-01T00:00:00", "copy_gb_per_s": 1000.0}
    times = {"p20": 0.9 * p50, "p50": p50, "p80": 1.3 * p50}
    row |= {"kind": "time", **times, "cold": {name: 2 * value for name, value in times.items()}}
    return {k: v for k, v in row.items() if k not in ("device", "run", "dirty", "threads", "median", "q1", "q3")}


OVERHEAD = [
    overhead("plain", "plain", 0.0),
    overhead("AttendAndExcite", "published", 200.0, **PAPER),
    overhead("AttendAndExcite", "ours", 20.0, **PAPER),
    overhead("TSAM", "ours", -0.4),
    failed(overhead("TSAM", "published", 300.0)),
]
OPERATIONS = [
    *(operation("attention", "eager", tokens, tokens / 100) for tokens in (64, 256)),
    *(operation("attention", "SDPA flash", tokens, tokens / 128) for tokens in (64, 256)),
    *(operation("attention", "SDPA math", tokens, tokens / 64) for tokens in (64, 256)),
    *(operation("attention", "published", tokens, tokens / 10) for tokens in (64, 256)),
    operation("attention", "plain attention", 64, 0.001),
    failed(operation("regulate", "eager", 64, 1.0)),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    from bench.report import plots

    yield plots


@pytest.fixture
def run(bench: ModuleType, tmp_path: Path) -> Run:
    """`bench plot` on files of rows in a folder of its own; the pictures go to its folder `img`."""
    from bench import __main__ as run

    def plot(*options: str, **files: list[Row]) -> int:
        (tmp_path / "results").mkdir(exist_ok=True)
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "results" / f"{name}.jsonl").write_text(text)
        given = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "img")]
        return run.main(["plot", *given, *options])

    return plot


def figure(bench: ModuleType, name: str, overhead: list[Row], operations: list[Row]) -> Any:
    return bench.figure(name, bench.PICTURES[name].select(bench.Results(overhead, operations)))


def texts(figure: Any) -> str:
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def drawn(axes: Any) -> dict[str, list[list[float]]]:
    """x, y, and the lower and upper ends of the error bars, of every line that has a label."""
    found = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, _, (bars,) = container.lines
            ends = [[segment[end][1] for segment in bars.get_segments()] for end in (0, 1)]
            found[container.get_label()] = [list(line.get_xdata()), list(line.get_ydata()), *ends]
    return found


def test_overhead_bars_are_those_of_the_rows(bench: ModuleType) -> None:
    made = figure(bench, "overhead", OVERHEAD, [])
    (axes,) = made.axes
    bars = [(c.get_label(), c.patches[0].get_width()) for c in axes.containers if hasattr(c, "patches")]
    assert bars == [("published", 200.0), ("ours", 20.0), ("ours", -0.4)]
    papers = [list(line.get_xdata()) for line in axes.lines if line.get_label() == "paper"]
    assert papers == [[414.6]]
    assert [text.get_text() for text in axes.texts] == [
        "+200 %   +20 s a step, +100 s a picture",
        "+20 %   +2.0 s a step, +10 s a picture",
        "+415 %",
        "not distinguishable from zero",
    ]
    hollow = [(c.get_label(), c.patches[0].get_hatch()) for c in axes.containers if hasattr(c, "patches")]
    assert hollow == [("published", None), ("ours", None), ("ours", "////")]
    spreads = [c.lines[2][0].get_segments()[0] for c in axes.containers if isinstance(c, ErrorbarContainer)]
    assert [(segment[0][0], segment[1][0]) for segment in spreads] == [(199, 202), (19, 22), (-1.4, 1.6)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AttendAndExcite", "TSAM"]
    said = texts(made)
    assert "SD 1.5, 512 px, float16, batch 1" in said
    assert "a GPU; attnctl-fast 0.1.0, torch 2.13.0, triton 3.7.1, diffusers 0.42.1; commit 0123456789ab" in said
    assert "arXiv 1, Table 1: an A4000. Another machine" in said
    assert "Failed and left out: TSAM, published (MemoryError)." in said


def test_overhead_is_of_one_run(bench: ModuleType) -> None:
    newer = [{**row, "run": "2026-02-01T00:00:00", "dirty": True} for row in OVERHEAD]
    newer[3]["percent"] = interval(5.0, 4.0, 6.0)
    partial = overhead("TSAM", "ours", 7.0, run="2026-03-01T00:00:00")
    made = figure(bench, "overhead", [*newer, *OVERHEAD, partial], [])
    assert [text.get_text() for text in made.axes[0].texts][-1].startswith("+5.0 %")
    assert "commit 0123456789ab with changes" in texts(made)


def test_time_against_tokens_is_that_of_the_best_rival(bench: ModuleType) -> None:
    made = figure(bench, "time_against_tokens", [], OPERATIONS)
    (axes,) = made.axes
    assert axes.get_title() == "attention\nSD 1.5"
    found = drawn(axes)
    assert {form: values[:2] for form, values in found.items()} == {
        "published": [[64, 256], [6.4, 25.6]],
        "stock": [[64, 256], [0.5, 2.0]],
        "ours": [[64, 256], [0.64, 2.56]],
    }
    assert found["stock"][2:] == [pytest.approx([0.45, 1.8]), pytest.approx([0.6, 2.4])]
    assert axes.get_ylabel() == "time per call, ms"
    assert "Stock PyTorch's best at each point, of: SDPA flash." in texts(made)
    assert "Failed and left out: regulate, eager (MemoryError) at B1 H8 M64 N77 d40 T2." in texts(made)


def test_an_older_run_does_not_win_for_being_faster(bench: ModuleType) -> None:
    later = {"run": "2026-02-01T00:00:00", "threads": 1, "median": 9.0, "q1": 9.0, "q3": 9.0}
    newer = [{**row, **later} for row in OPERATIONS if "failed" not in row]
    again = [{**row, "threads": 2, "median": 8.0, "q1": 8.0} for row in newer if row["impl"] == "eager"]
    made = figure(bench, "time_against_tokens", [], OPERATIONS + newer + again)
    found = drawn(made.axes[0])
    assert found["ours"][1] == [8.0, 8.0]
    assert found["stock"][1] == [9.0, 9.0]
    assert "a CPU (1 or 2 threads)" in texts(made)


def test_a_gpu_goes_before_a_cpu_and_its_kernels_are_ours(bench: ModuleType) -> None:
    rows = [kernel("attention", impl, tokens, tokens / 8) for impl in ("triton", "eager") for tokens in (64, 256)]
    made = figure(bench, "time_against_tokens", [], rows + OPERATIONS)
    assert set(drawn(made.axes[0])) == {"stock", "ours"}
    assert drawn(made.axes[0])["ours"][:2] == [[64, 256], [8.0, 32.0]]
    assert made.axes[0].get_ylabel() == "time per call, us"
    assert "20th and 80th percentile" in texts(made)


def test_time_against_batch_is_that_of_operations(bench: ModuleType) -> None:
    rows = [operation("attention", "eager", 64, b, shape=f"B{b} H8 M64 N77 d40 T2") for b in (1, 4)]
    made = figure(bench, "time_against_batch", OVERHEAD, rows)
    assert drawn(made.axes[0])["ours"][:2] == [[1, 4], [1.0, 4.0]]


def test_roofline_against_the_copy_bandwidth(bench: ModuleType) -> None:
    rows = [kernel("attention", "triton", tokens, 1.0) for tokens in (64, 256)]
    rows += [kernel("attention", "SDPA flash", 256, 2.0), {**kernel("smooth", "triton", 64, 0.1), "flops": 0}]
    made = figure(bench, "roofline", [], rows)
    points, bars = made.axes
    lines = {line.get_label(): line for line in points.lines}
    # 40 FLOP per byte; 64 * 40000 FLOP in the 2 us of a cold call.
    assert list(lines["ours"].get_xdata()) == [40.0, 40.0]
    assert list(lines["ours"].get_ydata()) == pytest.approx([1280.0, 5120.0])
    x, y = lines["roof"].get_data()
    assert y == pytest.approx([1000 * value for value in x])
    shares = [(c.get_label(), c.patches[0].get_width()) for c in bars.containers]
    assert shares == [("ours", pytest.approx(12.8)), ("stock", pytest.approx(6.4)), ("ours", pytest.approx(32.0))]
    assert "a copy, 1000 GB/s" in texts(made)


def test_without_a_copy_there_is_no_roof(bench: ModuleType) -> None:
    select = bench.PICTURES["roofline"].select
    assert select(bench.Results([], OPERATIONS)) == []
    measured = [{**row, "copy_gb_per_s": 10.0} for row in OPERATIONS]
    assert select(bench.Results([], measured)) == measured
    assert "Failed and left out: regulate, eager (MemoryError)" in texts(figure(bench, "roofline", [], measured))


def test_plot_writes_what_there_is_and_says_what_is_missing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(overhead=OVERHEAD, cpu_other=[{"shapes": []}]) == 0
    assert [path.name for path in (tmp_path / "img").iterdir()] == ["overhead.png"]
    said = capsys.readouterr().out
    assert "no roofline.png, as its data is missing; run: attnctl-fast bench ops" in said
    picture = tmp_path / "img" / "overhead.png"
    before = picture.read_bytes()
    assert b"Software" not in before
    assert run("--only", "overhead") == 0
    assert picture.read_bytes() == before


def test_check_finds_a_picture_of_other_rows(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check", overhead=OVERHEAD) == 0
    assert not (tmp_path / "img").exists()
    assert run() == 0
    assert run("--check") == 0
    assert run("--check", overhead=[*OVERHEAD, overhead("TSAM", "stock", 50.0)]) == 1
    assert (
        "overhead.png is not of the rows in the result files; run: attnctl-fast bench plot" in capsys.readouterr().err
    )
    assert run("--check", overhead=[]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "bars"], "--only is 'bars'; it must be one of overhead, "),
        (["--out", "{file}/img"], "--out is {file}/img, which cannot be written: Not a directory; name another folder"),
        (["--results", "{file}"], "--results is {file}, which is no folder"),
    ],
)
def test_mistakes_are_named(
    options: list[str], message: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(*(option.format(file=file) for option in options), overhead=OVERHEAD) == 2
    assert message.format(file=file) in capsys.readouterr().err
    assert not (tmp_path / "img").exists()


def test_nothing_to_draw_is_a_mistake(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(overhead=[failed(row) for row in OVERHEAD]) == 2
    assert "holds nothing that can be drawn; run: attnctl-fast bench overhead" in capsys.readouterr().err
    (tmp_path / "results" / "overhead.jsonl").write_text('{"kind": "over')
    assert run() == 2
    assert "holds nothing that can be drawn" in capsys.readouterr().err


def test_a_row_that_a_kill_cut_off_costs_no_other(bench: ModuleType, tmp_path: Path) -> None:
    from bench.harness import rows

    path = tmp_path / "some.jsonl"
    rows.Log(path, {"run": "1"}).write({"op": "a"})
    with path.open("a") as file:
        file.write('{"run": "1", "op"')
    rows.Log(path, {"run": "2"}).write({"op": "b"})
    assert [row["op"] for row in rows.read(path)] == ["a", "b"]


def test_pictures_of_the_repository_are_of_its_result_files(bench: ModuleType) -> None:
    from bench import __main__ as run

    assert run.main(["plot", "--check"]) == 0, "run: attnctl-fast bench plot"
