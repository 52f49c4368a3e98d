"""A map of numbers as colours over a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Points of matplotlib's inferno: lightness rises evenly, so that it reads without colour vision too.
_RAMP = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])
_OPACITY = 0.65


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """A map `[height, width]`, not negative, over an image of any size: black at zero to light yellow at its maximum.

    The image is grey there, so that colours mean the map.

    Returns:
        An RGB image of the size of `image`.
    """
    peak = values.max()
    scaled = Image.fromarray((values / peak if peak > 0 else values).astype(np.float32))
    heat = np.asarray(scaled.resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    points = np.linspace(0, 1, len(_RAMP))
    colours = np.stack([np.interp(heat, points, channel) for channel in _RAMP.T], axis=-1)
    grey = image.convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(colours.round().astype(np.uint8)), _OPACITY)
