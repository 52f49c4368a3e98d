"""`attnctl-fast generate`: the user's own model with a method on."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ._choice import MethodSettings, chosen_method
from ._grid import Panel, Row, draw_grid
from ._model import check_absent, draw, load, write_report
from .pipeline import control

if TYPE_CHECKING:
    from PIL.Image import Image


def generate(settings: MethodSettings, *, compare: bool, overwrite: bool, out: Path) -> None:
    """Draw and save the pictures and `generate.json`.

    Raises:
        ValueError: a setting that the model or the machine cannot meet, such as a target that is not in the prompt.
        OSError: the model is not found, or a file is there already.
    """
    arms = ["plain", settings.method] if compare else [settings.method]
    seeds = range(settings.seed, settings.seed + settings.num_images)
    files = {(seed, arm): out / f"{seed}-{arm}.png" for seed in seeds for arm in arms}
    others = [out / "generate.json", *([out / "compare.png"] if compare else [])]
    check_absent([*files.values(), *others], overwrite=overwrite)

    method = chosen_method(settings)
    pipe = load(settings)
    images: dict[tuple[int, str], Image] = {}
    seconds = {}
    for arm in arms:
        start = time.perf_counter()
        with nullcontext() if arm == "plain" else control(pipe, method):
            drawn = draw(pipe, settings, len(seeds))
        seconds[arm] = time.perf_counter() - start
        images.update({(seed, arm): image for seed, image in zip(seeds, drawn, strict=True)})

    out.mkdir(parents=True, exist_ok=True)
    for key, path in files.items():
        images[key].save(path)
        print(path)
    if compare:
        rows = [Row(f"{seed}: {settings.prompt}", [Panel(images[seed, arm], arm) for arm in arms]) for seed in seeds]
        draw_grid(rows, title=settings.model, columns=2, side=384).save(out / "compare.png")
        print(out / "compare.png")
    results = {
        "method": {"name": type(method).__name__, **asdict(method)},
        "seconds": seconds,
        "files": [path.name for path in files.values()],
    }
    write_report(out / "generate.json", pipe, settings, results)
