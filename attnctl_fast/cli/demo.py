"""`attnctl-fast demo`: draw with the methods on the shipped model, count, time and show."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..shapes.evaluate import (
    ADDED,
    TUNED,
    Arm,
    Comparison,
    Evaluation,
    compare,
    energy,
    first_object,
    interleaved,
    regulation,
    second_object,
)
from ..shapes.load import load_pipeline
from .pictures import Panel, Strip, draw_sheet, found_lines
from .report import aligned, overhead, spread, versions

PLAIN, REGULATED, REFERENCE = "plain", "attention regulation", "same, by autograd"
ENERGY, FIRST, COMPOSED = "energy context", "first object only", "second one composed"
# Every method's arm and the one it is compared with, prompt by prompt; REFERENCE only in time.
METHODS = {REGULATED: PLAIN, ENERGY: PLAIN, COMPOSED: FIRST}
BASES = {**METHODS, REFERENCE: PLAIN}
_SCENES_SHOWN = 6
_REFERENCE_BATCHES = 2


def run(arguments: argparse.Namespace) -> None:
    """Draw, print the table, and write `grid.png` and `demo.json`."""
    out, count = arguments.out, arguments.count
    out.mkdir(parents=True, exist_ok=True)
    options = dict(TUNED) if arguments.strength is None else {**TUNED, "strength": arguments.strength}
    seeds = list(range(arguments.seed_start, arguments.seed_start + count))
    settings: dict[str, Any] = {
        "seeds": [seeds[0], seeds[-1]],
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "regulation": options,
        "energy": asdict(energy()[0]),
        "composition": dict(ADDED),
        "batch_size": arguments.batch_size,
        "device": arguments.device,
    }
    print(
        f"Drawing {count} two-object prompts (seeds {seeds[0]} to {seeds[-1]}), without and with every method",
        flush=True,
    )
    methods = regulation(**options)
    arms = {
        PLAIN: Arm(),
        REGULATED: Arm(methods),
        ENERGY: Arm(energy()),
        FIRST: Arm(options=first_object),
        COMPOSED: Arm(second_object(+1), options=first_object),
        REFERENCE: Arm(methods, impl="reference", batches=_REFERENCE_BATCHES),
    }
    results = interleaved(
        load_pipeline(device=torch.device(arguments.device)),
        seeds,
        arms,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
        warm_up=True,
    )
    comparisons = {name: compare(results[base], results[name]) for name, base in METHODS.items()}
    print(table(results, comparisons), flush=True)
    _sheet(results, comparisons).save(out / "grid.png", optimize=True)
    report = {"settings": settings, "versions": versions(), **as_json(results, comparisons)}
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Pictures: {out / 'grid.png'}   everything: {out / 'demo.json'}")


def table(results: dict[str, Evaluation], comparisons: dict[str, Comparison]) -> str:
    """Lay out the rates, seconds per image and overhead of every arm as lines of text."""
    rows: list[tuple[str, ...]] = [("", "strict", "exact", "all colours", "s per image", "overhead")]
    for name, result in results.items():
        rates, cost = ["", "", ""], ""
        for index, criterion in enumerate(("strict", "exact", "colours")):
            if name in comparisons:
                change = getattr(comparisons[name], criterion)
                rates[index] = f"{_percent(change.controlled)} (+{change.gained} -{change.lost})"
            elif name != REFERENCE:
                rates[index] = _percent(result.hits(criterion) / len(result.scores))
        seconds = spread(result.seconds_per_image)
        if name in BASES:
            percent = overhead(results[BASES[name]].seconds_per_image, result.seconds_per_image)
            cost = f"{percent['median']:+.0f} % ({percent['low']:+.0f} to {percent['high']:+.0f})"
        timing = f"{seconds['median']:.3f} ({seconds['low']:.3f} to {seconds['high']:.3f})"
        rows.append((name, *rates, timing, cost))
    p_values = ", ".join(f"{name} {comparison.strict.p_value:.2g}" for name, comparison in comparisons.items())
    notes = [
        f"{len(results[PLAIN].seeds)} prompts of two objects; in brackets pairs of pictures gained and lost, quartiles "
        "of times.",
        "strict: every object is there. exact: and no other. all colours: each colour, on whichever shape.",
        f'{REFERENCE}: attention regulation with impl="reference", the optimisation as a plain PyTorch loop.',
        f"{FIRST}: of the prompt; {COMPOSED}: a composition with the whole prompt adds the other one.",
        f"Exact McNemar p of strict: {p_values}.",
    ]
    return "\n".join(["", *aligned(rows), "", *notes])


def as_json(results: dict[str, Evaluation], comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Return rates, timings and what was found for every seed, as JSON can hold them."""
    plain = results[PLAIN]
    timings = {}
    for name, result in results.items():
        timings[name] = {"seconds_per_image": spread(result.seconds_per_image), "batches": result.seconds}
        if name in BASES:
            base = results[BASES[name]].seconds_per_image
            timings[name]["overhead_percent"] = overhead(base, result.seconds_per_image)
    pictures = []
    for index, (seed, scene) in enumerate(zip(plain.seeds, plain.scenes, strict=True)):
        entry: dict[str, Any] = {"seed": seed, "prompt": scene.prompt}
        for name in (PLAIN, FIRST, *METHODS):
            found = [f"{seen.colour} {seen.shape}" for seen in results[name].detections[index]]
            entry[name] = {"found": found, **results[name].scores[index]._asdict()}
        pictures.append(entry)
    return {
        "rates": {name: asdict(comparison) for name, comparison in comparisons.items()},
        "timings": timings,
        "pixel_difference_to_autograd": _difference(results[REGULATED], results[REFERENCE]),
        "pictures": pictures,
    }


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _difference(result: Evaluation, reference: Evaluation) -> dict[str, float]:
    """Return how far pictures lie apart, in grey levels of 255."""
    pairs = zip(result.images, reference.images, strict=False)
    levels = np.stack([np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)) for one, other in pairs])
    return {"mean": float(levels.mean()), "largest": int(levels.max())}


def _sheet(results: dict[str, Evaluation], comparisons: dict[str, Comparison]) -> Any:
    plain = results[PLAIN]
    strips = []
    for index in range(min(_SCENES_SHOWN, len(plain.seeds))):
        scene, seed = plain.scenes[index], plain.seeds[index]
        panels = []
        for name in (PLAIN, REGULATED, ENERGY, FIRST, COMPOSED):
            result = results[name]
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            panels.append(
                Panel(result.images[index], name, found_lines(scene.objects, found), result.scores[index].strict)
            )
        strips.append(Strip(f"{seed}: {scene.prompt}", panels))
    rates = [
        f"{name} {_percent(comparison.strict.plain)} to {_percent(comparison.strict.controlled)} "
        f"(+{comparison.strict.gained} -{comparison.strict.lost})"
        for name, comparison in comparisons.items()
    ]
    return draw_sheet(
        strips,
        title=f"Seeds {plain.seeds[0]} to {plain.seeds[len(strips) - 1]}: the same prompt and seed, without and with "
        "attention control",
        notes=[
            "Below each picture: what a detector found. Green frame: both objects of the prompt. Red cross: not found. "
            "Orange plus: not asked for.",
            f"Both objects, over seeds {plain.seeds[0]} to {plain.seeds[-1]}: {'; '.join(rates)}.",
        ],
        columns=2,
    )
