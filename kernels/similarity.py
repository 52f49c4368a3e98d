"""Cosine similarities of maps, and T-SAM's loss by them, forward and backward.

The maps' products [n,n] are gathered over blocks of image tokens: by the program that makes the loss, or where there
are many, by several programs before it, whose parts it adds in order. The forward pass leaves the smoothed maps S and
a matrix W such that W S is the smoothed maps' gradient; the backward pass multiplies, and transposes the smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, launch, power_of_2, unit_stride
from ._smoothing import load_smoothed, padded_taps

VARIANTS = ("similarity", "cosine", "normalised_cosine", "absolute")
_SIZES = ["n", "height", "width"]


@triton.jit
def _inverse_root(square):
    """1 / sqrt, 0 of 0."""
    return tl.where(square == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.where(square == 0, 1.0, square))))


@triton.jit
def _inverse(x):
    """1 / x, 0 of 0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def _length(lengths_ptr, b, n):
    length = n
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    return length


@triton.jit
def _products(
    maps_ptr,
    smoothed_ptr,
    stride_n,
    stride_m,
    first,
    last,
    length,
    n,
    height,
    width,
    taps,
    RADIUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """S S^T over image tokens first..last, of tokens below `length`; S is kept: [N, N]."""
    rows = tl.arange(0, N)
    gram = tl.zeros([N, N], tl.float32)
    for start in range(first, last, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        maps = load_smoothed(
            maps_ptr, rows, rows < length, stride_n, stride_m, places, height, width, taps, RADIUS, False
        )
        if smoothed_ptr is not None:
            inside = (rows < n)[:, None] & (places < height * width)[None, :]
            tl.store(smoothed_ptr + rows[:, None] * (height * width) + places[None, :], maps, mask=inside)
        gram = tl.dot(maps, tl.trans(maps), gram, input_precision="ieee")
    return gram


@triton.jit(do_not_specialize=[*_SIZES, "parts"])
def _similarity_products_fwd_kernel(
    maps_ptr,
    lengths_ptr,
    parts_ptr,
    smoothed_ptr,
    stride_b,
    stride_n,
    stride_m,
    n,
    height,
    width,
    parts,
    tap0,
    tap1,
    tap2,
    tap3,
    RADIUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """This program's part of the products: [B, parts, n, n]."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    length = _length(lengths_ptr, b, n)
    places = height * width
    share = tl.cdiv(tl.cdiv(places, BLOCK_M), parts) * BLOCK_M
    first = part * share
    if smoothed_ptr is not None:
        smoothed_ptr += b * n * places
    gram = _products(
        maps_ptr + b * stride_b,
        smoothed_ptr,
        stride_n,
        stride_m,
        first,
        tl.minimum(first + share, places),
        length,
        n,
        height,
        width,
        (tap0, tap1, tap2, tap3),
        RADIUS,
        N,
        BLOCK_M,
    )
    rows = tl.arange(0, N)
    inside = (rows < n)[:, None] & (rows < n)[None, :]
    start = parts_ptr + (b * parts + part) * n * n
    tl.store(start + rows[:, None] * n + rows[None, :], gram, mask=inside)


@triton.jit
def _cosine_distance(ours, theirs):
    """1 - cos of the rows [N], and its gradient by ours [N, N]: |d|^2 / 2 with d the difference of the unit rows, which
    loses no digit where they are alike."""
    inverse = _inverse_root(tl.sum(ours * ours, 1))
    inverse_text = _inverse_root(tl.sum(theirs * theirs, 1))
    ours = ours * inverse[:, None]
    apart = ours - theirs * inverse_text[:, None]
    distance = 0.5 * tl.sum(apart * apart, 1)
    nothing = (inverse == 0) | (inverse_text == 0)
    slope = (apart - distance[:, None] * ours) * tl.where(nothing, 0.0, inverse)[:, None]
    return tl.where(nothing, 1.0, distance), slope


@triton.jit
def _distance(similarity, text_ptr, stride_ti, stride_tj, length, weight, VARIANT: tl.constexpr, N: tl.constexpr):
    """The loss, and its gradient by the similarities, which is zero on the diagonal and above: [N, N]."""
    rows = tl.arange(0, N)
    counted = (rows > 0) & (rows < length)
    below = counted[:, None] & (rows[None, :] < rows[:, None])
    itself = counted[:, None] & (rows[None, :] == rows[:, None])
    read = below
    if VARIANT != "cosine":
        read = below | itself
    theirs = tl.load(text_ptr + rows[:, None] * stride_ti + rows[None, :] * stride_tj, mask=read, other=0.0)
    ours = tl.where(below, similarity, 0.0)
    if VARIANT == "cosine":
        distance, slope = _cosine_distance(ours, theirs)
        factor = weight * rows.to(tl.float32)
    else:
        ours = tl.where(itself, 1.0, ours)
        inverse = _inverse(tl.sum(ours, 1))
        ours = ours * inverse[:, None]
        if VARIANT == "absolute":
            apart = ours - theirs
            distance = tl.sum(tl.abs(apart), 1)
            slope = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, 0.0))
        else:
            distance, slope = _cosine_distance(ours, theirs)
        slope = (slope - tl.sum(slope * ours, 1)[:, None]) * inverse[:, None]
        factor = weight * (rows + 1).to(tl.float32) / tl.maximum(length, 1).to(tl.float32)
    factor = tl.where(counted, factor, 0.0)
    return tl.sum(factor * distance, 0), tl.where(below, factor[:, None] * slope, 0.0)


@triton.jit(do_not_specialize=[*_SIZES, "parts"])
def _similarity_fwd_kernel(
    maps_ptr,
    text_ptr,
    lengths_ptr,
    parts_ptr,
    smoothed_ptr,
    loss_ptr,
    matrix_ptr,
    inverse_ptr,
    stride_b,
    stride_n,
    stride_m,
    stride_tb,
    stride_ti,
    stride_tj,
    n,
    height,
    width,
    parts,
    tap0,
    tap1,
    tap2,
    tap3,
    weight,
    VARIANT: tl.constexpr,
    RADIUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The similarities and the maps' inverse norms; or the loss, and where the gradient is needed W."""
    b = tl.program_id(0).to(tl.int64)
    length = _length(lengths_ptr, b, n)
    rows = tl.arange(0, N)
    offsets = rows[:, None] * n + rows[None, :]
    inside = (rows < n)[:, None] & (rows < n)[None, :]
    if parts_ptr is not None:
        gram = tl.zeros([N, N], tl.float32)
        for part in range(parts):
            gram += tl.load(parts_ptr + (b * parts + part) * n * n + offsets, mask=inside, other=0.0)
    else:
        if smoothed_ptr is not None:
            smoothed_ptr += b * n * height * width
        gram = _products(
            maps_ptr + b * stride_b,
            smoothed_ptr,
            stride_n,
            stride_m,
            0,
            height * width,
            length,
            n,
            height,
            width,
            (tap0, tap1, tap2, tap3),
            RADIUS,
            N,
            BLOCK_M,
        )
    diagonal = rows[:, None] == rows[None, :]
    square, square_columns = tl.sum(tl.where(diagonal, gram, 0.0), 1), tl.sum(tl.where(diagonal, gram, 0.0), 0)
    inverse, inverse_columns = _inverse_root(square), _inverse_root(square_columns)
    # Few roundings: the loss takes differences of similarities that are nearly alike.
    norms = tl.sqrt_rn(square)[:, None] * tl.sqrt_rn(square_columns)[None, :]
    similarity = tl.where(norms == 0, 0.0, tl.div_rn(gram, tl.where(norms == 0, 1.0, norms)))
    if VARIANT == "similarity":
        tl.store(matrix_ptr + b * n * n + offsets, similarity, mask=inside)
        tl.store(inverse_ptr + b * n + rows, inverse, mask=rows < n)
    else:
        text_ptr += b * stride_tb
        loss, slope = _distance(similarity, text_ptr, stride_ti, stride_tj, length, weight, VARIANT, N)
        tl.store(loss_ptr + b, loss)
        if matrix_ptr is not None:
            slope = slope + tl.trans(slope)
            along = tl.sum(slope * similarity, 1)
            mixing = tl.where(diagonal, -along[:, None] * inverse[:, None], slope * inverse_columns[None, :])
            tl.store(matrix_ptr + b * n * n + offsets, mixing * inverse[:, None], mask=inside)


@triton.jit
def _mixing(
    grad_ptr,
    matrix_ptr,
    inverse_ptr,
    along,
    stride_gi,
    stride_gj,
    first,
    n,
    OF_LOSS: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Columns first.. of W, and the terms that its diagonal sums: [N, COLUMNS]."""
    rows, columns = tl.arange(0, N), first + tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    matrix = tl.load(matrix_ptr + rows[:, None] * n + columns[None, :], mask=inside, other=0.0)
    if OF_LOSS:
        mixing = matrix * tl.load(grad_ptr)
        terms = matrix
    else:
        diagonal = rows[:, None] == columns[None, :]
        off = inside & (rows[:, None] != columns[None, :])
        slope = tl.load(grad_ptr + rows[:, None] * stride_gi + columns[None, :] * stride_gj, mask=off, other=0.0)
        slope += tl.load(grad_ptr + columns[None, :] * stride_gi + rows[:, None] * stride_gj, mask=off, other=0.0)
        terms = slope * matrix
        inverse = tl.load(inverse_ptr + rows, mask=rows < n, other=0.0)
        inverse_columns = tl.load(inverse_ptr + columns, mask=columns < n, other=0.0)
        mixing = tl.where(diagonal, -along[:, None] * inverse[:, None], slope * inverse_columns[None, :])
        mixing = mixing * inverse[:, None]
    return mixing, terms


@triton.jit(do_not_specialize=_SIZES)
def _similarity_bwd_kernel(
    grad_ptr,
    maps_ptr,
    matrix_ptr,
    inverse_ptr,
    out_ptr,
    stride_gb,
    stride_gi,
    stride_gj,
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
    OF_LOSS: tl.constexpr,
    RADIUS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """K^T (W S) at a block of image tokens: [n, BLOCK_M]."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, N)
    places = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    grad_ptr += b * stride_gb
    maps_ptr += b * stride_b
    matrix_ptr += b * n * n
    along = tl.zeros([N], tl.float32)
    if not OF_LOSS:
        inverse_ptr += b * n
        for first in range(0, n, COLUMNS):
            _, terms = _mixing(
                grad_ptr, matrix_ptr, inverse_ptr, along, stride_gi, stride_gj, first, n, OF_LOSS, N, COLUMNS
            )
            along += tl.sum(terms, 1)
    out = tl.zeros([N, BLOCK_M], tl.float32)
    for first in range(0, n, COLUMNS):
        mixing, _ = _mixing(
            grad_ptr, matrix_ptr, inverse_ptr, along, stride_gi, stride_gj, first, n, OF_LOSS, N, COLUMNS
        )
        columns = first + tl.arange(0, COLUMNS)
        maps = load_smoothed(
            maps_ptr,
            columns,
            columns < n,
            stride_n,
            stride_m,
            places,
            height,
            width,
            (tap0, tap1, tap2, tap3),
            RADIUS,
            True,
        )
        out = tl.dot(mixing, maps, out, input_precision="ieee")
    inside = (rows < n)[:, None] & (places < height * width)[None, :]
    offsets = b * n * height * width + rows[:, None] * (height * width) + places[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def _forward(
    maps: Tensor,
    text: Tensor | None,
    lengths: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    variant: str,
    weight: float,
    made: dict[str, Tensor | None],
) -> None:
    batch, tokens, places = maps.shape
    lengths = None if lengths is None else unit_stride(lengths)
    tile = max(power_of_2(tokens), 16)
    sizes = {"tokens": tile, "m": places}
    shared = {"RADIUS": len(taps) // 2, "N": tile}
    use = dict(config("similarity_products_fwd", maps.device, **sizes))
    parts = min(use.pop("PROGRAMS"), ceil_div(places, use["BLOCK_M"]))
    numbers = (tokens, *grid, parts, *padded_taps(taps))
    partial, smoothed = None, made["smoothed"]
    if parts > 1:
        partial = maps.new_empty(batch, parts, tokens, tokens, dtype=torch.float32)
        inputs = (maps, lengths, partial, smoothed, *maps.stride(), *numbers)
        launch(_similarity_products_fwd_kernel, (batch, parts), maps.device, use, *inputs, **shared)
    strides = (0, 0, 0) if text is None else text.stride()
    launch(
        _similarity_fwd_kernel,
        (batch,),
        maps.device,
        config("similarity_fwd", maps.device, **sizes),
        maps,
        text,
        lengths,
        partial,
        smoothed,
        made["loss"],
        made["matrix"],
        made["inverse"],
        *maps.stride(),
        *strides,
        *numbers,
        weight,
        VARIANT=variant,
        **shared,
    )


def _backward(
    grad: Tensor,
    maps: Tensor,
    matrix: Tensor,
    inverse: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    batch, tokens, places = maps.shape
    tile = max(power_of_2(tokens), 16)
    use = config("similarity_bwd", maps.device, tokens=tile, m=places)
    out = maps.new_empty(maps.shape, dtype=dtype)
    strides: Any = grad.stride() if inverse is not None else (*grad.stride(), 0, 0)
    launch(
        _similarity_bwd_kernel,
        (batch, ceil_div(places, use["BLOCK_M"])),
        maps.device,
        use,
        grad,
        maps,
        matrix,
        inverse,
        out,
        *strides,
        *maps.stride(),
        tokens,
        *grid,
        *padded_taps(taps),
        OF_LOSS=inverse is None,
        RADIUS=len(taps) // 2,
        N=tile,
        COLUMNS=16,
    )
    return out


def map_similarity(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines [B,n,n] between maps [B,n,M], and one over their norms [B,n], 0 for a map of zeros."""
    batch, tokens, places = maps.shape
    matrix = maps.new_empty(batch, tokens, tokens, dtype=torch.float32)
    inverse = matrix.new_empty(batch, tokens)
    made = {"smoothed": None, "loss": None, "matrix": matrix, "inverse": inverse}
    _forward(maps, None, None, (1, places), [1.0], "similarity", 0.0, made)
    return matrix, inverse


def map_similarity_backward(
    grad: Tensor, maps: Tensor, similarity: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradient of maps, in their dtype; `similarity` and `inverse`: from `map_similarity`."""
    return [_backward(grad, maps, similarity, inverse, (1, maps.shape[2]), [1.0], maps.dtype)]


def similarity_loss(
    maps: Tensor,
    text: Tensor,
    lengths: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    variant: str,
    weight: float,
    needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """T-SAM's loss [B], and where the gradient is `needed`, the smoothed maps [B,n,M] and W [B,n,n]. `text` [B,n,n] is
    float32 and may be an expanded view."""
    batch, tokens = maps.shape[:2]
    loss = maps.new_empty(batch, dtype=torch.float32)
    smoothed = loss.new_empty(maps.shape) if needed else None
    matrix = loss.new_empty(batch, tokens, tokens) if needed else None
    made = {"smoothed": smoothed, "loss": loss, "matrix": matrix, "inverse": None}
    _forward(maps, text, lengths, grid, taps, variant, weight, made)
    return loss, smoothed, matrix


def similarity_loss_backward(
    grad: Tensor,
    maps: Tensor,
    text: Tensor,
    lengths: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    variant: str,
    weight: float,
    smoothed: Tensor,
    matrix: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradient of maps, in their dtype; `smoothed` and `matrix`: from `similarity_loss`."""
    return [_backward(grad, smoothed, matrix, None, grid, taps, maps.dtype)]
