"""Pictures of what `bench overhead` measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from bench.harness.rows import Row
from bench.pictures.overhead_rows import FORMS, measured, told_apart
from bench.report.overhead_table import figure as seconds
from bench.report.style import GREY, LOOKS, canvas, failures, handle

ARCHITECTURES = {"sd15": "SD 1.5", "sd2": "SD 2", "sdxl": "SDXL", "shapes": "the shapes model"}
# Percent up to which the scale is linear, so that 1 and 400 both can be read.
LINEAR = 10.0
_TICKS = (-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


def draw_overhead(rows: Sequence[Row]) -> Figure:
    """Bars of every form of a method, and the figure of its paper."""
    methods = dict.fromkeys(row["method"] for row in rows if row["form"] in FORMS)
    found = {(row["method"], row["form"]): row for row in rows}
    papers = {
        row["method"]: (row["published_percent"], row["source"] or "its paper")
        for row in rows
        if row.get("published_percent") is not None and row["form"] in FORMS
    }
    sources = list(dict.fromkeys(source for _, source in papers.values()))
    present = [form for form in FORMS if any(measured(row) for row in rows if row["form"] == form)]
    handles: list[Any] = [Patch(color=LOOKS[form].colour, label=LOOKS[form].label) for form in present]
    if papers:
        label = sources[0].partition(":")[0] if len(sources) == 1 else LOOKS["paper"].label
        handles.append(handle("paper", label, line=False))
    places: dict[tuple[str, str], float] = {}
    middles, ends, at = [], [], 0.0
    for method in methods:
        start = at
        for form in (*present, "paper"):
            if (form == "paper" and method in papers) or ((method, form) in found and measured(found[method, form])):
                places[method, form] = at
                at += 1
        middles.append((start + at - 1) / 2 if at > start else at)
        at += 1.0 if at > start else 2.0
        ends.append(at - 1)
    still = ", where all that a form does not touch stands still" if rows[0]["still"] else ""
    notes = [
        "Added to a picture of 50 steps, in percent of plain sampling without encoding and decoding, with the 95 % "
        f"interval of differences from plain steps in turn{still}; beside it, seconds added to a step in which the "
        f"method is at work, and to the picture. The scale is linear up to {LINEAR:g} %."
    ]
    if papers:
        notes.append(
            f"Diamonds: {'; '.join(sources)}. Another machine and a trained model: a reference, no rival of the bars."
        )
    notes += failures(rows, lambda row: f"{row['method']}, {row['form']}")
    title = f"What methods add to plain sampling: {_setting(rows[0])}"
    figure = canvas(title, rows, notes, handles, 0.45 + 0.17 * at)
    axes = figure.subplots()
    for (method, form), y in places.items():
        if form == "paper":
            value, source = papers[method]
            _diamond(axes, y, value, "" if len(sources) == 1 else f" ({source})")
        else:
            _bar(axes, y, found[method, form])
    _scale(axes, [bound for row in rows if measured(row) for bound in row["percent"].values()], papers)
    for y in ends[:-1]:
        axes.axhline(y, color="#CCCCCC", linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(middles, list(methods))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - 0.4, -0.8)
    axes.set_xlabel("time added to a picture, %")
    return figure


def _bar(axes: Axes, y: float, row: Row) -> None:
    """Hollow and hatched, with these words, where the interval contains zero."""
    cost, form, colour = row["percent"], row["form"], LOOKS[row["form"]].colour
    low, middle, high = cost["low"], cost["middle"], cost["high"]
    known = told_apart(cost)
    how = {"color": colour} if known else {"fill": False, "edgecolor": colour, "hatch": "////"}
    axes.barh([y], [middle], height=0.82, label=form, **how)
    axes.errorbar([middle], [y], xerr=[[middle - low], [high - middle]], color="black", elinewidth=1)
    text = (
        f"{percent(middle)}   {seconds(row['step']['middle'])} s a step, {seconds(row['image']['middle'])} s a picture"
    )
    _annotate(axes, max(high, 0), y, text if known else "not distinguishable from zero")


def _diamond(axes: Axes, y: float, value: float, source: str) -> None:
    axes.plot([value], [y], LOOKS["paper"].marker, color=LOOKS["paper"].colour, markersize=6, label="paper")
    _annotate(axes, value, y, percent(value) + source)


def _annotate(axes: Axes, x: float, y: float, text: str) -> None:
    how: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center_baseline", "fontsize": 8}
    axes.annotate(text, (x, y), **how)


def _scale(axes: Axes, values: Sequence[float], papers: dict[str, tuple[float, str]]) -> None:
    shown = [0.0, LINEAR, *values, *(value for value, _ in papers.values())]
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.8)
    # Room for the words beside the bars.
    right = 30 * max(shown)
    left = min(min(shown) * 1.2, -0.5)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if left <= tick <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def percent(value: float) -> str:
    return f"{value:+.1f} %" if abs(value) < 9.95 else f"{value:+.0f} %"


def _setting(row: Row) -> str:
    said = [ARCHITECTURES.get(row["arch"], row["arch"]), f"{row['size']} px", row["dtype"], f"batch {row['batch']}"]
    return ", ".join([*said, *(["compiled"] if row["compile"] else [])])
