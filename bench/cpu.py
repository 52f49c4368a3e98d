"""Running a file of pytest-benchmark measurements and keeping their result."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import RESULTS, append, git_state

from attnctl_fast._report import versions


def record(
    file: str, name: str, summary: Callable[[dict[str, Any]], list[dict[str, Any]]], table: Callable[[Any], str]
) -> None:
    """Run the measurements in `file`, append what `summary` makes of the report to bench/results/`name`, print it as a
    table.

    Raises:
        SystemExit: a measurement failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest.main([file, "-q", "--no-header", f"--benchmark-json={report}"])
        if code:
            raise SystemExit(code)
        rows = summary(json.loads(report.read_text(encoding="utf-8")))
    run = {"date": time.strftime("%Y-%m-%d"), "git": git_state(), "versions": versions(), "shapes": rows}
    append(RESULTS / name, run)
    print(table(run))


def measure(
    benchmark: Any, run: Callable[[], Any], *, case: tuple[Any, ...], form: str, threads: int, rounds: int
) -> None:
    """One form of a case on so many threads, for `quartiles` to sum up."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        benchmark.extra_info.update(case=tuple(case), form=form, threads=threads)
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
    finally:
        torch.set_num_threads(before)


def quartiles(
    report: dict[str, Any], forms: Mapping[tuple[Any, ...], Sequence[str]]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Every case with its forms' medians and quartiles in ms, over all turns at the better of 1 and 2 threads, and the
    ratios of the medians to eager's."""
    times: dict[tuple[Any, str, int], list[float]] = {}
    for run in report["benchmarks"]:
        info = run["extra_info"]
        key = tuple(info["case"]), info["form"], info["threads"]
        times.setdefault(key, []).extend(1e3 * x for x in run["stats"]["data"])
    for case, names in forms.items():
        row: dict[str, Any] = {}
        for form in names:
            threads = min((1, 2), key=lambda count: statistics.median(times[case, form, count]))
            found = statistics.quantiles(times[case, form, threads], n=4)
            row[form] = dict(zip(("q1", "median", "q3"), found, strict=True)) | {"threads": threads}
        row["ratios"] = {form: row[form]["median"] / row["eager"]["median"] for form in names if form != "eager"}
        yield case, row
