"""Gaussian smoothing of maps with a reflected border, as a band matrix K along each axis, and its transpose."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

# Cells that the kernel reaches to either side, at most.
MOST_RADIUS = 3


def padded_taps(taps: Sequence[float]) -> list[float]:
    """The taps from the middle outwards, MOST_RADIUS + 1 of them."""
    half = list(taps[len(taps) // 2 :])
    return half + [0.0] * (MOST_RADIUS + 1 - len(half))


@triton.jit
def _tap(distance, taps, RADIUS: tl.constexpr):
    weight = tl.where(distance == 0, taps[0], 0.0)
    if RADIUS > 0:
        weight = tl.where(distance == 1, taps[1], weight)
    if RADIUS > 1:
        weight = tl.where(distance == 2, taps[2], weight)
    if RADIUS > 2:
        weight = tl.where(distance == 3, taps[3], weight)
    return weight


@triton.jit
def _weight(place, neighbour, side, taps, RADIUS: tl.constexpr, ADJOINT: tl.constexpr):
    """K[place, neighbour], or of K^T: what lies beyond a border is the mirror image of what lies before it."""
    weight = _tap(tl.abs(place - neighbour), taps, RADIUS)
    if RADIUS > 0:
        column = place if ADJOINT else neighbour
        weight += tl.where(column > 0, _tap(place + neighbour, taps, RADIUS), 0.0)
        weight += tl.where(column < side - 1, _tap(2 * (side - 1) - place - neighbour, taps, RADIUS), 0.0)
    return weight


@triton.jit
def load_smoothed(
    ptr,
    rows,
    inside,
    stride_row,
    stride_place,
    places,
    height,
    width,
    taps,
    RADIUS: tl.constexpr,
    ADJOINT: tl.constexpr,
):
    """Maps `rows` that are `inside`, smoothed (or K^T of them), at `places`; zeros elsewhere: [ROWS, PLACES]."""
    y, x = places // width, places % width
    out = tl.zeros([rows.shape[0], places.shape[0]], tl.float32)
    for dy in tl.static_range(-RADIUS, RADIUS + 1):
        line = tl.zeros([rows.shape[0], places.shape[0]], tl.float32)
        for dx in tl.static_range(-RADIUS, RADIUS + 1):
            column = x + dx
            on_map = (places < height * width) & (y + dy >= 0) & (y + dy < height) & (column >= 0) & (column < width)
            offsets = rows[:, None] * stride_row + ((places + dy * width + dx) * stride_place)[None, :]
            tile = tl.load(ptr + offsets, mask=inside[:, None] & on_map[None, :], other=0.0).to(tl.float32)
            line += _weight(x, column, width, taps, RADIUS, ADJOINT)[None, :] * tile
        out += _weight(y, y + dy, height, taps, RADIUS, ADJOINT)[None, :] * line
    return out
