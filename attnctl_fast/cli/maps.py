"""`attnctl-fast maps`: show where the user's own model attends to each word."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..attach.engine import engine_of
from ..attach.layers import LayerChoice, both_streams, by_downsampling, of_transformer
from ..pipeline import capture
from .model import Settings, draw, load
from .pictures import Panel, Strip, draw_sheet, heat_map
from .report import check_absent, write_report

if TYPE_CHECKING:
    from PIL.Image import Image


def run(arguments: argparse.Namespace) -> None:
    """Draw a picture and save it, a heat map over it for every word, `maps.png` and `maps.json`.

    Raises:
        ValueError: a setting that the model or the machine cannot meet, such as a word that is not in the prompt.
        OSError: the model is not found, or a file is there already.
    """
    settings, out = Settings.of(arguments), arguments.out
    picture, overview, report = out / f"{settings.seed}.png", out / "maps.png", out / "maps.json"
    check_absent([picture, overview, report], overwrite=arguments.overwrite)
    pipe = load(settings)
    with capture(pipe, arguments.words, arguments.layers or default_layers(pipe)) as maps:
        (image,) = draw(pipe, settings)
    (found,) = maps.per_word()
    if not found:
        raise ValueError(f"--prompt {settings.prompt!r} has no words to show")
    assert maps.words is not None
    names = file_names(list(found), settings.seed)
    check_absent([out / name for name in names.values()], overwrite=arguments.overwrite)

    out.mkdir(parents=True, exist_ok=True)
    image.save(picture)
    print(picture)
    strips = [Strip(settings.prompt, [Panel(image, f"seed {settings.seed}")])]
    words: dict[str, Any] = {}
    for word, heat in found.items():
        shown: Image = heat_map(image, heat.numpy())
        shown.save(out / names[word])
        print(out / names[word])
        peak = float(heat.max())
        strips.append(Strip(word, [Panel(shown, f"peak {peak:.3f}")]))
        words[word] = {"file": names[word], "token_ids": maps.words[0][word], "peak": peak}
    draw_sheet(strips, title=settings.model).save(overview)
    print(overview)
    given = {**asdict(settings), "layers": arguments.layers, "words": arguments.words}
    write_report(report, pipe, given, {"layers": list(maps), "file": picture.name, "words": words})


def default_layers(pipe: Any) -> LayerChoice:
    """Choose the layers at a quarter of the latents' size, or the nearest to it that has cross-attention.

    There maps say most (Hertz et al., arXiv 2208.01626). Of two as near, the coarser is chosen. The layers of a
    transformer have one size; of FLUX those of a single stream are left out, as latent guidance does.
    """
    layers = {name: layer for name, layer in engine_of(pipe).layers.items() if layer.cross}
    if of_transformer(layers):
        return both_streams(layers)
    factors = {layer.factor for layer in layers.values()}
    return by_downsampling(min(factors, key=lambda factor: (abs(math.log2(factor) - 2), -factor)))


def file_names(words: list[str], seed: int) -> dict[str, str]:
    """Give every word a file name that any file system takes, no two the same even without case."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for word in words:
        # Names of files may have 255 bytes, and a letter up to four.
        safe = re.sub(r"\W+", "-", word)[:50].strip("-") or "sign"
        name, number = safe, 1
        while name.casefold() in taken:
            number += 1
            name = f"{safe}-{number}"
        taken.add(name.casefold())
        names[word] = f"{seed}-{name}.png"
    return names
