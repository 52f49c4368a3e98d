"""`attnctl-fast generate`: draw with the user's own model and a method on."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..pipeline import control
from .method_options import given_options, make_method
from .model import Settings, draw, load
from .pictures import Panel, Strip, draw_sheet
from .report import check_absent, write_report

if TYPE_CHECKING:
    from PIL.Image import Image


def run(arguments: argparse.Namespace) -> None:
    """Draw and save the pictures and `generate.json`.

    Raises:
        ValueError: a setting that the model or the machine cannot meet, such as a target that is not in the prompt.
        OSError: the model is not found, or a file is there already.
    """
    settings, name, out = Settings.of(arguments), arguments.method, arguments.out
    arms = ["plain", name] if arguments.compare else [name]
    seeds = range(settings.seed, settings.seed + arguments.num_images)
    files = {(seed, arm): out / f"{seed}-{arm}.png" for seed in seeds for arm in arms}
    others = [out / "generate.json", *([out / "compare.png"] if arguments.compare else [])]
    check_absent([*files.values(), *others], overwrite=arguments.overwrite)

    options = given_options(arguments, [name])
    method = make_method(name, options, settings.prompt)
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
    if arguments.compare:
        strips = [
            Strip(f"{seed}: {settings.prompt}", [Panel(images[seed, arm], arm) for arm in arms]) for seed in seeds
        ]
        draw_sheet(strips, title=settings.model, columns=2, side=384).save(out / "compare.png")
        print(out / "compare.png")
    write_report(
        out / "generate.json",
        pipe,
        {**asdict(settings), "method": name, "num_images": len(seeds), **options},
        {
            "method": {"name": type(method).__name__, **asdict(method)},
            "seconds": seconds,
            "files": [path.name for path in files.values()],
        },
    )
