"""`attnctl-fast demo`: draw with the methods on the shipped models, count, time and show."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..methods import CONFORM
from ..shapes.evaluate import (
    ADDED,
    CONTRASTED,
    TUNED,
    Arm,
    Comparison,
    Evaluation,
    compare,
    first_object,
    interleaved,
    regulation,
    second_object,
)
from ..shapes.load import load_pipeline
from ..shapes.mmdit import MMDiTDenoiser
from ..shapes.unet import LAYERS
from .pictures import Panel, Strip, draw_sheet, found_lines
from .report import aligned, overhead, spread, versions

PLAIN, REGULATED, REFERENCE = "plain", "attention regulation", "same, by autograd"
CONTRAST, FIRST, COMPOSED = "conform", "first object only", "second one composed"
_SCENES_SHOWN = 4
_REFERENCE_BATCHES = 2


@dataclass(frozen=True)
class Show:
    """What is drawn with a model.

    title: the model's. arms: by name. methods: every method's arm and the one that it is compared with, prompt by
    prompt.
    """

    title: str
    arms: Mapping[str, Arm]
    methods: Mapping[str, str]

    @property
    def bases(self) -> dict[str, str]:
        """Every arm whose time is compared, and with which."""
        return {**self.methods, REFERENCE: PLAIN} if REFERENCE in self.arms else dict(self.methods)


def shows(strength: float | None) -> dict[str, Show]:
    """Return what is drawn with each model; attention regulation has the given strength, or the tuned one."""
    regulated = regulation(**_regulation(strength))

    def contrasted(layers: Sequence[str]) -> Arm:
        return Arm(lambda scenes: [CONFORM([scene.objects for scene in scenes], layers=layers, **CONTRASTED)])

    return {
        "unet": Show(
            "UNet",
            {
                PLAIN: Arm(),
                REGULATED: Arm(regulated),
                CONTRAST: contrasted(LAYERS),
                FIRST: Arm(options=first_object),
                COMPOSED: Arm(second_object(+1), options=first_object),
                REFERENCE: Arm(regulated, impl="reference", batches=_REFERENCE_BATCHES),
            },
            {REGULATED: PLAIN, CONTRAST: PLAIN, COMPOSED: FIRST},
        ),
        "mmdit": Show(
            "joint transformer",
            {PLAIN: Arm(), CONTRAST: contrasted(MMDiTDenoiser.layers)},
            {CONTRAST: PLAIN},
        ),
    }


def _regulation(strength: float | None) -> dict[str, Any]:
    return dict(TUNED) if strength is None else {**TUNED, "strength": strength}


def run(arguments: argparse.Namespace) -> None:
    """Draw, print the tables, and write `grid.png` and `demo.json`."""
    out, count = arguments.out, arguments.count
    out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(arguments.seed_start, arguments.seed_start + count))
    settings: dict[str, Any] = {
        "seeds": [seeds[0], seeds[-1]],
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "regulation": _regulation(arguments.strength),
        "conform": dict(CONTRASTED),
        "composition": dict(ADDED),
        "batch_size": arguments.batch_size,
        "device": arguments.device,
    }
    print(
        f"Drawing {count} two-object prompts (seeds {seeds[0]} to {seeds[-1]}), without and with every method",
        flush=True,
    )
    report: dict[str, Any] = {"settings": settings, "versions": versions(), "models": {}}
    strips, notes = [], []
    for model, show in shows(arguments.strength).items():
        results = interleaved(
            load_pipeline(model, device=torch.device(arguments.device)),
            seeds,
            show.arms,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            batch_size=arguments.batch_size,
            warm_up=True,
        )
        comparisons = {name: compare(results[base], results[name]) for name, base in show.methods.items()}
        print(table(show, results, comparisons), flush=True)
        report["models"][model] = as_json(show, results, comparisons)
        strips += _strips(show, results)
        notes.append(f"Both objects, {show.title}, seeds {seeds[0]} to {seeds[-1]}: {_rates(comparisons)}.")
    _sheet(strips, notes).save(out / "grid.png", optimize=True)
    (out / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"Pictures: {out / 'grid.png'}   everything: {out / 'demo.json'}")


def table(show: Show, results: dict[str, Evaluation], comparisons: dict[str, Comparison]) -> str:
    """Lay out the rates, seconds per image and overhead of every arm of a model as lines of text."""
    rows: list[tuple[str, ...]] = [(show.title, "strict", "exact", "all colours", "s per image", "overhead")]
    for name, result in results.items():
        rates, cost = ["", "", ""], ""
        for index, criterion in enumerate(("strict", "exact", "colours")):
            if name in comparisons:
                change = getattr(comparisons[name], criterion)
                rates[index] = f"{_percent(change.controlled)} (+{change.gained} -{change.lost})"
            elif name != REFERENCE:
                rates[index] = _percent(result.hits(criterion) / len(result.scores))
        seconds = spread(result.seconds_per_image)
        if name in show.bases:
            percent = overhead(results[show.bases[name]].seconds_per_image, result.seconds_per_image)
            cost = f"{percent['median']:+.0f} % ({percent['low']:+.0f} to {percent['high']:+.0f})"
        timing = f"{seconds['median']:.3f} ({seconds['low']:.3f} to {seconds['high']:.3f})"
        rows.append((name, *rates, timing, cost))
    p_values = ", ".join(f"{name} {comparison.strict.p_value:.2g}" for name, comparison in comparisons.items())
    notes = [
        f"{len(results[PLAIN].seeds)} prompts of two objects; in brackets pairs of pictures gained and lost, quartiles "
        "of times.",
        "strict: every object is there. exact: and no other. all colours: each colour, on whichever shape.",
    ]
    if REFERENCE in results:
        notes += [
            f'{REFERENCE}: attention regulation with impl="reference", the optimisation as a plain PyTorch loop.',
            f"{FIRST}: of the prompt; {COMPOSED}: a composition with the whole prompt adds the other one.",
        ]
    notes.append(f"Exact McNemar p of strict: {p_values}.")
    return "\n".join(["", *aligned(rows), "", *notes])


def as_json(show: Show, results: dict[str, Evaluation], comparisons: dict[str, Comparison]) -> dict[str, Any]:
    """Return rates, timings and what was found for every seed, as JSON can hold them."""
    plain = results[PLAIN]
    timings = {}
    for name, result in results.items():
        timings[name] = {"seconds_per_image": spread(result.seconds_per_image), "batches": result.seconds}
        if name in show.bases:
            base = results[show.bases[name]].seconds_per_image
            timings[name]["overhead_percent"] = overhead(base, result.seconds_per_image)
    pictures = []
    for index, (seed, scene) in enumerate(zip(plain.seeds, plain.scenes, strict=True)):
        entry: dict[str, Any] = {"seed": seed, "prompt": scene.prompt}
        for name in _compared(show):
            found = [f"{seen.colour} {seen.shape}" for seen in results[name].detections[index]]
            entry[name] = {"found": found, **results[name].scores[index]._asdict()}
        pictures.append(entry)
    rates = {name: asdict(comparison) for name, comparison in comparisons.items()}
    report: dict[str, Any] = {"rates": rates, "timings": timings}
    if REFERENCE in results:
        report["pixel_difference_to_autograd"] = _difference(results[REGULATED], results[REFERENCE])
    return {**report, "pictures": pictures}


def _compared(show: Show) -> list[str]:
    return [name for name in show.arms if name != REFERENCE]


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _difference(result: Evaluation, reference: Evaluation) -> dict[str, float]:
    """Return how far pictures lie apart, in grey levels of 255."""
    pairs = zip(result.images, reference.images, strict=False)
    levels = np.stack([np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)) for one, other in pairs])
    return {"mean": float(levels.mean()), "largest": int(levels.max())}


def _strips(show: Show, results: dict[str, Evaluation]) -> list[Strip]:
    plain = results[PLAIN]
    strips = []
    # First those on which something is to be gained.
    lacking_first = sorted(range(len(plain.seeds)), key=lambda index: plain.scores[index].strict)
    for index in lacking_first[:_SCENES_SHOWN]:
        scene, seed = plain.scenes[index], plain.seeds[index]
        panels = []
        for name in _compared(show):
            result = results[name]
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            panels.append(
                Panel(result.images[index], name, found_lines(scene.objects, found), result.scores[index].strict)
            )
        strips.append(Strip(f"{show.title}, {seed}: {scene.prompt}", panels))
    return strips


def _rates(comparisons: dict[str, Comparison]) -> str:
    return "; ".join(
        f"{name} {_percent(comparison.strict.plain)} to {_percent(comparison.strict.controlled)} "
        f"(+{comparison.strict.gained} -{comparison.strict.lost})"
        for name, comparison in comparisons.items()
    )


def _sheet(strips: Sequence[Strip], notes: Sequence[str]) -> Any:
    return draw_sheet(
        strips,
        title="The same prompt and seed, without and with attention control; first those on which plain sampling fails",
        notes=[
            "Below each picture: what a detector found. Green frame: both objects of the prompt. Red cross: not found. "
            "Orange plus: not asked for.",
            *notes,
        ],
        columns=2,
    )
