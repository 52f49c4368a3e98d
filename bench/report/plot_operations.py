"""Pictures of what `bench ops` and `bench gpu` measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.harness.rows import Row, device, moment, on_gpu
from bench.report.style import (
    COLOURS,
    LABELS,
    MARKERS,
    Panel,
    Point,
    canvas,
    failures,
    fill_panels,
    handle,
    panel_body,
    plain_numbers,
)

ROLES = ("published", "stock", "ours")
NAMES = LABELS | {"stock": "stock PyTorch's best"}


class Call(NamedTuple):
    """One implementation at one shape: ms per call with quartiles (20th and 80th percentile on a GPU); bytes moved,
    FLOPs, and the bytes per second of a copy, each only where the row knows it."""

    op: str
    model: str
    shape: str
    role: str
    impl: str
    median: float
    low: float
    high: float
    moved: int | None
    flops: int | None
    copy: float | None

    @property
    def sizes(self) -> dict[str, int]:
        return sizes(self.shape)


def sizes(shape: str) -> dict[str, int]:
    """ "B1 H20 M256" as numbers by letter."""
    return {word[0]: int(word[1:]) for word in shape.split() if word[1:].isdigit()}


def newest(rows: Iterable[Row]) -> list[Row]:
    """The rows of every implementation at every shape and dtype from the last run that has any."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=moment):
        key = device(row), *(row.get(name) for name in ("op", "model", "shape", "dtype", "impl"))
        if key in found and moment(found[key][0]) == moment(row):
            found[key].append(row)
        else:
            found[key] = [row]
    return [row for same in found.values() for row in same]


def _devices(rows: Iterable[Row]) -> list[list[Row]]:
    """The newest rows of every device in its most measured dtype, and what failed before it had one: GPUs first, then
    the newest."""
    by_device: dict[str, list[Row]] = {}
    for row in newest(rows):
        by_device.setdefault(device(row), []).append(row)
    found = []
    for mine in by_device.values():
        dtypes = [row["dtype"] for row in mine if "dtype" in row]
        dtype = max(dict.fromkeys(dtypes), key=dtypes.count, default=None)
        found.append([row for row in mine if row.get("dtype") in (dtype, None)])
    return sorted(found, key=lambda mine: (on_gpu(mine[0]), max(map(moment, mine))), reverse=True)


def calls(rows: Iterable[Row], *, cold: bool = False) -> list[Call]:
    """What did not fail, each at its better number of threads. `cold`: with an empty cache where that was measured."""
    rows = list(rows)
    kernels = {row["op"] for row in rows if row.get("impl") == "triton"}
    best: dict[tuple[str, str, str, str], Call] = {}
    for row in rows:
        role = _role(row.get("impl", ""), row["op"] in kernels)
        if "failed" in row or role is None:
            continue
        made = Call(row["op"], row["model"], row["shape"], role, row["impl"], *_milliseconds(row, cold), *_work(row))
        key = row["op"], row["model"], row["shape"], row["impl"]
        if key not in best or made.median < best[key].median:
            best[key] = made
    return list(best.values())


def _milliseconds(row: Row, cold: bool) -> tuple[float, float, float]:
    if "median" in row:
        return row["median"], row["q1"], row["q3"]
    times = (cold and row.get("cold")) or row
    return 1e-3 * times["p50"], 1e-3 * times["p20"], 1e-3 * times["p80"]


def _work(row: Row) -> tuple[int | None, int | None, float | None]:
    copy = row.get("copy_gb_per_s")
    return row.get("bytes"), row.get("flops"), None if copy is None else 1e9 * copy


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
    unit, factor = ("ms", 1.0) if max(call.median for call in found) >= 1 else ("us", 1e3)
    panels, rivals = [], set()
    for op in dict.fromkeys(call.op for call in found):
        lines: dict[str, list[Point]] = {}
        mine = [call for call in found if call.op == op]
        for size in sorted({call.sizes[letter] for call in mine}):
            here = [call for call in mine if call.sizes[letter] == size]
            for role in ROLES:
                call = min((x for x in here if x.role == role), key=lambda x: x.median, default=None)
                if call is not None:
                    times = (factor * call.median, factor * call.low, factor * call.high)
                    lines.setdefault(role, []).append(Point(size, *times))
                    rivals |= {call.impl} if role == "stock" else set()
        where = mine[0].model if letter == "M" else f"{mine[0].model}, M = {mine[0].sizes['M']}"
        panels.append(Panel(f"{op}\n{where}", lines))
    present = [role for role in ROLES if any(role in panel.lines for panel in panels)]
    spread = "20th and 80th percentile" if "p50" in next(row for row in rows if "failed" not in row) else "quartiles"
    notes = [f"Medians and {spread} of one call."]
    if letter == "M":
        notes[0] += " The points are the layers of one model, whose heads and their width differ too."
    if rivals:
        notes.append(f"Stock PyTorch's best at each point, of: {'; '.join(sorted(rivals))}.")
    notes += _failures(rows)
    against = {"M": "the image tokens", "B": "the batch"}[letter]
    title = f"Time per call against {against}: {rows[0]['dtype']}"
    handles = [handle(role, NAMES[role]) for role in present]
    figure = canvas(title, rows, notes, handles, panel_body(len(panels))[2])
    label = {"M": "image tokens M", "B": "batch B"}[letter]
    fill_panels(figure, panels, label, f"time per call, {unit}")
    return figure


def _failures(rows: Sequence[Row]) -> list[str]:
    return failures(rows, lambda row: f"{row['op']}, {row.get('impl', 'all')}", lambda row: row["shape"])


def select_roofline(rows: Iterable[Row]) -> list[Row]:
    """The rows of the best device that say how many bytes and FLOPs they take; and what failed."""
    for mine in _devices(rows):
        found = [row for row in mine if row.get("bytes") and "flops" in row and "failed" not in row]
        if any(call.role == "ours" and call.flops for call in calls(found)):
            return found + [row for row in mine if "failed" in row]
    return []


def draw_roofline(rows: Sequence[Row]) -> Figure:
    """Achieved FLOP/s against arithmetic intensity, and what share of the roof the operations reach at their largest
    shape. The roof is the copy bandwidth times the intensity, where it was measured; what limits arithmetic was not.
    Without it, shares are of the highest rate in the rows."""
    best: dict[tuple[str, str, str, str], Call] = {}
    for call in calls(rows, cold=True):
        key = call.op, call.model, call.shape, call.role
        if call.role != "published" and (key not in best or call.median < best[key].median):
            best[key] = call
    found = list(best.values())
    copies = [call.copy for call in found if call.copy]
    highest = max(call.flops / call.median for call in found if call.flops)
    shown: list[tuple[str, list[tuple[str, float]]]] = []
    for op in dict.fromkeys(call.op for call in found):
        mine = [call for call in found if call.op == op and (call.copy if copies else call.flops)]
        ours = max(
            (call for call in mine if call.role == "ours"), key=lambda x: (x.moved or 0, x.flops or 0), default=None
        )
        if ours is None:
            continue
        rival = best.get((op, ours.model, ours.shape, "stock"))
        pair = [(call.role, _share(call, highest)) for call in (ours, rival) if call and (call.copy or not copies)]
        shown.append((f"{op}\n{ours.shape}", pair))
    shown.sort(key=lambda x: x[1][0][1])
    notes = [
        "FLOPs are of the operation's matrix products and convolutions, bytes of its inputs and outputs, each once."
        + (" Timed with something else in the L2 cache." if any(map(on_gpu, rows)) else "")
    ]
    if copies:
        notes.append(
            f"Roof: the bandwidth of a copy, {max(copies) / 1e9:.0f} GB/s. The limit of arithmetic was not measured, "
            "so the share of the whole roof is at least what is given. Above the roof: data that stayed in a cache."
        )
    else:
        notes.append("The copy bandwidth was not measured: shares are of the highest rate here, not of a roof.")
    notes += _failures(rows)
    roles = [role for role in ("ours", "stock") if any(role == name for _, pair in shown for name, _ in pair)]
    handles = [handle(role, NAMES[role], line=False) for role in roles]
    handles += [Line2D([], [], color="black", linewidth=1, label="copy bandwidth")] if copies else []
    title = "Share of the roofline" if copies else "Rates of arithmetic, without a roof"
    figure = canvas(f"{title}: {rows[0]['dtype']}", rows, notes, handles, 4.0 + 0.3 * len(shown))
    points, bars = figure.subplots(2, 1, height_ratios=(3.3, 0.5 + 0.3 * len(shown)))
    _points(points, found)
    _bars(bars, shown, "share of the copy bandwidth, %" if copies else "share of the highest rate, %")
    return figure


def _share(call: Call, highest: float) -> float:
    """Percent of the copy bandwidth; where it is unknown, of the highest FLOPs per ms."""
    if call.copy:
        assert call.moved is not None
        return 100 * call.moved / (1e-3 * call.median) / call.copy
    assert call.flops is not None
    return 100 * call.flops / call.median / highest


def _points(axes: Axes, found: Sequence[Call]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    known = [(call, call.flops, call.moved) for call in found if call.flops and call.moved]
    for role in ("stock", "ours"):
        mine = [entry for entry in known if entry[0].role == role]
        x = [flops / moved for _, flops, moved in mine]
        y = [1e-6 * flops / call.median for call, flops, _ in mine]
        axes.plot(x, y, MARKERS[role], color=COLOURS[role], markersize=4.5, markerfacecolor="none", label=role)
    copies = [call.copy for call, _, _ in known if call.copy]
    if copies:
        ends = axes.get_xlim()
        axes.plot(ends, [1e-9 * max(copies) * x for x in ends], color="black", linewidth=1, label="roof")
        axes.set_xlim(*ends)
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("achieved, GFLOP/s")
    plain_numbers(axes.xaxis, axes.get_xlim())
    plain_numbers(axes.yaxis, axes.get_ylim())


def _bars(axes: Axes, shown: Sequence[tuple[str, list[tuple[str, float]]]], label: str) -> None:
    for y, (_, pair) in enumerate(shown):
        for offset, (role, share) in zip((0.2, -0.2) if len(pair) > 1 else (0.0,), pair, strict=True):
            axes.barh([y + offset], [share], height=0.36, color=COLOURS[role], label=role)
            text = f"{share:.1f}" if share < 9.95 else f"{share:.0f}"
            axes.annotate(text, (share, y + offset), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=7.5, linespacing=1.0)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.15 * max(share for _, pair in shown for _, share in pair))
    axes.set_xlabel(label)
