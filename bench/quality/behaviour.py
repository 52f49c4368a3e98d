"""What context updates and compositions do on the shapes model: detection rates over pairs of pictures, and a picture.

    python -m bench behaviour             the figures of the README: seeds 0..n-1, and docs/behaviour.png
    python -m bench behaviour --tune      other settings, on seeds from 100000 on
    python -m bench report               put the last figures into the README

Every run appends one line to bench/results/shapes_behaviour.jsonl (--tune: shapes_behaviour_tuning.jsonl) and prints it
as a table. Each task draws the same seeds without and with a method and asks one question about each picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctl_fast.cli.pictures import Panel, Strip, draw_sheet, found_lines
from attnctl_fast.cli.report import spread
from attnctl_fast.methods import NAG, ComposableDiffusion, Composition, Edit
from attnctl_fast.schedules import Schedule, step
from attnctl_fast.shapes import COLOURS, Scene, load_pipeline, render
from attnctl_fast.shapes.evaluate import (
    ADDED,
    MOVED,
    NEGATED,
    Arm,
    Evaluation,
    energy,
    first_object,
    mcnemar,
    phrase,
    second_object,
)
from bench.harness.checkout import ROOT
from bench.harness.rows import Row
from bench.quality import pairs
from bench.quality.pairs import Options
from bench.report.tables import behaviour_table
from examples.edit_image import invert

Found = Sequence[tuple[str, str]]
# The best on the tuning seeds.
SEARCHED: Options = {"gamma_attn": 0.03, "gamma_norm": 0.03}
INPAINTED: Options = {"gamma_attn": 0.025, "gamma_norm": 0.025}
AVOIDED: Options = {"scale": 11.0, "tau": 5.0, "alpha": 0.5}
COMPOSED: Options = {"weight": 1.0}
RECOLOURED: Options = {"weight": 1.0, "away": 0.7, "start": 0.0, "gamma": 0.0}


@dataclass(frozen=True)
class Task:
    """question: what counts, of a scene and what was found. base: what the plain arm is. objects: per prompt. arms: the
    plain arm and the method's, from pipeline, settings and steps. settings: those of the README. tried: on the tuning
    seeds."""

    question: str
    base: str
    objects: int
    counts: Callable[[Scene, Found], bool]
    arms: Callable[[Any, Sequence[Options], int], list[Arm]]
    settings: Sequence[Options]
    tried: Sequence[Options]
    inpainting: bool = False


def both(scene: Scene, found: Found) -> bool:
    return all(one in found for one in scene.objects)


def only_first(scene: Scene, found: Found) -> bool:
    return scene.objects[0] in found and scene.objects[1] not in found


def recoloured(scene: Scene) -> Scene:
    """The scene's only object in another colour."""
    (colour, shape) = scene.objects[0]
    return Scene(((COLOURS[(COLOURS.index(colour) + 2) % len(COLOURS)], shape),))


def only_recoloured(scene: Scene, found: Found) -> bool:
    return list(found) == list(recoloured(scene).objects)


def energy_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    return [Arm(), *(Arm(energy(**options)) for options in settings)]


def add_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    return [
        Arm(options=first_object),
        *(Arm(second_object(+1, **options), options=first_object) for options in settings),
    ]


def compose_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    """Two prompts of an object each; the second one's own pictures are an arm as well."""

    def composed(options: Options) -> Callable[[Sequence[Scene]], Sequence[ComposableDiffusion]]:
        weights = [options["weight"]] * 2
        return lambda scenes: (ComposableDiffusion([[phrase(x, 0), phrase(x, 1)] for x in scenes], weights),)

    def second_alone(scenes: Sequence[Scene], _: Sequence[int]) -> dict[str, Any]:
        return {"prompt": [phrase(scene, 1) for scene in scenes]}

    arms = [Arm(composed(x)) if x else Arm(options=second_alone) for x in settings]
    return [Arm(options=first_object), *arms]


def negate_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    return [Arm(), *(Arm(second_object(-1, **options)) for options in settings)]


def without_guidance(scenes: Sequence[Scene], seeds: Sequence[int]) -> dict[str, Any]:
    return {"guidance_scale": 1.0}


def avoid_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    """The second object's text as what the picture is not to be."""

    def avoiding(options: Options) -> Callable[[Sequence[Scene]], Sequence[NAG]]:
        return lambda scenes: (NAG([phrase(scene, 1) for scene in scenes], **options),)

    return [Arm(options=without_guidance), *(Arm(avoiding(x), options=without_guidance) for x in settings)]


def inpaint_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    return [Arm(options=erased), *(Arm(energy(**options), options=erased) for options in settings)]


def erased(scenes: Sequence[Scene], seeds: Sequence[int]) -> dict[str, Any]:
    """Pictures of the scenes whose second object is erased and to be drawn again."""
    pictures, masks = [], []
    for scene, seed in zip(scenes, seeds, strict=True):
        drawn = render(scene, seed)
        pixels, mask = np.asarray(drawn.image).copy(), np.zeros(drawn.masks.shape[1:], np.uint8)
        rows, columns = np.nonzero(drawn.masks[1])
        mask[max(rows.min() - 5, 0) : rows.max() + 6, max(columns.min() - 5, 0) : columns.max() + 6] = 255
        pixels[mask > 0] = pixels[0, 0]
        pictures.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(mask))
    size = {"height": pictures[0].height, "width": pictures[0].width}
    return {"image": pictures, "mask_image": masks, "strength": 1.0, **size}


def edit_arms(pipe: Any, settings: Sequence[Options], steps: int) -> list[Arm]:
    """Pictures inverted under their caption; plain is the new prompt from the same noise."""
    noises: dict[int, torch.Tensor] = {}

    def inverted(scenes: Sequence[Scene], seeds: Sequence[int]) -> dict[str, Any]:
        captions = [scene.prompt for scene in scenes]
        if not noises.keys() >= set(seeds):
            pictures = [render(scene, seed).image for scene, seed in zip(scenes, seeds, strict=True)]
            noises.update(zip(seeds, invert(pipe, pictures, captions, steps).split(1), strict=True))
        return {"latents": torch.cat([noises[seed] for seed in seeds]), "negative_prompt": captions}

    def composed(options: Options) -> Callable[[Sequence[Scene]], Sequence[Composition]]:
        how = {"gamma_attn": options["gamma"], "gamma_norm": options["gamma"], "start": options.get("start", 0.0)}

        def methods(scenes: Sequence[Scene]) -> Sequence[Composition]:
            new, old = [recoloured(scene).prompt for scene in scenes], [scene.prompt for scene in scenes]
            away = [Edit(old, options["away"], direction=-1, **how)] if options["away"] else []
            return (Composition([Edit(new, options["weight"], **how), *away]),)

        return methods

    def prompted(scenes: Sequence[Scene], seeds: Sequence[int]) -> dict[str, Any]:
        return inverted(scenes, seeds) | {"prompt": [recoloured(scene).prompt for scene in scenes]}

    return [Arm(options=prompted), *(Arm(composed(options), options=inverted) for options in settings)]


TASKS: dict[str, Task] = {
    "context update, two objects": Task(
        "both objects are there",
        "the same prompt",
        2,
        both,
        energy_arms,
        (SEARCHED, MOVED),
        [
            *({"gamma_attn": a, "gamma_norm": b} for a, b in ((0.003, 0.1), (0.01, 0.02), (0.03, 0.03))),
            *({"gamma_attn": 0.0, "gamma_norm": b, "schedule": step(0.2)} for b in (0.1, 0.3, 0.4)),
            {"gamma_attn": 0.003, "gamma_norm": 0.3, "schedule": step(0.2)},
        ],
    ),
    "composition, add an object": Task(
        "both objects are there",
        "a prompt of the first object",
        2,
        both,
        add_arms,
        (ADDED,),
        [{"weight": w, "start": s} for w, s in ((2.0, 0.0), (4.0, 0.0), (6.0, 0.0), (9.0, 0.0))],
    ),
    "Composable Diffusion, two prompts of one object": Task(
        "both objects are there",
        "a prompt of the first object; without a weight, a prompt of the second",
        2,
        both,
        compose_arms,
        ({}, COMPOSED),
        [{"weight": w} for w in (0.4, 0.6, 0.8, 1.0, 1.5)],
    ),
    "composition, negate an object": Task(
        "the first object is there and the second is not",
        "the same prompt",
        2,
        only_first,
        negate_arms,
        (NEGATED,),
        [{"weight": w, "start": s} for w, s in ((0.5, 0.0), (0.7, 0.0), (0.8, 0.0), (0.9, 0.0))],
    ),
    "NAG without guidance, avoid an object": Task(
        "the first object is there and the second is not",
        "the same prompt without guidance",
        2,
        only_first,
        avoid_arms,
        (AVOIDED, {}),
        [
            {},
            *({"scale": s, "tau": t, "alpha": a} for s, t, a in ((3.0, 2.5, 1.0), (5.0, 2.5, 1.0), (11.0, 5.0, 0.5))),
        ],
    ),
    "edit of a given picture, another colour": Task(
        "the object in its new colour is there, and nothing else",
        "the new prompt from the same inverted noise",
        1,
        only_recoloured,
        edit_arms,
        (RECOLOURED,),
        [
            {"weight": w, "away": a, "start": t, "gamma": 0.0}
            for w, a, t in ((1.0, 0.7, 0.2), (2.0, 1.5, 0.0), (2.0, 1.5, 0.3), (4.0, 3.0, 0.0))
        ]
        + [RECOLOURED],
    ),
    "context update, inpainting": Task(
        "both objects are there",
        "the same mask and prompt",
        2,
        both,
        inpaint_arms,
        (INPAINTED,),
        [{"gamma_attn": a, "gamma_norm": b} for a, b in ((0.025, 0.025), (0.05, 0.05), (0.1, 0.1), (0.0, 0.3))],
        inpainting=True,
    ),
}


def run_task(
    pipe: Any, task: Task, arguments: argparse.Namespace, progress: bool = True
) -> tuple[Row, list[Evaluation]]:
    """What a line of results holds of a task, and the pictures of all arms."""
    if task.inpainting:
        from diffusers import StableDiffusionInpaintPipeline

        pipe = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    settings = task.tried if arguments.tune else task.settings
    arms = task.arms(pipe, settings, arguments.steps)
    results = pairs.drawn(pipe, arguments, arms, task.objects, progress)
    plain, *answers = (
        [
            task.counts(scene, [(seen.colour, seen.shape) for seen in found])
            for scene, found in zip(result.scenes, result.detections, strict=True)
        ]
        for result in results
    )
    rows = []
    for options, result, after in zip(settings, results[1:], answers, strict=True):
        gained, lost = (list(zip(plain, after, strict=True)).count(pair) for pair in ((False, True), (True, False)))
        rows.append(
            {
                "options": {name: asdict(x) if isinstance(x, Schedule) else x for name, x in options.items()},
                "rate": sum(after) / len(after),
                "gained": gained,
                "lost": lost,
                "p_value": mcnemar(gained, lost),
                **pairs.cost(results[0], result),
            }
        )
    before = {"rate": sum(plain) / len(plain), "seconds_per_image": spread(results[0].seconds_per_image)}
    return {"question": task.question, "base": task.base, pairs.PLAIN: before, "rows": rows}, results


def strips_of(name: str, task: Task, results: Sequence[Evaluation], count: int) -> list[Strip]:
    strips = []
    plain, method = results[:2]
    for index in range(count):
        scene, panels = plain.scenes[index], []
        for title, result in ((pairs.PLAIN, plain), ("with the method", method)):
            found = [(seen.colour, seen.shape) for seen in result.detections[index]]
            wanted = recoloured(scene) if task.counts is only_recoloured else scene
            lines = found_lines(wanted.objects, found)
            panels.append(Panel(result.images[index], title, lines, task.counts(scene, found)))
        strips.append(Strip(f"{name}; seed {plain.seeds[index]}: {scene.prompt}", panels))
    return strips


def parser() -> argparse.ArgumentParser:
    made = pairs.parser(__doc__)
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, keep and draw."""
    pipe = load_pipeline(device=arguments.device)
    tasks: dict[str, Row] = {}
    strips: list[Strip] = []
    for name in arguments.tasks:
        tasks[name], results = run_task(pipe, TASKS[name], arguments)
        strips += strips_of(name, TASKS[name], results, min(2, arguments.count))
        row = pairs.line(arguments, {"tasks": tasks})
        print(behaviour_table(row), flush=True)
    pairs.keep(arguments, "behaviour", row)
    if not (arguments.tune or arguments.results) and len(arguments.tasks) == len(TASKS):
        notes = [
            "Below each picture: what a detector found of the prompt's objects. Green frame: as asked for (see the "
            "questions of the table)."
        ]
        title = "Context update and composition on the shapes model: the same seeds without and with"
        draw_sheet(strips, title=title, notes=notes, columns=2).save(ROOT / "docs" / "behaviour.png", optimize=True)
    return 0
