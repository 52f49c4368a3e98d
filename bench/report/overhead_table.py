"""The overhead table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnctl_fast._numbers import step_count
from attnctl_fast.methods import DenseDiffusion

Row = dict[str, Any]


def overhead_table(rows: Sequence[Row]) -> str:
    """The rows of one run of `overhead.py` as a Markdown table with its settings below."""
    measured = [row for row in rows if row.get("kind") == "overhead"]
    lines = [
        "| method | form | s per image | overhead | extra memory | in the paper | off ours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in measured]
    return "\n".join([*lines, "", _settings(measured)])


def _cells(row: Row) -> list[str]:
    name = "plain" if row["form"] == "plain" else f"`{row['method']}`"
    form = "" if row["form"] == "plain" else row["form"]
    paper = row["published_percent"]
    figure = f"+{paper:g} %" if paper is not None and row["form"] == "published" else ""
    if "failed" in row:
        return [name, form, f"failed: {row['failed']}".replace("|", "\\|"), "", "", figure, ""]
    cost, memory = row["overhead_percent"], row["extra_mb"]
    return [
        name,
        form,
        f"{row['median']:.3g} ({row['low']:.3g} to {row['high']:.3g})",
        "" if cost is None else f"{cost['median']:+.0f} % ({cost['low']:+.0f} to {cost['high']:+.0f})",
        "" if memory is None else f"{memory:+.0f} MB",
        figure,
        _off(row["difference"]),
    ]


def _off(difference: dict[str, float | None] | None) -> str:
    if difference is None:
        return ""
    if "loss_percent" in difference:
        percent = difference["loss_percent"]
        return "no loss found" if percent is None else f"chaotic: loss differs by {percent:.1g} %"
    image, effect = difference["image"], difference["effect"]
    if image is None:
        return "not finite"
    return f"{image:.1g}" if effect is None else f"{image:.1g} of {effect:.1g}"


def _settings(rows: Sequence[Row]) -> str:
    first = rows[0]
    sources = sorted({row["source"] for row in rows if row["source"]})
    weights = "trained weights" if first["arch"] == "shapes" else "random weights"
    commit = f"{first['git']}{' and uncommitted changes' if first['dirty'] else ''}" if first["git"] else "unknown"
    dense = step_count(DenseDiffusion.edit_steps, first["steps"])
    turns = max(
        (len(row["seconds"]) for row in rows if row["form"] not in ("plain", "failed") and "seconds" in row), default=0
    )
    bounds = "quartiles" if turns >= 5 else "the lowest and highest"
    return (
        f"{first['arch']}, {weights}, {first['size']}x{first['size']} pixels, batch {first['batch']}, DDIM of "
        f"{first['steps']} steps, methods at work in the first {first['edited']} (DenseDiffusion in {dense}, the "
        f"context methods and Composable Diffusion in all), without refinement; {first['dtype']}"
        f"{', compiled but for published and diffusers' if first['compile'] else ''}; encoding and decoding included. "
        f"Medians and {bounds} of {turns} turns, each overhead over the plain picture drawn beside it; memory: the "
        "highest over plain sampling's; off ours: the largest difference of a pixel (0..1), of what the method itself "
        f"changes. {first['device']}, {first['threads']} threads, torch {first['versions']['torch']}, commit {commit}."
        + (f" In the paper: {'; '.join(sources)}." if sources else "")
    )
