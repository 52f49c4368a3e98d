"""The separable Gaussian basis in tiles of image tokens: S = G_y theta G_x^T and its transpose.

Along an axis the centres are start + (i + 1) * 2 sigma, i = 0, 1, .., with an integer start, and the weight of a cell
is exp(-(cell - centre)^2 / (2 sigma^2)). 2 sigma comes as step + rest, the step so short that its multiples are exact:
the rounding of a centre far from the origin would cost the weight several digits.

Tiles have the image tokens last, which lays a token's numbers into one thread: sums over centres then stay inside of
it. Centres along x are taken X_BLOCK at a time, so that any number of them fits the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Centres along x that a thread holds at a time.
X_BLOCK = tl.constexpr(8)


@triton.jit
def axis_weight(cell, centre, start, step, rest):
    """The weight of `cell` at the centre of index `centre`, both ints; they are broadcast."""
    distance = (cell - (centre + 1) * step - start) - (centre + 1) * rest
    return tl.exp(-(distance * distance) * (2.0 / ((step + rest) * (step + rest))))


@triton.jit
def bias_tile(
    theta_ptr, rows, width, T, ry, rx, start_y, step_y, rest_y, start_x, step_x, rest_x, T_BLOCK: tl.constexpr
):
    """S [T_BLOCK, BLOCK_M] of the image tokens `rows` [BLOCK_M] from theta [T, ry, rx], float32 and contiguous.

    Zero for t >= T. A target's row holds what its theta does, NaN too: mask padded ones by tl.where.
    """
    y, x = rows // width, rows % width
    targets = tl.arange(0, T_BLOCK)
    bias = tl.zeros((T_BLOCK, rows.shape[0]), tl.float32)
    for first in range(0, rx, X_BLOCK):
        centres = first + tl.arange(0, X_BLOCK)
        weights_x = axis_weight(x[None, :], centres[:, None], start_x, step_x, rest_x)  # [X_BLOCK, BLOCK_M]
        for t in range(T):
            row = tl.zeros((rows.shape[0],), tl.float32)
            for p in range(ry):
                theta = tl.load(theta_ptr + (t * ry + p) * rx + centres, mask=centres < rx, other=0.0)
                weight_y = axis_weight(y, p, start_y, step_y, rest_y)
                row += weight_y * tl.sum(weights_x * theta[:, None], 0)
            bias += tl.where(targets[:, None] == t, row[None, :], 0.0)
    return bias


@triton.jit
def store_theta_gradient(
    out_ptr, grad, rows, width, T, ry, rx, start_y, step_y, rest_y, start_x, step_x, rest_x, T_BLOCK: tl.constexpr
):
    """The transpose: write what `grad` [T_BLOCK, BLOCK_M], the gradient by S, gives d_theta [T, ry, rx] at `out_ptr`.

    `grad` must be zero where `rows` lie outside of the image and for padded targets.
    """
    y, x = rows // width, rows % width
    targets = tl.arange(0, T_BLOCK)
    for first in range(0, rx, X_BLOCK):
        centres = first + tl.arange(0, X_BLOCK)
        weights_x = axis_weight(x[None, :], centres[:, None], start_x, step_x, rest_x)  # [X_BLOCK, BLOCK_M]
        for t in range(T):
            row = tl.sum(tl.where(targets[:, None] == t, grad, 0.0), 0)
            for p in range(ry):
                weighted = axis_weight(y, p, start_y, step_y, rest_y) * row
                part = tl.sum(weights_x * weighted[None, :], 1)
                tl.store(out_ptr + (t * ry + p) * rx + centres, part, mask=centres < rx)
