"""Detection rates of every method on the shapes model, side by side: pairs of pictures, a table and a picture grid.

    python -m bench methods             the figures of the README: seeds 0..n-1, and docs/methods.png
    python -m bench methods --tune      other settings, on seeds from 100000 on
    python -m bench report              put the last figures into the README

Every run appends one line to bench/results/shapes_methods.jsonl (--tune: shapes_methods_tuning.jsonl) and prints it as
a table. All methods draw the same two-object prompts from the same seeds, batch by batch in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

import attnctl_fast as ac
from attnctl_fast.cli.pictures import Panel, Strip, draw_sheet, found_lines
from attnctl_fast.shapes import Scene, load_pipeline, render
from attnctl_fast.shapes.evaluate import Arm, Evaluation, energy, phrase, regulation
from attnctl_fast.shapes.unet import LAYERS
from bench.harness.checkout import ROOT
from bench.quality import pairs
from bench.quality.pairs import Options
from bench.report.tables import rates_table

Make = Callable[[Options], Arm]


def excite(options: Options) -> Arm:
    return Arm(lambda scenes: [ac.AttendAndExcite([list(scene.nouns) for scene in scenes], layers=LAYERS, **options)])


def tsam(options: Options) -> Arm:
    return Arm([ac.TSAM(layers=LAYERS, **options)])


def groups(scene: Scene) -> list[tuple[str, str]]:
    return [(colour, noun) for (colour, _), noun in zip(scene.objects, scene.nouns, strict=True)]


def syngen(options: Options) -> Arm:
    return Arm(lambda scenes: [ac.SynGen([groups(scene) for scene in scenes], layers=LAYERS, **options)])


def conform(options: Options) -> Arm:
    return Arm(lambda scenes: [ac.CONFORM([groups(scene) for scene in scenes], layers=LAYERS, **options)])


def focus(options: Options) -> Arm:
    return Arm(lambda scenes: [ac.FOCUS([groups(scene) for scene in scenes], layers=LAYERS, **options)])


def composable(options: Options) -> Arm:
    def methods(scenes: Sequence[Scene]) -> Sequence[Any]:
        weight = options["weight"]
        return [ac.ComposableDiffusion([[phrase(scene, 0), phrase(scene, 1)] for scene in scenes], [weight, weight])]

    return Arm(methods)


def dense(options: Options) -> Arm:
    """Masks of a drawing of the scene."""

    def methods(scenes: Sequence[Scene]) -> Sequence[Any]:
        masks: list[Any] = []
        for index, scene in enumerate(scenes):
            drawn = torch.as_tensor(render(scene, index).masks)
            masks.append({phrase(scene, i): drawn[i].float() for i in range(len(scene.objects))})
        return [ac.DenseDiffusion(masks, **options)]

    return Arm(methods)


HALF: Options = {"steps": 0.5}
OFTEN: Options = {"steps": 0.5, "refinement": {0: None, 5: None}, "max_refinements": 5}
ONCE: Options = {"steps": 0.5, "refinement": {}}
# The best on the tuning seeds, where any was tried there.
SHOWN: dict[str, tuple[Make, Options]] = {
    "AttentionRegulation": (lambda options: Arm(regulation(**options)), {}),
    "EnergyContext": (lambda options: Arm(energy(**options)), {}),
    "AttendAndExcite": (excite, {"scale": 2.0, "thresholds": {}, **HALF}),
    "TSAM": (tsam, {"scale": 5.0, **OFTEN}),
    "SynGen": (syngen, {"scale": 1.0, **HALF}),
    "CONFORM": (conform, {"scale": 2.0, **ONCE}),
    "FOCUS": (focus, {"strength": 20.0, **HALF}),
    "ComposableDiffusion": (composable, {"weight": 1.0}),
    "DenseDiffusion": (dense, {}),
}
TRIED: dict[str, list[Options]] = {
    "AttendAndExcite": [
        {"scale": scale, "thresholds": thresholds, **HALF}
        for scale, thresholds in ((2.0, {}), (5.0, {}), (20.0, {}), (5.0, {0: 0.5, 5: 0.8}))
    ],
    "TSAM": [{"scale": 2.0, **ONCE}, {"scale": 5.0, **ONCE}, {"scale": 5.0, **OFTEN}],
    "SynGen": [{"scale": 1.0, **HALF}, {"scale": 4.0, **HALF}],
    "CONFORM": [{"scale": 2.0, **ONCE}, {"scale": 5.0, **ONCE}, {"scale": 2.0, **OFTEN}],
    "FOCUS": [{"strength": 5.0}, {"strength": 20.0}, {"strength": 20.0, **HALF}, {"strength": 60.0, **HALF}],
    "ComposableDiffusion": [{"weight": 0.5}, {"weight": 0.7}],
}


def picture(titles: Sequence[str], results: Sequence[Evaluation], count: int) -> Any:
    """The first seeds, without and with each method."""
    strips = []
    for index in range(count):
        scene, panels = results[0].scenes[index], []
        for title, result in zip(titles, results, strict=True):
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            lines = found_lines(scene.objects, found)
            panels.append(Panel(result.images[index], title, lines, result.scores[index].strict))
        strips.append(Strip(f"seed {results[0].seeds[index]}: {scene.prompt}", panels))
    notes = ["Below each picture: what a detector found of the prompt's objects. Green frame: all of them."]
    return draw_sheet(
        strips, title="Every method on the shapes model, the same seeds", notes=notes, columns=1, side=230
    )


def parser() -> argparse.ArgumentParser:
    made = pairs.parser(__doc__)
    made.add_argument("--methods", nargs="+", choices=SHOWN, help="default: all")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, keep and draw."""
    names = [name for name in SHOWN if arguments.methods is None or name in arguments.methods]
    tried = {name: TRIED.get(name, []) if arguments.tune else [SHOWN[name][1]] for name in names}
    chosen = [(name, options) for name in names for options in tried[name]]
    pipe = load_pipeline(device=arguments.device)
    results = pairs.drawn(pipe, arguments, [Arm(), *(SHOWN[name][0](options) for name, options in chosen)])
    row = pairs.line(arguments, pairs.rates(chosen, results), objects=2, scheduler=type(pipe.scheduler).__name__)
    pairs.keep(arguments, "methods", row)
    print(rates_table(row))
    if not (arguments.tune or arguments.methods or arguments.results):
        titles = [pairs.PLAIN, *(name for name, _ in chosen)]
        picture(titles, results, 4).save(ROOT / "docs" / "methods.png", optimize=True)
    return 0
