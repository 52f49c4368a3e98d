"""Pictures to look at: a labelled sheet of many, and a heat map over one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (30, 32, 36), (112, 116, 124), (224, 226, 230)
_RIGHT, _WRONG, _EXTRA = (26, 138, 66), (200, 42, 42), (190, 120, 10)
_COLOURS = {"right": _RIGHT, "wrong": _WRONG, "extra": _EXTRA}
# Points of matplotlib's inferno: lightness rises evenly, so that it reads without colour vision too.
_HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])
_OPACITY = 0.65


@dataclass(frozen=True)
class Panel:
    """One image with its title above it and the lines below: `(mark, text)`, the mark `right`, `wrong` or `extra`.

    `good` colours the frame: green for true, red for false, grey for `None`.
    """

    image: Image.Image
    title: str
    lines: Sequence[tuple[str, str]] = ()
    good: bool | None = None


@dataclass(frozen=True)
class Strip:
    """The panels of one prompt, side by side."""

    prompt: str
    panels: Sequence[Panel]


def found_lines(objects: Sequence[tuple[str, str]], found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Compare what a detector found with what was asked for, (colour, shape) pairs, as the lines of a `Panel`."""
    surplus = Counter(found)
    lines = []
    for pair in objects:
        present = surplus[pair] > 0
        surplus[pair] -= present
        lines.append(("right" if present else "wrong", " ".join(pair)))
    extra = list((+surplus).elements())
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        lines.append(("extra", " ".join(extra[0]) + more))
    return lines


def draw_sheet(
    strips: Sequence[Strip], *, title: str, notes: Sequence[str] = (), columns: int = 4, side: int = 264
) -> Image.Image:
    """Lay out strips in a number of columns; every image is enlarged to fit a square of `side` pixels.

    Returns:
        An RGB image.
    """
    text, small, large = (ImageFont.load_default(size) for size in (22, 20, 28))
    gap, margin, line, frame = 14, 36, 27, 4
    panels = max(len(strip.panels) for strip in strips)
    lines = max(len(panel.lines) for strip in strips for panel in strip.panels)
    columns = min(columns, len(strips))
    strip_width = panels * side + (panels - 1) * gap
    prompt_lines = max(len(_wrapped(strip.prompt, text, strip_width)) for strip in strips)
    image_top = prompt_lines * 30 + 32
    strip_height = image_top + side + 8 + lines * line
    head, foot = 62, (12 + 28 * len(notes) if notes else 0)
    height = margin + head + -(-len(strips) // columns) * (strip_height + margin) + foot
    width = max(margin + columns * (strip_width + margin), int(large.getlength(title)) + 2 * margin)
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 8), title, _INK, large)

    for index, strip in enumerate(strips):
        left = margin + (index % columns) * (strip_width + margin)
        top = margin + head + (index // columns) * (strip_height + margin)
        draw.line((left, top - 12, left + strip_width, top - 12), _RULE, 2)
        for number, words in enumerate(_wrapped(strip.prompt, text, strip_width)):
            draw.text((left, top + 30 * number), words, _INK, text)
        for panel in strip.panels:
            draw.text((left, top + image_top - 28), panel.title, _FAINT, small)
            box = (left, top + image_top, left + side, top + image_top + side)
            colour = _RULE if panel.good is None else _RIGHT if panel.good else _WRONG
            draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
            picture = _fitted(panel.image, side - 2 * frame)
            x, y = left + (side - picture.width) // 2, top + image_top + (side - picture.height) // 2
            canvas.paste(picture, (x, y))
            for number, (mark, words) in enumerate(panel.lines):
                y = box[3] + 8 + line * number
                _mark(draw, mark, left + 2, y + 4)
                draw.text((left + 26, y), words, _INK if mark == "right" else _COLOURS[mark], small)
            left += side + gap
    for number, note in enumerate(notes):
        draw.text((margin, height - margin // 2 - foot + 28 * number), note, _FAINT, small)
    return canvas


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _wrapped(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _mark(draw: ImageDraw.ImageDraw, mark: str, x: int, y: int) -> None:
    # Drawn, since not every font has the signs.
    strokes = {
        "right": [(0, 9, 6, 15), (6, 15, 16, 2)],
        "wrong": [(2, 3, 14, 15), (2, 15, 14, 3)],
        "extra": [(8, 2, 8, 16), (1, 9, 15, 9)],
    }[mark]
    for x0, y0, x1, y1 in strokes:
        draw.line((x + x0, y + y0, x + x1, y + y1), _COLOURS[mark], 3)


def heat_map(image: Image.Image, values: np.ndarray) -> Image.Image:
    """Lay a map `[height, width]`, not negative, over an image of any size, which is made grey.

    Colours run from black at zero to light yellow at the map's maximum.

    Returns:
        An RGB image of the size of `image`.
    """
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(_coloured(_scaled(values, image.size))), _OPACITY)


def heat_strip(maps: Sequence[np.ndarray], side: int = 32) -> Image.Image:
    """Draw maps `[height, width]`, not negative, below each other, each as a square in the colours of `heat_map`.

    Returns:
        A palette image, `side` wide.
    """
    heat = np.concatenate([_scaled(values, (side, side)) for values in maps])
    strip = Image.fromarray((255 * heat).round().astype(np.uint8)).convert("P")
    strip.putpalette(_coloured(np.linspace(0, 1, 256)).tobytes())
    return strip


def _scaled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map in another size, width and height, divided by its maximum."""
    peak = values.max()
    scaled = Image.fromarray((values / peak if peak > 0 else values).astype(np.float32))
    return np.asarray(scaled.resize(size, Image.Resampling.BICUBIC)).clip(0, 1)


def _coloured(heat: np.ndarray) -> np.ndarray:
    """Return the colours, uint8 `[..., 3]`, of values from 0 to 1."""
    points = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(heat, points, channel) for channel in _HEAT.T], axis=-1)
    return colours.round().astype(np.uint8)
