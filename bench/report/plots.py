"""The pictures of docs/img, from the result files.

python -m bench plot              all for which there is data
python -m bench plot --check      change nothing; fail when a picture is not of what the result files hold
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from bench.harness.checkout import RESULTS, ROOT
from bench.harness.rows import Row, read
from bench.pictures.overhead_rows import KIND, select_overhead
from bench.report import plot_operations, plot_overhead
from bench.report.style import STYLE, digest, png, remembered, styled

IMAGES = ROOT / "docs" / "img"


class Results(NamedTuple):
    """The rows of `bench overhead`, and those of `bench ops` and `bench gpu`."""

    overhead: list[Row]
    operations: list[Row]


class Picture(NamedTuple):
    """select: the rows that it shows, none where there are too few; draw: the figure of them; source: what to run where
    there are none."""

    select: Callable[[Results], list[Row]]
    draw: Callable[[Sequence[Row]], Figure]
    source: str


PICTURES = {
    "overhead": Picture(
        lambda results: select_overhead(results.overhead),
        plot_overhead.draw_overhead,
        "attnctl-fast bench overhead",
    ),
    "time_against_tokens": Picture(
        lambda results: plot_operations.select_growth(results.operations, "M"),
        partial(plot_operations.draw_growth, letter="M"),
        "attnctl-fast bench ops",
    ),
    "time_against_batch": Picture(
        lambda results: plot_operations.select_growth(results.operations, "B"),
        partial(plot_operations.draw_growth, letter="B"),
        "attnctl-fast bench ops",
    ),
    "roofline": Picture(
        lambda results: plot_operations.select_roofline(results.operations),
        plot_operations.draw_roofline,
        "attnctl-fast bench ops",
    ),
}


def load(folder: Path) -> Results:
    """The rows that pictures are made of, from every file of the folder.

    Raises:
        OSError: there is no such folder.
    """
    if not folder.is_dir():
        raise OSError(f"--results is {folder}, which is no folder; name the one with the .jsonl files")
    found = Results([], [])
    for path in sorted(folder.glob("*.jsonl")):
        rows = list(read(path))
        found.overhead.extend(row for row in rows if row.get("kind") == KIND)
        found.operations.extend(row for row in rows if _of_an_operation(row, path))
    return found


def _of_an_operation(row: Row, path: Path) -> bool:
    timed = "impl" in row and ("median" in row or "p50" in row)
    return (path.name.startswith("ops_") or row.get("kind") == "time") and "op" in row and (timed or "failed" in row)


def figure(name: str, rows: Sequence[Row]) -> Figure:
    """The picture of rows that its `select` chose."""
    with styled(STYLE):
        return PICTURES[name].draw(rows)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: bench/results")
    made.add_argument("--out", type=Path, default=IMAGES, metavar="DIR", help="default: docs/img")
    made.add_argument("--only", metavar="NAME", help=f"one of {', '.join(PICTURES)}")
    made.add_argument("--check", action="store_true", help="change nothing; fail when a picture is out of date")
    return made


def run(arguments: argparse.Namespace) -> int:
    if arguments.only is not None and arguments.only not in PICTURES:
        raise ValueError(f"--only is {arguments.only!r}; it must be one of {', '.join(PICTURES)}")
    results = load(arguments.results)
    names = [name for name in PICTURES if arguments.only in (None, name)]
    chosen = {name: PICTURES[name].select(results) for name in names}
    if arguments.check:
        return _check(chosen, arguments.out)
    if not any(chosen.values()):
        sources = dict.fromkeys(PICTURES[name].source for name in names)
        raise ValueError(f"{arguments.results} holds nothing that can be drawn; run: {'; or: '.join(sources)}")
    _make_writable(arguments.out)
    for name, rows in chosen.items():
        if rows:
            path = arguments.out / f"{name}.png"
            path.write_bytes(png(figure(name, rows), rows))
            print(path)
        else:
            print(f"no {name}.png, as its data is missing; run: {PICTURES[name].source}")
    return 0


def _check(chosen: dict[str, list[Row]], folder: Path) -> int:
    """1 when a picture that is there is not of the rows that it would be drawn from."""
    code = 0
    for name, rows in chosen.items():
        path = folder / f"{name}.png"
        if path.exists() and remembered(path) != digest(rows):
            print(f"{path} is not of the rows in the result files; run: attnctl-fast bench plot", file=sys.stderr)
            code = 1
    return code


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"--out is {folder}, which cannot be written: {error.strerror}; name another folder") from None
