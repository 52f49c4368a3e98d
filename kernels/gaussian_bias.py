"""The Gaussian bias of whole maps: S = G_y theta G_x^T per target, in tiles of the grid, and d_theta = G_y^T dS G_x."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gaussian import X_BLOCK, axis_weight
from ._launch import ceil_div, config, launch

_SIZES = ["height", "width", "ry", "rx"]


@triton.jit
def _tile_cells(height, width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """The cells of this program's tile, y [BLOCK_Y] and x [BLOCK_X], their places in the map, and which lie on it."""
    tiles_x = tl.cdiv(width, BLOCK_X)
    tile = tl.program_id(0)
    y = (tile // tiles_x) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = (tile % tiles_x) * BLOCK_X + tl.arange(0, BLOCK_X)
    places = tl.program_id(1).to(tl.int64) * height * width + y[:, None] * width + x[None, :]
    return y, x, places, (y < height)[:, None] & (x < width)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _gaussian_bias_fwd_kernel(
    theta_ptr,
    out_ptr,
    height,
    width,
    ry,
    rx,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    y, x, places, inside = _tile_cells(height, width, BLOCK_Y, BLOCK_X)
    theta_ptr += tl.program_id(1).to(tl.int64) * ry * rx
    bias = tl.zeros([BLOCK_Y, BLOCK_X], tl.float32)
    for first in range(0, rx, X_BLOCK):
        centres = first + tl.arange(0, X_BLOCK)
        weights_x = axis_weight(x[None, :], centres[:, None], start_x, step_x, rest_x)  # [X_BLOCK, BLOCK_X]
        for p in range(ry):
            theta = tl.load(theta_ptr + p * rx + centres, mask=centres < rx, other=0.0).to(tl.float32)
            row = tl.sum(theta[:, None] * weights_x, 0)  # [BLOCK_X]
            bias += axis_weight(y, p, start_y, step_y, rest_y)[:, None] * row[None, :]
    tl.store(out_ptr + places, bias.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _gaussian_bias_bwd_kernel(
    grad_ptr,
    out_ptr,
    height,
    width,
    ry,
    rx,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """This tile's part of d_theta: [tiles, maps, ry, rx]."""
    y, x, places, inside = _tile_cells(height, width, BLOCK_Y, BLOCK_X)
    grad = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
    maps = tl.num_programs(1)
    out_ptr += (tl.program_id(0).to(tl.int64) * maps + tl.program_id(1)) * ry * rx
    for first in range(0, rx, X_BLOCK):
        centres = first + tl.arange(0, X_BLOCK)
        weights_x = axis_weight(x[None, :], centres[:, None], start_x, step_x, rest_x)  # [X_BLOCK, BLOCK_X]
        for p in range(ry):
            row = tl.sum(axis_weight(y, p, start_y, step_y, rest_y)[:, None] * grad, 0)  # [BLOCK_X]
            part = tl.sum(weights_x * row[None, :], 1)
            tl.store(out_ptr + p * rx + centres, part.to(out_ptr.dtype.element_ty), mask=centres < rx)


def _grid(use: dict[str, int], grid: tuple[int, int], maps: int) -> tuple[int, int]:
    return ceil_div(grid[0], use["BLOCK_Y"]) * ceil_div(grid[1], use["BLOCK_X"]), maps


def gaussian_bias(theta: Tensor, grid: tuple[int, int], axes: list[float]) -> Tensor:
    """S [B,H,T,M] of theta [B,H,T,ry,rx], in its dtype. `axes`: start, step and rest (`_gaussian`) along y, then x."""
    *lead, ry, rx = theta.shape
    out = theta.new_empty(*lead, grid[0] * grid[1])
    use = config("gaussian_bias_fwd", theta.device, height=grid[0], width=grid[1])
    launch(
        _gaussian_bias_fwd_kernel,
        _grid(use, grid, math.prod(lead)),
        theta.device,
        use,
        theta.contiguous(),
        out,
        *grid,
        ry,
        rx,
        *axes,
    )
    return out


def gaussian_bias_backward(
    grad: Tensor, theta: Tensor, grid: tuple[int, int], axes: list[float], needed: list[bool]
) -> list[Tensor]:
    """d_theta [B,H,T,ry,rx] of the gradient by S, in its dtype."""
    centres = theta.shape[3:]
    use = config("gaussian_bias_bwd", grad.device, height=grid[0], width=grid[1])
    tiles, maps = _grid(use, grid, math.prod(grad.shape[:-1]))
    dtype = grad.dtype if tiles == 1 else torch.float32
    parts = grad.new_empty(tiles, *grad.shape[:-1], *centres, dtype=dtype)
    launch(
        _gaussian_bias_bwd_kernel,
        (tiles, maps),
        grad.device,
        use,
        grad.contiguous(),
        parts,
        *grid,
        *centres,
        *axes,
    )
    return [parts[0] if tiles == 1 else parts.sum(0).to(grad.dtype)]
