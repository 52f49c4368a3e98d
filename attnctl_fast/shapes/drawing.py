"""Drawing scenes: antialiased coloured shapes on light grey, with a mask for each object."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .scene import Scene

SIZE = 64
BACKGROUND = (217, 217, 217)
# As directions away from the background, any two of these are at least 35 degrees apart: see detection.py.
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 30),
    "purple": (185, 40, 200),
    "cyan": (30, 200, 220),
}
_COLOUR_JITTER = 8
_SUPERSAMPLE = 4
_RADII = {1: (10.0, 15.0), 2: (10.0, 14.0), 3: (9.0, 12.0)}
_GAP = 2.0
_MARGIN = 1.0


class Render(NamedTuple):
    """A drawn scene: `image` (PIL, RGB, 64x64) and `masks` (bool `[objects, 64, 64]`, in prompt order)."""

    image: Image.Image
    masks: NDArray[np.bool_]


def inside(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether the points `(u, v)` (v downwards, in units of the radius) lie in the named shape."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "ring":
        rho = u**2 + v**2
        return (rho <= 1) & (rho >= 0.5**2)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.86
    if shape == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (narrow <= 0.32) & (wide <= 1)
    if shape == "triangle":
        return (v <= 0.86) & (np.abs(u) <= (v + 0.94) / 1.8)
    if shape == "star":
        return _in_star(u, v)
    raise ValueError(f"unknown shape {shape!r}")


def _in_star(
    u: NDArray[np.float64], v: NDArray[np.float64], outer: float = 1.08, inner: float = 0.46
) -> NDArray[np.bool_]:
    # Fold the plane into one tenth of the star, from a tip (angle 0) to the neighbouring notch (36 degrees).
    angle = np.arctan2(u, -v) % (2 * math.pi / 5)
    angle = np.minimum(angle, 2 * math.pi / 5 - angle)
    rho = np.hypot(u, v)
    notch_x, notch_y = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    return rho * np.cos(angle) * notch_y + rho * np.sin(angle) * (outer - notch_x) <= outer * notch_y


def coverage(shape: str, x: float, y: float, radius: float, size: int = SIZE) -> NDArray[np.float64]:
    """Return the share of every pixel that a shape covers, `[size, size]`; centre and radius are in pixels."""
    alpha = np.zeros((size, size))
    reach = 1.1 * radius
    left, right = max(math.floor(x - reach), 0), min(math.ceil(x + reach), size)
    top, bottom = max(math.floor(y - reach), 0), min(math.ceil(y + reach), size)
    across = (np.arange(left * _SUPERSAMPLE, right * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    down = (np.arange(top * _SUPERSAMPLE, bottom * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    u, v = np.meshgrid((across - x) / radius, (down - y) / radius)
    blocks = inside(shape, u, v).reshape(bottom - top, _SUPERSAMPLE, right - left, _SUPERSAMPLE)
    alpha[top:bottom, left:right] = blocks.mean(axis=(1, 3))
    return alpha


def render(scene: Scene, seed: int) -> Render:
    """Draw a scene at sizes, places and slightly varied colours given by the seed; objects never touch.

    Returns:
        `Render(image, masks)`: a 64x64 RGB image and the pixels at least half covered by each object.
    """
    rng = random.Random(f"render {seed}")
    places = _places(len(scene.objects), rng)
    canvas = np.empty((SIZE, SIZE, 3))
    canvas[:] = BACKGROUND
    masks = np.zeros((len(scene.objects), SIZE, SIZE), dtype=bool)
    for index, ((colour, shape), (x, y, radius)) in enumerate(zip(scene.objects, places, strict=True)):
        alpha = coverage(shape, x, y, radius)
        paint = np.array([channel + _uniform(rng, -_COLOUR_JITTER, _COLOUR_JITTER) for channel in PALETTE[colour]])
        canvas += alpha[..., None] * (paint - canvas)
        masks[index] = alpha >= 0.5
    return Render(Image.fromarray(np.clip(canvas.round(), 0, 255).astype(np.uint8)), masks)


def _places(count: int, rng: random.Random) -> list[tuple[float, float, float]]:
    """Return centres and radii `(x, y, radius)` whose bounding squares stay in the picture and apart."""
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(50):
            radius = _uniform(rng, *_RADII[count])
            reach = 1.08 * radius + _MARGIN
            x, y = (_uniform(rng, reach, SIZE - reach) for _ in range(2))
            apart = (max(abs(x - ox), abs(y - oy)) >= 1.08 * (radius + other) + _GAP for ox, oy, other in places)
            if all(apart):
                places.append((x, y, radius))
            if len(places) == count:
                return places


def _uniform(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
