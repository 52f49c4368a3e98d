"""Pictures of what `bench ops` and `bench gpu` measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bench.harness.rows import Row, device, moment, on_gpu
from bench.report.style import LOOKS, canvas, failures, handle, plain_numbers

ROLES = ("published", "stock", "ours")
NAMES = {role: LOOKS[role].label for role in ROLES} | {"stock": "stock PyTorch's best"}


class Call(NamedTuple):
    """One implementation at one shape: ms per call with quartiles (20th and 80th percentile on a GPU), bytes moved,
    FLOPs, and the GB per second of a copy where the row knows it."""

    op: str
    model: str
    shape: str
    role: str
    impl: str
    median: float
    low: float
    high: float
    moved: int
    flops: int
    copy: float | None

    @property
    def sizes(self) -> dict[str, int]:
        return sizes(self.shape)


def sizes(shape: str) -> dict[str, int]:
    """ "B1 H20 M256" as numbers by letter."""
    return {word[0]: int(word[1:]) for word in shape.split() if word[1:].isdigit()}


def _devices(rows: Iterable[Row]) -> list[list[Row]]:
    """Of every device the newest row of every implementation at every shape, in its most measured dtype, and what
    failed before it had one: GPUs first, then the newest."""
    newest: dict[str, dict[tuple[Any, ...], Row]] = {}
    for row in sorted(rows, key=moment):
        case = tuple(row.get(name) for name in ("op", "model", "shape", "dtype", "impl"))
        newest.setdefault(device(row), {})[case] = row
    found = []
    for mine in newest.values():
        dtypes = [row["dtype"] for row in mine.values() if "dtype" in row]
        dtype = max(dict.fromkeys(dtypes), key=dtypes.count, default=None)
        found.append([row for row in mine.values() if row.get("dtype") in (dtype, None)])
    return sorted(found, key=lambda mine: (on_gpu(mine[0]), max(map(moment, mine))), reverse=True)


def calls(rows: Iterable[Row], *, cold: bool = False) -> list[Call]:
    """What did not fail. `cold`: with an empty cache where that was measured."""
    rows = list(rows)
    kernels = {row["op"] for row in rows if row.get("impl") == "triton"}
    found = []
    for row in rows:
        role = _role(row.get("impl", ""), row["op"] in kernels)
        if "failed" not in row and role is not None:
            work = row["bytes"], row["flops"], row.get("copy_gb_per_s")
            times = _milliseconds(row, cold)
            found.append(Call(row["op"], row["model"], row["shape"], role, row["impl"], *times, *work))
    return found


def _milliseconds(row: Row, cold: bool) -> tuple[float, float, float]:
    if "median" in row:
        return row["median"], row["q1"], row["q3"]
    times = (cold and row.get("cold")) or row
    return 1e-3 * times["p50"], 1e-3 * times["p20"], 1e-3 * times["p80"]


def _role(impl: str, kernels: bool) -> str | None:
    """What an implementation stands for; None for what only gives the scale. `eager` is ours where no kernel is."""
    if impl.startswith("published"):
        return "published"
    if not impl or impl.startswith(("plain", "reference")):
        return None
    return "ours" if impl == ("triton" if kernels else "eager") else "stock"


def select_growth(rows: Iterable[Row], letter: str) -> list[Row]:
    """Of the best device with any: per operation the rows of one model that differ only in a size (with M also in heads
    and their width, as a model's layers do); and what failed."""
    free = "MHd" if letter == "M" else letter
    for mine in _devices(rows):
        found: list[Row] = []
        for op in dict.fromkeys(row["op"] for row in mine):
            series: dict[tuple[Any, ...], list[Row]] = {}
            for row in mine:
                if row["op"] == op and letter in sizes(row.get("shape", "")) and "model" in row:
                    kept = [pair for pair in sizes(row["shape"]).items() if pair[0] not in free]
                    series.setdefault((row["model"], *kept), []).append(row)

            def points(family: list[Row]) -> tuple[int, int]:
                ours = [call.sizes for call in calls(family) if call.role == "ours"]
                return len({x[letter] for x in ours}), max((x.get("M", 0) for x in ours), default=0)

            best = max(series.values(), key=points, default=[])
            if points(best)[0] > 1:
                found += sorted(best, key=lambda row: sizes(row["shape"])[letter])
        if found:
            return found + [row for row in mine if "failed" in row and row not in found]
    return []


def draw_growth(rows: Sequence[Row], letter: str) -> Figure:
    """Time per call against the image tokens M or the batch B, a panel per operation."""
    found = calls(rows)
    panels: dict[str, dict[str, list[Call]]] = {}
    for op in dict.fromkeys(call.op for call in found):
        mine = [call for call in found if call.op == op]
        fastest: dict[tuple[str, int], Call] = {}
        for call in sorted(mine, key=lambda x: (x.sizes[letter], x.median)):
            fastest.setdefault((call.role, call.sizes[letter]), call)
        where = mine[0].model if letter == "M" else f"{mine[0].model}, M = {mine[0].sizes['M']}"
        lines = {role: [call for (kind, _), call in fastest.items() if kind == role] for role in ROLES}
        panels[f"{op}\n{where}"] = {role: line for role, line in lines.items() if line}
    present = [role for role in ROLES if any(role in lines for lines in panels.values())]
    rivals = {call.impl for lines in panels.values() for call in lines.get("stock", ())}
    spread = "20th and 80th percentile" if "p50" in next(row for row in rows if "failed" not in row) else "quartiles"
    notes = [f"Medians and {spread} of one call."]
    if letter == "M":
        notes[0] += " The points are the layers of one model, whose heads and their width differ too."
    if rivals:
        notes.append(f"Stock PyTorch's best at each point, of: {'; '.join(sorted(rivals))}.")
    notes += _failures(rows)
    against = {"M": "the image tokens", "B": "the batch"}[letter]
    title = f"Time per call against {against}: {rows[0]['dtype']}"
    columns = min(len(panels), 3 if len(panels) <= 9 else 4)
    lines_of = math.ceil(len(panels) / columns)
    body = 0.1 + lines_of * (2.5 if columns < 4 else 1.95)
    figure = canvas(title, rows, notes, [handle(role, NAMES[role]) for role in present], body)
    unit, factor = ("ms", 1.0) if max(call.median for call in found) >= 1 else ("us", 1e3)
    grid = list(figure.subplots(lines_of, columns, squeeze=False).flat)
    for index, (axes, (name, lines)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.set_title(name)
        _lines(axes, lines, letter, factor)
        if index + columns >= len(panels):
            axes.set_xlabel({"M": "image tokens M", "B": "batch B"}[letter])
        if index % columns == 0:
            axes.set_ylabel(f"time per call, {unit}")
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def _lines(axes: Axes, lines: Mapping[str, Sequence[Call]], letter: str, factor: float) -> None:
    """Draw the calls of every role, both axes logarithmic."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    how: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.5, "elinewidth": 1, "capsize": 2}
    for role, line in lines.items():
        x, middle = [call.sizes[letter] for call in line], [factor * call.median for call in line]
        spread = [[factor * (x.median - x.low) for x in line], [factor * (x.high - x.median) for x in line]]
        axes.errorbar(x, middle, spread, color=LOOKS[role].colour, marker=LOOKS[role].marker, label=role, **how)
    every = [call for line in lines.values() for call in line]
    axes.xaxis.set_major_locator(FixedLocator(sorted({call.sizes[letter] for call in every})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    plain_numbers(axes.yaxis, [factor * call.median for call in every])


def _failures(rows: Sequence[Row]) -> list[str]:
    return failures(rows, lambda row: f"{row['op']}, {row.get('impl', 'all')}", lambda row: row["shape"])


def select_roofline(rows: Iterable[Row]) -> list[Row]:
    """The rows of the best device that say how many bytes and FLOPs they take, where a copy was measured beside any;
    and what failed."""
    for mine in _devices(rows):
        found = [row for row in mine if row.get("bytes") and "flops" in row and "failed" not in row]
        if any(call.role == "ours" and call.flops and call.copy for call in calls(found)):
            return found + [row for row in mine if "failed" in row]
    return []


def draw_roofline(rows: Sequence[Row]) -> Figure:
    """Achieved FLOP/s against arithmetic intensity, and what share of the roof the operations reach at their largest
    shape. The roof is the copy bandwidth times the intensity; what limits arithmetic was not measured."""
    best: dict[tuple[str, str, str, str], Call] = {}
    for call in calls(rows, cold=True):
        key = call.op, call.model, call.shape, call.role
        if call.role != "published" and (key not in best or call.median < best[key].median):
            best[key] = call
    found = list(best.values())
    roof = max(call.copy for call in found if call.copy)
    shown: list[tuple[str, dict[str, float]]] = []
    for op in dict.fromkeys(call.op for call in found):
        mine = [call for call in found if call.op == op and call.copy and call.role == "ours"]
        ours = max(mine, key=lambda x: (x.moved, x.flops), default=None)
        if ours is not None:
            pair = ours, best.get((op, ours.model, ours.shape, "stock"))
            shares = {x.role: 1e-4 * x.moved / x.median / x.copy for x in pair if x and x.copy}
            shown.append((f"{op}\n{ours.shape}", shares))
    shown.sort(key=lambda x: x[1]["ours"])
    notes = [
        "FLOPs are of the operation's matrix products and convolutions, bytes of its inputs and outputs, each once."
        + (" Timed with something else in the L2 cache." if any(map(on_gpu, rows)) else ""),
        f"Roof: the bandwidth of a copy, {roof:.0f} GB/s. The limit of arithmetic was not measured, so the share of "
        "the whole roof is at least what is given. Above the roof: data that stayed in a cache.",
        *_failures(rows),
    ]
    roles = [role for role in ("ours", "stock") if any(role in shares for _, shares in shown)]
    handles = [handle(role, NAMES[role], line=False) for role in roles]
    handles.append(Line2D([], [], color="black", linewidth=1, label="copy bandwidth"))
    figure = canvas(f"Share of the roofline: {rows[0]['dtype']}", rows, notes, handles, 4.0 + 0.3 * len(shown))
    points, bars = figure.subplots(2, 1, height_ratios=(3.3, 0.5 + 0.3 * len(shown)))
    _points(points, found, roof)
    _bars(bars, shown)
    return figure


def _points(axes: Axes, found: Sequence[Call], roof: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for role in ("stock", "ours"):
        mine = [call for call in found if call.role == role and call.flops]
        x = [call.flops / call.moved for call in mine]
        y = [1e-6 * call.flops / call.median for call in mine]
        look = LOOKS[role]
        axes.plot(x, y, look.marker, color=look.colour, markersize=4.5, markerfacecolor="none", label=role)
    ends = axes.get_xlim()
    axes.plot(ends, [roof * x for x in ends], color="black", linewidth=1, label="roof")
    axes.set_xlim(*ends)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("achieved, GFLOP/s")
    plain_numbers(axes.xaxis, axes.get_xlim())
    plain_numbers(axes.yaxis, axes.get_ylim())


def _bars(axes: Axes, shown: Sequence[tuple[str, dict[str, float]]]) -> None:
    for y, (_, shares) in enumerate(shown):
        for offset, (role, share) in zip((0.2, -0.2) if len(shares) > 1 else (0.0,), shares.items(), strict=True):
            axes.barh([y + offset], [share], height=0.36, color=LOOKS[role].colour, label=role)
            text = f"{share:.1f}" if share < 9.95 else f"{share:.0f}"
            axes.annotate(text, (share, y + offset), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7.5, linespacing=1.0)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.15 * max(share for _, shares in shown for share in shares.values()))
    axes.set_xlabel("share of the copy bandwidth, %")
