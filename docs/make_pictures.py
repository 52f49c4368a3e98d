"""Draw the pictures of the first page and of the method pages on the shapes model, into docs/img/methods.

    python docs/make_pictures.py [METHOD ...]     three minutes on one core

Most pages show the first four seeds whose plain picture lacks an object of its prompt, without and with the method. The
settings are those of docs/measurements.md, which has the rates over many seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import attnctl_fast as ac
from attnctl_fast.cli.pictures import Panel, Strip, draw_sheet, found_lines, heat_map
from attnctl_fast.shapes import Scene, detect, load_pipeline, render, scene_for_seed, score
from attnctl_fast.shapes.evaluate import ADDED, MOVED, NEGATED, TUNED, phrase
from attnctl_fast.shapes.unet import LAYERS

OUT = Path(__file__).resolve().parent / "img" / "methods"
STEPS, GUIDANCE = 25, 5.0


def pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(colour, noun) for (colour, _), noun in zip(scene.objects, scene.nouns, strict=True)]


def masks(scene: Scene, seed: int) -> dict[str, torch.Tensor]:
    """Return where another drawing of the scene has its objects."""
    drawn = torch.as_tensor(render(scene, seed).masks).float()
    return {phrase(scene, index): drawn[index] for index in range(len(scene.objects))}


METHODS: dict[str, Callable[[Scene, int], Any]] = {
    "attention-regulation": lambda scene, seed: ac.AttentionRegulation(list(scene.nouns), **TUNED),
    "energy-context": lambda scene, seed: ac.EnergyContext(**MOVED),
    "attend-and-excite": lambda scene, seed: ac.AttendAndExcite(
        list(scene.nouns), layers=LAYERS, scale=5.0, thresholds={}, steps=0.5
    ),
    "tsam": lambda scene, seed: ac.TSAM(layers=LAYERS, scale=2.0, steps=0.5, refinement={}),
    "syngen": lambda scene, seed: ac.SynGen(pairs(scene), layers=LAYERS, scale=1.0, steps=0.5),
    "focus": lambda scene, seed: ac.FOCUS(pairs(scene), layers=LAYERS, strength=20.0, steps=0.5),
    "conform": lambda scene, seed: ac.CONFORM(pairs(scene), layers=LAYERS, scale=5.0, steps=0.5, refinement={}),
    "dense-diffusion": lambda scene, seed: ac.DenseDiffusion(masks(scene, seed)),
    "composable-diffusion": lambda scene, seed: ac.ComposableDiffusion([phrase(scene, 0), phrase(scene, 1)]),
}


@cache
def pipeline() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def plain_picture(prompt: str, seed: int) -> Image.Image:
    return draw(prompt, seed)


def draw(prompt: str, seed: int, *methods: Any) -> Image.Image:
    pipe = pipeline()
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "generator": generator}
    if not methods:
        return pipe(prompt, **options).images[0]
    with ac.control(pipe, *methods):
        return pipe(prompt, **options).images[0]


def panel(image: Image.Image, scene: Scene, title: str) -> Panel:
    found = detect(image)
    lines = found_lines(scene.objects, [(seen.colour, seen.shape) for seen in found])
    return Panel(image, title, lines, score(scene, found).strict)


def strips(name: str, count: int = 4) -> list[Strip]:
    shown: list[Strip] = []
    seed = -1
    while len(shown) < count:
        seed += 1
        scene = scene_for_seed(seed)
        plain = panel(plain_picture(scene.prompt, seed), scene, "plain")
        if plain.good and name != "dense-diffusion":
            continue
        controlled = panel(draw(scene.prompt, seed, METHODS[name](scene, seed)), scene, "with the method")
        panels = [plain, controlled]
        if name == "dense-diffusion":
            panels.insert(1, Panel(_outlines(masks(scene, seed)), "masks"))
        shown.append(Strip(f"seed {seed}: {scene.prompt}", panels))
    return shown


def _outlines(regions: dict[str, torch.Tensor]) -> Image.Image:
    picture = Image.new("L", (64, 64), 255)
    for grey, mask in zip((90, 160), regions.values(), strict=True):
        ImageDraw.Draw(picture).bitmap((0, 0), Image.fromarray((mask.numpy() * 255).astype("uint8")), fill=grey)
    return picture


def compositions() -> list[Strip]:
    """Add the second object to pictures of the first, and take it away where that works first."""
    shown = []
    for seed in (0, 1):
        scene = scene_for_seed(seed)
        first = phrase(scene, 0)
        edit = ac.Composition([ac.Edit(scene.prompt, **ADDED)])
        panels = [panel(plain_picture(first, seed), scene, "plain"), panel(draw(first, seed, edit), scene, "added")]
        shown.append(Strip(f"seed {seed}: {first}", panels))
    seed = -1
    while len(shown) < 4:
        seed += 1
        scene = scene_for_seed(seed)
        edit = ac.Composition([ac.Edit(phrase(scene, 1), direction=-1, **NEGATED)])
        plain = plain_picture(scene.prompt, seed)
        if not panel(plain, scene, "").good:
            continue
        without = panel(draw(scene.prompt, seed, edit), scene, "taken away")
        if [mark for mark, _ in without.lines[:2]] == ["right", "wrong"]:
            panels = [Panel(plain, "plain"), Panel(without.image, without.title)]
            shown.append(Strip(f"seed {seed}: {scene.prompt}", panels))
    return shown


def attention_maps() -> list[Strip]:
    shown = []
    for seed in (0, 5):
        prompt = scene_for_seed(seed).prompt
        with ac.capture(pipeline(), layers=LAYERS) as maps:
            image = draw(prompt, seed)
        (words,) = maps.per_word()
        panels = [
            Panel(heat_map(image, words[word].numpy()), word) for word in words if word.split()[0] not in ("a", "and")
        ]
        shown.append(Strip(f"seed {seed}: {prompt}", [Panel(image, "picture"), *panels]))
    return shown


def start() -> list[Strip]:
    """Draw what docs/index.md draws, with the pipeline's own number of steps."""
    prompt, method = (
        "a red cross and a purple star",
        ac.SynGen([("red", "cross"), ("purple", "star")], scale=1.0, layers=LAYERS),
    )
    shown = []
    for seed in (8, 9, 10):
        images = []
        for methods in ((), (method,)):
            with ac.control(pipeline(), *methods) if methods else nullcontext():
                images += pipeline()(prompt, generator=torch.Generator().manual_seed(seed)).images
        shown.append(Strip(f"seed {seed}", [Panel(images[0], "plain"), Panel(images[1], "with SynGen")]))
    return shown


def sheet(shown: Sequence[Strip], columns: int = 2) -> Image.Image:
    drawn = draw_sheet(shown, title="Seeds on the shapes model", columns=columns, side=200)
    return drawn.quantize(128, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="METHOD", help="pages to draw for; default: all")
    others = {"composition": compositions, "attention-maps": attention_maps, "start": start}
    for name in parser.parse_args().names or [*METHODS, *others]:
        if name in others:
            picture = sheet(others[name](), {"attention-maps": 1, "composition": 2, "start": 3}[name])
        elif name == "dense-diffusion":
            picture = sheet(strips(name, 3), 1)
        else:
            picture = sheet(strips(name))
        OUT.mkdir(parents=True, exist_ok=True)
        picture.save(OUT / f"{name}.png", optimize=True)
        print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()
