"""What the pictures of the measurements share: their size, type, colours and captions, and what a PNG remembers."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from PIL import Image

from bench.harness.rows import Row, device, on_gpu


class Look(NamedTuple):
    """How a form is drawn, and what it is called."""

    colour: str
    marker: str
    label: str


# Colours of Okabe and Ito, told apart without colour vision; the markers tell them apart in grey too.
LOOKS = {
    "published": Look("#D55E00", "s", "as published"),
    "diffusers": Look("#E69F00", "D", "diffusers"),
    "stock": Look("#56B4E9", "^", "stock PyTorch"),
    "ours": Look("#0072B2", "o", "attnctl-fast"),
    "paper": Look("#000000", "d", "in the paper"),
}
GREY = "#555555"
# "default" first, so that no matplotlibrc of the machine has a say.
STYLE: Any = [
    "default",
    {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.edgecolor": "#999999",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.8,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": "black",
        "ytick.labelcolor": "black",
        "legend.frameon": False,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
    },
]
# Inches. Pages show pictures some 900 pixels wide, which makes a point of type 1.4 pixels.
WIDTH, MARGIN, LINE = 9.0, 0.12, 0.165
DPI = 150
_KEY = "data"

styled = matplotlib.style.context


def canvas(title: str, rows: Sequence[Row], notes: Sequence[str], handles: Sequence[Any], body: float) -> Figure:
    """A figure with `body` inches for axes between title, origin of the rows and legend, and the notes below."""
    heading = textwrap.wrap(title, 88)
    origin = textwrap.wrap(provenance(rows), 138)
    below = [line for note in notes for line in textwrap.wrap(note, 138)]
    top = MARGIN + 0.22 * len(heading) + LINE * len(origin) + 0.3
    bottom = MARGIN + LINE * len(below)
    height = top + body + bottom
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0.006, bottom / height, 0.988, body / height), wspace=0.03, hspace=0.05)

    def write(text: Sequence[str], below_top: float, **how: Any) -> None:
        how = {"va": "top", "ha": "left", "linespacing": 1.25, **how}
        figure.text(MARGIN / WIDTH, 1 - below_top / height, "\n".join(text), **how)

    write(heading, MARGIN, fontsize=12, fontweight="bold")
    write(origin, MARGIN + 0.22 * len(heading), fontsize=8.5, color=GREY)
    write(below, top + body + 0.03, fontsize=8.5, color=GREY)
    anchor = (0.0, 1 - (top - 0.31) / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=anchor, ncols=len(handles), columnspacing=1.6)
    return figure


def provenance(rows: Iterable[Row]) -> str:
    """Where rows are from: device, versions and commits."""
    rows = list(rows)
    devices = dict.fromkeys(device(row) for row in rows)
    threads = sorted({row["threads"] for row in rows if not on_gpu(row) and row.get("threads")})
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for name in ("attnctl-fast", "torch", "triton" if on_gpu(row) else "", "diffusers" if "arch" in row else ""):
            if row["versions"].get(name):
                found.setdefault(name, {})[row["versions"][name]] = None
    commits = dict.fromkeys(_commit(row) for row in rows)
    used = " or ".join(map(str, threads)) + (" thread" if threads == [1] else " threads")
    where = ", ".join(devices) + (f" ({used})" if threads else "")
    versions = ", ".join(f"{name} {' and '.join(numbers)}" for name, numbers in found.items())
    return f"{where}; {versions}; commit {', '.join(commits)}"


def _commit(row: Row) -> str:
    name = row["git"] or "unknown"
    dirty = row.get("dirty") or name.endswith("-dirty")
    return name.removesuffix("-dirty")[:12] + (" with changes" if dirty else "")


def handle(form: str, label: str, *, line: bool = True) -> Line2D:
    """A form's marker in a legend, on a line or not."""
    look = LOOKS[form]
    style: Any = "-" if line else ""
    return Line2D([], [], color=look.colour, marker=look.marker, linestyle=style, markersize=5, label=label)


def failures(rows: Iterable[Row], what: Callable[[Row], str], where: Callable[[Row], str] | None = None) -> list[str]:
    """The note that names what failed, with the places where it did."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "failed" in row:
            name = f"{what(row)} ({row['failed'].partition(':')[0]})"
            found.setdefault(name, {}).update({where(row): None} if where else {})
    named = [name + (f" at {', '.join(places)}" if places else "") for name, places in found.items()]
    return [f"Failed and left out: {'; '.join(named)}."] if named else []


def plain_numbers(axis: Axis, values: Sequence[float]) -> None:
    """Label a logarithmic axis over such values with numbers as one writes them, and with enough of them."""
    decades = math.log10(max(values) / min(values))
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.8 else (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(10, steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def digest(rows: Sequence[Row]) -> str:
    """What tells the data of two pictures apart."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def png(figure: Figure, rows: Sequence[Row]) -> bytes:
    """A picture that remembers the digest of its rows, and neither date nor version."""
    file = BytesIO()
    with styled(STYLE):
        known = {"Software": None, _KEY: digest(rows)}
        figure.savefig(file, format="png", dpi=DPI, metadata=known, pil_kwargs={"optimize": True})
    return file.getvalue()


def remembered(path: Path) -> str | None:
    """The digest in a PNG; None where it has none."""
    with Image.open(path) as image:
        return image.info.get(_KEY)
