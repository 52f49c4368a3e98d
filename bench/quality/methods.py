"""Detection rates of every method on the shapes model, side by side: pairs of pictures, a table and a picture grid.

    python -m bench methods             the figures of the README: seeds 0..n-1, and docs/methods.png
    python -m bench methods --tune      other settings, on seeds from 100000 on
    python -m bench report              put the last figures into the README

Every run appends one line to bench/results/shapes_methods.jsonl (--tune: shapes_methods_tuning.jsonl) and prints it as
a table. All methods draw the same two-object prompts from the same seeds, batch by batch in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import attnctl_fast as ac
from attnctl_fast.cli.pictures import Panel, Strip, draw_sheet, found_lines
from attnctl_fast.cli.report import overhead, spread, versions
from attnctl_fast.shapes import Scene, load_pipeline, render
from attnctl_fast.shapes.evaluate import Arm, Evaluation, compare, energy, interleaved, phrase, regulation
from attnctl_fast.shapes.model import LAYERS
from bench.harness.checkout import RESULTS, ROOT, append, git_state
from bench.quality.rates import TUNING_SEED
from bench.report.tables import methods_table

STEPS, GUIDANCE = 25, 5.0
Options = Mapping[str, Any]
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
    "ComposableDiffusion": [{"weight": 0.5}, {"weight": 0.7}],
}


def measure(
    pipe: Any,
    choices: Mapping[str, tuple[Make, list[Options]]],
    seeds: Sequence[int],
    batch_size: int,
    steps: int,
) -> tuple[dict[str, Any], dict[str, Evaluation]]:
    """What a line of results holds of the methods, and the pictures of every arm."""
    settings = [(name, make, options) for name, (make, tried) in choices.items() for options in tried]
    arms = {"plain": Arm()} | {f"{name} {i}": make(options) for i, (name, make, options) in enumerate(settings)}
    results = interleaved(pipe, seeds, arms, num_inference_steps=steps, guidance_scale=GUIDANCE, batch_size=batch_size)
    plain = results["plain"]
    rows = []
    for i, (name, _, options) in enumerate(settings):
        result = results[f"{name} {i}"]
        rows.append(
            {
                "method": name,
                "options": dict(options),
                **asdict(compare(plain, result)),
                "overhead_percent": overhead(plain.seconds_per_image, result.seconds_per_image),
            }
        )
    rates = {name: plain.hits(name) / len(seeds) for name in ("strict", "exact", "colours")}
    return {"plain": rates | {"seconds_per_image": spread(plain.seconds_per_image)}, "rows": rows}, results


def picture(results: Mapping[str, Evaluation], count: int) -> Any:
    """The first seeds, without and with each method."""
    strips = []
    plain = results["plain"]
    for index in range(count):
        scene, panels = plain.scenes[index], []
        for name, result in results.items():
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            lines = found_lines(scene.objects, found)
            panels.append(
                Panel(result.images[index], name.rpartition(" ")[0] or name, lines, result.scores[index].strict)
            )
        strips.append(Strip(f"seed {plain.seeds[index]}: {scene.prompt}", panels))
    notes = ["Below each picture: what a detector found of the prompt's objects. Green frame: all of them."]
    return draw_sheet(
        strips, title="Every method on the shapes model, the same seeds", notes=notes, columns=1, side=230
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tune", action="store_true", help=f"other settings, on seeds from {TUNING_SEED} on")
    made.add_argument("--methods", nargs="+", choices=SHOWN, help="default: all")
    made.add_argument("--count", type=int, default=128, help="pictures per arm")
    made.add_argument("--batch-size", type=int, default=16)
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--device", default="cpu")
    made.add_argument("--results", type=Path, metavar="FILE", help="file to append to")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, keep and draw."""
    names = [name for name in SHOWN if (arguments.methods is None or name in arguments.methods)]
    tried = {name: TRIED.get(name, []) if arguments.tune else [SHOWN[name][1]] for name in names}
    choices = {name: (SHOWN[name][0], options) for name, options in tried.items()}
    start = TUNING_SEED if arguments.tune else 0
    seeds = range(start, start + arguments.count)
    found, results = measure(
        load_pipeline(device=arguments.device),
        choices,
        seeds,
        arguments.batch_size,
        arguments.steps,
    )
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "git": git_state(),
        "versions": versions(),
        "settings": {
            "count": len(seeds),
            "seed_start": start,
            "steps": arguments.steps,
            "guidance_scale": GUIDANCE,
            "batch_size": arguments.batch_size,
        },
        **found,
    }
    path = RESULTS / ("shapes_methods_tuning.jsonl" if arguments.tune else "shapes_methods.jsonl")
    append(arguments.results or path, row)
    print(methods_table(row))
    if not (arguments.tune or arguments.methods or arguments.results):
        picture(results, 4).save(ROOT / "docs" / "methods.png", optimize=True)
    return 0
