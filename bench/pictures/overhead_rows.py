"""Which rows of `bench overhead` a table or a picture shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.harness.rows import Row, device, moment, on_gpu
from bench.pictures.architectures import SIZES

FORMS = ("published", "diffusers", "stock", "ours")
SETTING = ("arch", "size", "steps", "edited", "dtype", "batch", "compile", "threads")


def last(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of every form of a method in a run, which holds all its turns; other rows as they are."""
    found: dict[Any, Row] = {}
    for row in rows:
        own = row["kind"] == "overhead"
        key = (row["run"], device(row), *(row[name] for name in (*SETTING, "method", "form"))) if own else id(row)
        found[key] = row
    return list(found.values())


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every form of a method in every setting."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=moment):
        found[(device(row), *(row[name] for name in (*SETTING, "method", "form")))] = row
    return list(found.values())


def families(rows: Iterable[Row], apart: Sequence[str] = ()) -> list[list[Row]]:
    """The newest rows by device and setting, whatever `apart` is in them."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in newest(rows):
        found.setdefault((device(row), *(row[name] for name in SETTING if name not in apart)), []).append(row)
    return list(found.values())


def select_overhead(rows: Iterable[Row]) -> list[Row]:
    """The run with most forms of methods; among equals a GPU's, then the nearest to the setting of the papers, then the
    newest."""
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in last(rows):
        runs.setdefault((row["run"], device(row), *(row[name] for name in SETTING)), []).append(row)

    def rank(run: list[Row]) -> tuple[Any, ...]:
        row = run[0]
        off = abs(row["size"] - SIZES.get(row["arch"], row["size"]))
        setting = -row["batch"], not row["compile"], -off, row["steps"]
        return sum(map(measured, run)), on_gpu(row), *setting, moment(row)

    return max((run for run in runs.values() if any(map(measured, run))), key=rank, default=[])


def measured(row: Row) -> bool:
    """Whether it is a form whose overhead is known."""
    return "failed" not in row and row["overhead_percent"] is not None and row["form"] in FORMS
