"""Pictures of what `bench overhead` measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from bench.harness.rows import Row, moment, on_gpu
from bench.pictures.overhead_rows import FORMS, families, measured
from bench.report.style import (
    COLOURS,
    GREY,
    LABELS,
    MARKERS,
    Panel,
    Point,
    canvas,
    failures,
    fill_panels,
    handle,
    panel_body,
)

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
    handles: list[Any] = [Patch(color=COLOURS[form], label=LABELS[form]) for form in present]
    if papers:
        label = sources[0].partition(":")[0] if len(sources) == 1 else "in the paper"
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
    notes = [
        "Medians and quartiles (of fewer than five turns the lowest and highest), over the plain picture drawn beside "
        f"each; the scale is linear up to {LINEAR:g} %."
    ]
    if papers:
        notes.append(
            f"Diamonds: {'; '.join(sources)}. Another machine and a trained model: a reference, no rival of the bars."
        )
    notes += failures(rows, _form)
    lost = [_form(row) for row in rows if row["form"] in FORMS and _without_plain(row)]
    notes += [f"Left out, as there is no plain sampling to compare with: {'; '.join(lost)}."] if lost else []
    title = f"Extra time per image over plain sampling: {_setting(rows[0])}"
    figure = canvas(title, rows, notes, handles, 0.45 + 0.17 * at)
    axes = figure.subplots()
    for (method, form), y in places.items():
        if form == "paper":
            value, source = papers[method]
            _diamond(axes, y, value, "" if len(sources) == 1 else f" ({source})")
        else:
            _bar(axes, y, form, found[method, form]["overhead_percent"])
    _scale(axes, [bound for row in rows if measured(row) for bound in row["overhead_percent"].values()], papers)
    for y in ends[:-1]:
        axes.axhline(y, color="#CCCCCC", linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(middles, list(methods))
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(at - 0.4, -0.8)
    axes.set_xlabel("extra time per image, %")
    return figure


def _bar(axes: Axes, y: float, form: str, cost: dict[str, float]) -> None:
    median, low, high = cost["median"], cost["low"], cost["high"]
    axes.barh([y], [median], height=0.82, color=COLOURS[form], label=form)
    axes.errorbar([median], [y], xerr=[[median - low], [high - median]], color="black", elinewidth=1)
    _annotate(axes, max(high, 0), y, percent(median))


def _diamond(axes: Axes, y: float, value: float, source: str) -> None:
    axes.plot([value], [y], MARKERS["paper"], color=COLOURS["paper"], markersize=6, label="paper")
    _annotate(axes, value, y, percent(value) + source)


def _annotate(axes: Axes, x: float, y: float, text: str) -> None:
    how: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center_baseline", "fontsize": 8}
    axes.annotate(text, (x, y), **how)


def _scale(axes: Axes, values: Sequence[float], papers: dict[str, tuple[float, str]]) -> None:
    shown = [0.0, LINEAR, *values, *(value for value, _ in papers.values())]
    axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.8)
    right = 3 * max(shown)
    left = min(min(shown) * 1.2, -0.5)
    axes.set_xlim(left, right)
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if left <= tick <= right]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def percent(value: float) -> str:
    return f"{value:+.1f} %" if abs(value) < 9.95 else f"{value:+.0f} %"


def _without_plain(row: Row) -> bool:
    return "failed" not in row and row["overhead_percent"] is None


def _form(row: Row) -> str:
    return f"{row['method']}, {row['form']}"


def _setting(row: Row, without: str = "") -> str:
    said = {
        "arch": ARCHITECTURES.get(row["arch"], row["arch"]),
        "size": f"{row['size']} px",
        "steps": f"{row['steps']} steps, {row['edited']} of them edited",
        "dtype": row["dtype"],
        "batch": f"batch {row['batch']}",
        "compile": "compiled" if row["compile"] else "",
    }
    return ", ".join(text for name, text in said.items() if text and name != without)


def select_growth(rows: Iterable[Row], by: str, figure: str) -> list[Row]:
    """The rows that differ only in `by` and know `figure`, of the family with most lines of two points or more."""

    def lines(family: list[Row]) -> int:
        found: dict[tuple[str, str], set[int]] = {}
        for row in family:
            if row["form"] in FORMS and row.get(figure) is not None:
                found.setdefault((row["method"], row["form"]), set()).add(row[by])
        return sum(len(values) > 1 for values in found.values())

    drawable = [family for family in families(rows, [by]) if lines(family)]
    best = max(drawable, key=lambda x: (on_gpu(x[0]), lines(x), max(map(moment, x))), default=[])
    return sorted(best, key=lambda row: row[by])


def _panels(rows: Sequence[Row], by: str, point: Any) -> list[Panel]:
    panels = []
    plain = [point(row) for row in rows if row["form"] == "plain" and "failed" not in row]
    plain = [x for x in plain if x is not None]
    for method in dict.fromkeys(row["method"] for row in rows if row["form"] in FORMS):
        lines = {"plain": plain} if plain else {}
        for form in FORMS:
            mine = [row for row in rows if (row["method"], row["form"]) == (method, form) and "failed" not in row]
            points = [x for x in map(point, mine) if x is not None]
            if points:
                lines[form] = points
        if set(lines) - {"plain"}:
            panels.append(Panel(method, lines))
    return panels


def _grown(rows: Sequence[Row], panels: Sequence[Panel], title: str, by: str, notes: Sequence[str]) -> Figure:
    forms = [form for form in ("plain", *FORMS) if any(form in panel.lines for panel in panels)]
    failed = failures(rows, _form, lambda row: f"{by} {row[by]}")
    handles = [handle(form, LABELS[form]) for form in forms]
    return canvas(f"{title}: {_setting(rows[0], by)}", rows, [*notes, *failed], handles, panel_body(len(panels))[2])


def draw_batch(rows: Sequence[Row]) -> Figure:
    """Seconds per image against the batch, a panel per method."""

    def point(row: Row) -> Point:
        return Point(row["batch"], row["median"], row["low"], row["high"])

    panels = _panels(rows, "batch", point)
    notes = ["Medians, with quartiles or the lowest and highest; a batch's time is divided by its images."]
    figure = _grown(rows, panels, "Time per image against the batch", "batch", notes)
    fill_panels(figure, panels, "images at once", "seconds per image", share=True)
    return figure


def draw_memory(rows: Sequence[Row]) -> Figure:
    """Extra memory against the picture's size, a panel per method."""

    def point(row: Row) -> Point | None:
        extra = row["extra_mb"]
        return None if extra is None else Point(row["size"], extra, extra, extra)

    panels = _panels(rows, "size", point)
    notes = ["Highest allocation during a picture less that of plain sampling; the scale is linear up to 10 MB."]
    figure = _grown(rows, panels, "Extra memory over plain sampling against resolution", "size", notes)
    fill_panels(figure, panels, "pixels along a side", "extra peak memory, MB", share=True, linear_below=10)
    return figure
