"""`attnctl-fast demo`: attention regulation on the shipped model, counted, timed and drawn."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._grid import Panel, Row, draw_grid, found_lines
from ._report import overhead, spread, versions
from .shapes.evaluate import TUNED, Arm, Comparison, Evaluation, compare, interleaved, regulation
from .shapes.model import load_pipeline

PLAIN, REGULATED, REFERENCE = "plain", "attention regulation", "same, by autograd"
_PAIRS_IN_GRID = 8
_REFERENCE_BATCHES = 2


def demo(
    *,
    count: int,
    seed_start: int,
    steps: int,
    guidance_scale: float,
    strength: float | None,
    batch_size: int,
    device: str,
    out: Path,
) -> None:
    """Draw, print the table, and write `grid.png` and `demo.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    options = dict(TUNED) if strength is None else {**TUNED, "strength": strength}
    seeds = list(range(seed_start, seed_start + count))
    settings: dict[str, Any] = {
        "seeds": [seeds[0], seeds[-1]],
        "steps": steps,
        "guidance_scale": guidance_scale,
        "regulation": options,
        "batch_size": batch_size,
        "device": device,
    }
    print(
        f"Drawing {count} two-object prompts (seeds {seeds[0]} to {seeds[-1]}), without and with attention regulation",
        flush=True,
    )
    methods = regulation(**options)
    arms = {
        PLAIN: Arm(),
        REGULATED: Arm(methods),
        REFERENCE: Arm(methods, impl="reference", batches=_REFERENCE_BATCHES),
    }
    results = interleaved(
        load_pipeline(device=torch.device(device)),
        seeds,
        arms,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        warm_up=True,
    )
    comparison = compare(results[PLAIN], results[REGULATED])
    print(table(results, comparison), flush=True)
    _grid(results, comparison).save(out / "grid.png", optimize=True)
    report = {"settings": settings, "versions": versions(), **as_json(results, comparison)}
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Pictures: {out / 'grid.png'}   everything: {out / 'demo.json'}", file=sys.stdout)


def table(results: dict[str, Evaluation], comparison: Comparison) -> str:
    """The rates, seconds per image and overhead of every arm, as lines of text."""
    rows: list[tuple[str, ...]] = [("", "strict", "exact", "all colours", "s per image", "overhead")]
    plain = results[PLAIN]
    for name, result in results.items():
        rates, cost = ["", "", ""], ""
        if name != REFERENCE:
            for index, criterion in enumerate(("strict", "exact", "colours")):
                change = getattr(comparison, criterion)
                rates[index] = _percent(change.plain if result is plain else change.controlled)
                if result is not plain:
                    rates[index] += f" (+{change.gained} -{change.lost})"
        seconds = spread(result.seconds_per_image)
        if result is not plain:
            percent = overhead(plain.seconds_per_image, result.seconds_per_image)
            cost = f"{percent['median']:+.0f} % ({percent['low']:+.0f} to {percent['high']:+.0f})"
        timing = f"{seconds['median']:.3f} ({seconds['low']:.3f} to {seconds['high']:.3f})"
        rows.append((name, *rates, timing, cost))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [
        f"{comparison.count} pairs of the same prompt and seed; in brackets pairs gained and lost, quartiles of times.",
        "strict: every prompted object is there. exact: and no other. all colours: each colour, on whichever shape.",
        'by autograd: impl="reference", the optimisation as a plain PyTorch loop.',
        f"Exact McNemar p: strict {comparison.strict.p_value:.2g}, exact {comparison.exact.p_value:.2g}, "
        f"all colours {comparison.colours.p_value:.2g}.",
    ]
    return "\n".join(["", lines[0], "-" * max(map(len, lines)), *lines[1:], "", *notes])


def as_json(results: dict[str, Evaluation], comparison: Comparison) -> dict[str, Any]:
    """Rates, timings and what was found for every seed, as JSON can hold them."""
    plain = results[PLAIN]
    timings = {}
    for name, result in results.items():
        timings[name] = {"seconds_per_image": spread(result.seconds_per_image), "batches": result.seconds}
        if result is not plain:
            timings[name]["overhead_percent"] = overhead(plain.seconds_per_image, result.seconds_per_image)
    pictures = []
    for index, (seed, scene) in enumerate(zip(plain.seeds, plain.scenes, strict=True)):
        entry: dict[str, Any] = {"seed": seed, "prompt": scene.prompt}
        for name in (PLAIN, REGULATED):
            found = [f"{seen.colour} {seen.shape}" for seen in results[name].detections[index]]
            entry[name] = {"found": found, **results[name].scores[index]._asdict()}
        pictures.append(entry)
    return {
        "rates": asdict(comparison),
        "timings": timings,
        "pixel_difference_to_autograd": _difference(results[REGULATED], results[REFERENCE]),
        "pictures": pictures,
    }


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _difference(result: Evaluation, reference: Evaluation) -> dict[str, float]:
    """How far pictures lie apart, in grey levels of 255."""
    pairs = zip(result.images, reference.images, strict=False)
    levels = np.stack([np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)) for one, other in pairs])
    return {"mean": float(levels.mean()), "largest": int(levels.max())}


def _grid(results: dict[str, Evaluation], comparison: Comparison) -> Any:
    rows = []
    for index in range(min(_PAIRS_IN_GRID, comparison.count)):
        scene, seed = results[PLAIN].scenes[index], results[PLAIN].seeds[index]
        panels = []
        for name in (PLAIN, REGULATED):
            result = results[name]
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            panels.append(
                Panel(result.images[index], name, found_lines(scene.objects, found), result.scores[index].strict)
            )
        rows.append(Row(f"{seed}: {scene.prompt}", panels))
    seeds = results[PLAIN].seeds
    last = seeds[len(rows) - 1]
    rates = [
        f"{words} {_percent(change.plain)} and {_percent(change.controlled)} (+{change.gained} -{change.lost})"
        for words, change in (("both objects", comparison.strict), ("and nothing else", comparison.exact))
    ]
    return draw_grid(
        rows,
        title=f"Seeds {seeds[0]} to {last}: the same prompt and seed, without and with attention regulation",
        notes=[
            "Below each picture: what a detector found. Green frame: both objects of the prompt. Red cross: not found. "
            "Orange plus: not asked for.",
            f"Over seeds {seeds[0]} to {seeds[-1]}: {', '.join(rates)}.",
        ],
    )
