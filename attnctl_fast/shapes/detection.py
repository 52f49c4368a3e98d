"""Finding coloured shapes in a picture, without learned weights, and scoring them against a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .drawing import BACKGROUND, PALETTE, SIZE, coverage
from .scene import COLOURS, SHAPES, Scene

_PRESENT = 0.45
_MIN_COSINE = 0.9
_MIN_AREA = 45
_MIN_SCORE = 0.62
_MAX_ASPECT = 1.45
_GRID = 24


class Detection(NamedTuple):
    """One object: its colour and shape, the box `(x0, y0, x1, y1)` in pixels, and how well the shape fits, 0..1."""

    colour: str
    shape: str
    box: tuple[float, float, float, float]
    score: float


class Score(NamedTuple):
    """The answer of a picture to its prompt.

    `strict`: every prompted (colour, shape) pair was found; `exact`: strict, and there is no other object; `colours`:
    every prompted colour was found, on whichever shape.
    """

    strict: bool
    exact: bool
    colours: bool


def detect(image: Image.Image) -> list[Detection]:
    """Return the coloured shapes in a 64x64 picture, largest first.

    A pixel belongs to the colour whose direction away from the background is nearest to its own, which antialiasing and
    blur do not change. Every connected region of one colour is compared with templates of the six shapes, drawn and
    normalised in the same way; a region that fits none of them is no object.

    Raises:
        ValueError: if the picture is not 64x64 pixels.
    """
    if image.size != (SIZE, SIZE):
        raise ValueError(
            f"the detector reads {SIZE}x{SIZE} pictures, got {image.size[0]}x{image.size[1]}: resize it first"
        )
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    colour, amount = _colour_amounts(pixels)
    regions = []
    for index, name in enumerate(COLOURS):
        own = colour == index
        for region in _components(own & (amount >= _PRESENT)):
            if region.sum() >= _MIN_AREA:
                regions.append((name, region, np.where(own & _dilated(region), amount, 0.0)))
    regions.sort(key=lambda entry: -entry[1].sum())
    found = (_classify(name, soft) for name, _, soft in regions)
    return [detection for detection in found if detection is not None]


def score(scene: Scene, detections: Sequence[Detection]) -> Score:
    """Score what was detected against what `scene.prompt` asks for."""
    found = [(detection.colour, detection.shape) for detection in detections]
    strict = set(scene.objects) <= set(found)
    colours = set(scene.colours) <= {colour for colour, _ in found}
    return Score(strict, strict and len(found) == len(scene.objects), colours)


FAILURES = ("blend", "wrong colour", "duplicate", "neglect")


def failures(scene: Scene, detections: Sequence[Detection]) -> frozenset[str]:
    """Return how a picture fails its prompt, of `FAILURES`; nothing where it shows every object once.

    Blend: an object has the colour of one prompted object and the shape of another; wrong colour: a prompted shape is
    there in a colour that the prompt does not name; duplicate: a prompted object is there more than once; neglect: of
    a prompted object there is neither the colour nor the shape.
    """
    found = [(detection.colour, detection.shape) for detection in detections]
    other = [pair for pair in found if pair not in scene.objects]
    kinds = set()
    if any(colour in scene.colours and shape in scene.nouns for colour, shape in other):
        kinds.add("blend")
    if any(colour not in scene.colours and shape in scene.nouns for colour, shape in other):
        kinds.add("wrong colour")
    if any(found.count(pair) > 1 for pair in scene.objects):
        kinds.add("duplicate")
    if any(all(seen[0] != colour and seen[1] != shape for seen in found) for colour, shape in scene.objects):
        kinds.add("neglect")
    return frozenset(kinds)


def _colour_amounts(pixels: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return for every pixel the nearest colour's index and how much of it there is.

    0 is none, 1 pure; both are `[64,64]`.
    """
    away = np.array([PALETTE[name] for name in COLOURS], dtype=np.float64) - BACKGROUND
    lengths = np.linalg.norm(away, axis=1)
    difference = pixels - BACKGROUND
    along = difference @ (away / lengths[:, None]).T
    colour = along.argmax(axis=-1)
    alike = along.max(axis=-1) >= _MIN_COSINE * np.linalg.norm(difference, axis=-1)
    amount = np.take_along_axis(along / lengths, colour[..., None], axis=-1)[..., 0]
    return colour, np.where(alike, np.clip(amount, 0, 1), 0.0)


def _components(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the 8-connected regions of a mask, each a mask of the same size."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        region = np.zeros_like(mask)
        stack = [left.pop()]
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            around = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= around
            stack.extend(around)
        regions.append(region)
    return regions


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask and its 8-neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifted = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.logical_or.reduce(shifted)


def _classify(colour: str, soft: NDArray[np.float64]) -> Detection | None:
    box = _box(soft)
    width, height = box[2] - box[0], box[3] - box[1]
    if max(width, height) > _MAX_ASPECT * min(width, height):
        return None
    patch = _normalised(soft, box)
    templates = _templates()
    overlap = np.minimum(patch, templates).sum(axis=(1, 2)) / np.maximum(patch, templates).sum(axis=(1, 2))
    best = int(overlap.argmax())
    if overlap[best] < _MIN_SCORE:
        return None
    return Detection(colour, SHAPES[best], box, float(overlap[best]))


@lru_cache(maxsize=1)
def _templates() -> NDArray[np.float64]:
    """Return every shape as a normalised patch, averaged over sizes and sub-pixel places, `[6, 24, 24]`."""
    patches = np.zeros((len(SHAPES), _GRID, _GRID))
    views = [(radius, offset) for radius in (9.0, 11.0, 13.0, 15.0) for offset in (0.0, 0.25, 0.5)]
    for index, shape in enumerate(SHAPES):
        for radius, offset in views:
            soft = coverage(shape, SIZE / 2 + offset, SIZE / 2 + offset, radius)
            patches[index] += _normalised(soft, _box(soft)) / len(views)
    return patches


def _box(soft: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return the box `(x0, y0, x1, y1)` where the profile of a soft mask crosses one half, between pixels."""
    x0, x1 = _extent(soft.max(axis=0))
    y0, y1 = _extent(soft.max(axis=1))
    return x0, y0, x1, y1


def _extent(profile: NDArray[np.float64]) -> tuple[float, float]:
    padded = np.pad(profile, 1)
    high = np.nonzero(padded >= _PRESENT)[0]
    first, last = int(high[0]), int(high[-1])
    start = first - (padded[first] - _PRESENT) / max(padded[first] - padded[first - 1], 1e-6)
    end = last + (padded[last] - _PRESENT) / max(padded[last] - padded[last + 1], 1e-6)
    # Index i of the padded profile is the centre of pixel i - 1, which lies at i - 0.5.
    return float(start) - 0.5, float(end) - 0.5


def _normalised(soft: NDArray[np.float64], box: tuple[float, float, float, float]) -> NDArray[np.float64]:
    """Return the soft mask inside the box, bilinearly resampled to 24x24."""
    x0, y0, x1, y1 = box
    ticks = (np.arange(_GRID) + 0.5) / _GRID
    rows = _interpolation(y0 + ticks * (y1 - y0), soft.shape[0])
    columns = _interpolation(x0 + ticks * (x1 - x0), soft.shape[1])
    return rows @ soft @ columns.T


def _interpolation(positions: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return linear interpolation weights `[positions, size]`; the centre of pixel i lies at i + 0.5."""
    distance = np.abs(positions[:, None] - (np.arange(size) + 0.5))
    return np.clip(1 - distance, 0, None)
