"""Which rows of `bench overhead` a table or a picture shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.harness.rows import Row, device, moment, on_gpu
from bench.pictures.architectures import SIZES

KIND = "overhead of a step"
FORMS = ("published", "diffusers", "stock", "ours")
SETTING = ("arch", "size", "dtype", "batch", "compile", "threads")


def select_overhead(rows: Iterable[Row]) -> list[Row]:
    """Return the newest row of every form, of the commit, machine and setting with most forms.

    Of a real architecture if there is one; among equals a GPU's, then the nearest to the setting of the papers, then
    the newest. A later run of a commit may so measure what an earlier one had no time for; where files were changed,
    each run is by itself.
    """
    runs: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row.get("kind") == KIND:
            state = row["run"] if row["dirty"] else row["git"]
            found = runs.setdefault((state, device(row), *(row[name] for name in SETTING)), {})
            form = row["method"], row["form"]
            if form not in found or "failed" not in row:
                found[form] = row

    def rank(run: list[Row]) -> tuple[Any, ...]:
        row = run[0]
        off = abs(row["size"] - SIZES.get(row["arch"], row["size"]))
        forms = row["arch"] != "shapes", sum(map(measured, run))
        return *forms, on_gpu(row), -row["batch"], not row["compile"], -off, moment(row)

    every = (list(found.values()) for found in runs.values())
    return max((run for run in every if any(map(measured, run))), key=rank, default=[])


def measured(row: Row) -> bool:
    """Whether it is a form whose overhead is known."""
    return "failed" not in row and row["form"] in FORMS


def told_apart(interval: dict[str, float]) -> bool:
    """Whether a difference can be told from zero."""
    return not interval["low"] <= 0 <= interval["high"]
