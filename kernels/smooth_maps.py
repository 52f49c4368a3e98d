"""Every map smoothed by a Gaussian, and the transpose of that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, launch
from ._smoothing import load_smoothed, padded_taps


@triton.jit(do_not_specialize=["n", "height", "width"])
def _smooth_maps_fwd_kernel(
    maps_ptr,
    out_ptr,
    stride_b,
    stride_n,
    stride_m,
    n,
    height,
    width,
    tap0,
    tap1,
    tap2,
    tap3,
    ADJOINT: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    taps = (tap0, tap1, tap2, tap3)
    start = maps_ptr + b * stride_b
    # 64 bit, for there may be any number of tokens.
    stride_n, stride_m = tl.cast(stride_n, tl.int64), tl.cast(stride_m, tl.int64)
    out = load_smoothed(start, rows, rows < n, stride_n, stride_m, places, height, width, taps, RADIUS, ADJOINT)
    inside = (rows < n)[:, None] & (places < height * width)[None, :]
    offsets = b * n * height * width + rows.to(tl.int64)[:, None] * (height * width) + places[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def smooth_maps(
    maps: Tensor, grid: Sequence[int], taps: Sequence[float], adjoint: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Maps [B,n,M] convolved with `taps`, a symmetric kernel, along both axes of the grid; or the transpose of that."""
    batch, tokens, places = maps.shape
    out = maps.new_empty(maps.shape, dtype=dtype)
    use = config("smooth_maps_fwd", maps.device, m=places, tokens=tokens)
    launch(
        _smooth_maps_fwd_kernel,
        (batch * ceil_div(tokens, use["BLOCK_N"]), ceil_div(places, use["BLOCK_M"])),
        maps.device,
        use,
        maps,
        out,
        *maps.stride(),
        tokens,
        *grid,
        *padded_taps(taps),
        ADJOINT=adjoint,
        RADIUS=len(taps) // 2,
    )
    return out


def smooth_maps_backward(
    grad: Tensor, maps: Tensor, grid: Sequence[int], taps: Sequence[float], needed: Sequence[bool]
) -> list[Tensor]:
    """The gradient of `maps`, in their dtype."""
    return [smooth_maps(grad, grid, taps, True, maps.dtype)]
