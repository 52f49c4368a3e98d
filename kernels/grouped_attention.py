"""Attention between groups of tokens that may see each other.

A first, small kernel lists for every tile of rows the tiles of columns that any of the rows sees: from the front those
that every row sees whole, from the back the others. Attention goes over that list, and asks who sees whom in the others
only. Backward, the same kernels' lists serve the gradient of q and, with rows and columns exchanged, those of k and v.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import config, dot_dtype, launch, pieces, unit_stride
from ._tiles import (
    LN_2,
    LOG2_E,
    add_scaled,
    add_weighted,
    aligned,
    exp,
    finite_or_zero,
    load_key_bias,
    load_pieces,
    one_if_zero,
    row_products,
    store_pieces,
)
from .attention import align_of


@triton.jit
def _bit_of(group_ptr, tokens, inside):
    """The group of each token as one bit, none where it is not `inside`."""
    groups = tl.load(group_ptr + tokens, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, 1 << groups, 0)


@triton.jit(do_not_specialize=["stride_row", "stride_column", "M", "N", "G"])
def _group_tiles_fwd_kernel(
    row_ptr,
    column_ptr,
    allowed_ptr,
    bits_ptr,
    list_ptr,
    count_ptr,
    stride_row,
    stride_column,
    M,
    N,
    G,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """The groups that each row sees as bits [B,M]; of every tile of rows, the tiles of columns that it sees
    [B,tiles of rows,tiles of columns], and how many of those are whole and how many are not [B,tiles of rows,2]."""
    b = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    groups = tl.load(row_ptr + b * M + rows, mask=inside, other=0)
    bits = tl.zeros([BLOCK_M], tl.int32)
    some = tl.zeros([], tl.int32)
    every = tl.zeros([], tl.int32)
    for group in range(G):
        seen = tl.load(allowed_ptr + groups * stride_row + group * stride_column, mask=inside, other=0).to(tl.int32)
        bits |= seen << group
        some |= tl.max(seen, 0) << group
        every |= tl.min(tl.where(inside, seen, 1), 0) << group
    tl.store(bits_ptr + b * M + rows, bits, mask=inside)

    tiles = tl.cdiv(N, BLOCK_N)
    place = b * tl.num_programs(0) + tl.program_id(0)
    list_ptr += place * tiles
    whole_count = 0
    part_count = 0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        columns = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [TILES, BLOCK_N]
        held_by = tl.load(column_ptr + b * N + columns, mask=columns < N, other=-1).to(tl.int32)
        held = tl.zeros([TILES], tl.int32)
        for group in range(G):
            held |= tl.max((held_by == group).to(tl.int32), 1) << group
        met = (held & some) != 0
        whole = met & ((held & every) == held) & ((tile + 1) * BLOCK_N <= N)
        part = met & (whole == 0)
        tl.store(list_ptr + whole_count + tl.cumsum(whole.to(tl.int32), 0) - 1, tile, mask=whole)
        tl.store(list_ptr + tiles - part_count - tl.cumsum(part.to(tl.int32), 0), tile, mask=part)
        whole_count += tl.sum(whole.to(tl.int32), 0)
        part_count += tl.sum(part.to(tl.int32), 0)
    tl.store(count_ptr + 2 * place, whole_count)
    tl.store(count_ptr + 2 * place + 1, part_count)


@triton.jit
def _attend(
    acc1,
    acc2,
    maximum,
    total,
    list_ptr,
    count,
    q1,
    q2,
    q_ptr,
    k_ptr,
    v_ptr,
    column_ptr,
    bits,
    key_bias_ptr,
    b,
    rows,
    inside,
    stride_qm,
    stride_kn,
    stride_vn,
    N,
    scale,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the first `count` listed tiles to the output so far; `scale` makes logarithms to base 2 of logits."""
    for i in range(count):
        columns = tl.load(list_ptr + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = (columns < N) | WHOLE  # known to the compiler
        logits = scale * row_products(
            q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, valid, stride_kn, D, D1, D2, DOT
        )  # [BLOCK_M, BLOCK_N]
        if key_bias_ptr is not None:
            logits += (load_key_bias(key_bias_ptr, b, N, columns, valid) * LOG2_E)[None, :]
        if not WHOLE:
            seen = (bits[:, None] & _bit_of(column_ptr, columns, valid)[None, :]) != 0
            logits = tl.where(seen, logits, float("-inf"))
        v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
        before = maximum
        maximum = tl.maximum(before, tl.max(logits, 1))
        highest = finite_or_zero(maximum)
        shrink = tl.exp2(before - highest)
        p = tl.exp2(logits - highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc1 *= shrink[:, None]
        if D2 > 0:
            acc2 *= shrink[:, None]
        acc1, acc2 = add_weighted(acc1, acc2, p, v1, v2, D2, DOT)
    return acc1, acc2, maximum, total


_STRIDES = [f"stride_{x}{dimension}" for x, last in (("q", "m"), ("k", "n"), ("v", "n")) for dimension in "bh" + last]
_SIZES = ["H", "M", "N"]
_GRAD_STRIDES = ["stride_gb", "stride_gh", "stride_gm"]


@triton.jit(do_not_specialize=[*_STRIDES, *_SIZES])
def _grouped_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    column_ptr,
    key_bias_ptr,
    bits_ptr,
    list_ptr,
    count_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    H,
    M,
    N,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    column_ptr += b * N
    head = row.to(tl.int64) * M
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if q_ptr.dtype.element_ty == tl.float32:
        q1, q2 = 0.0, 0.0
    else:
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
    bits = tl.load(bits_ptr + b * M + rows, mask=inside, other=0)

    tiles = tl.cdiv(N, BLOCK_N)
    place = b * tl.num_programs(0) + tl.program_id(0)
    whole_count = tl.load(count_ptr + 2 * place)
    part_count = tl.load(count_ptr + 2 * place + 1)
    list_ptr += place * tiles
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for WHOLE in tl.static_range(2):
        acc1, acc2, maximum, total = _attend(
            acc1,
            acc2,
            maximum,
            total,
            list_ptr + (0 if WHOLE else tiles - part_count),
            whole_count if WHOLE else part_count,
            q1,
            q2,
            q_ptr,
            k_ptr,
            v_ptr,
            column_ptr,
            bits,
            key_bias_ptr,
            b,
            rows,
            inside,
            stride_qm,
            stride_kn,
            stride_vn,
            N,
            scale * LOG2_E,
            WHOLE == 1,
            D,
            D1,
            D2,
            DOT,
            BLOCK_N,
        )
    tl.store(lse_ptr + head + rows, (finite_or_zero(maximum) + tl.log2(total)) * LN_2, mask=inside)
    norm = 1.0 / one_if_zero(total)
    acc1 *= norm[:, None]
    if D2 > 0:
        acc2 *= norm[:, None]
    store_pieces(out_ptr + head * D, acc1, acc2, rows, inside, D, D, D1, D2)


@triton.jit
def _tile_at(list_ptr, i, whole_count, part_count, tiles):
    """The i-th of all listed tiles: behind the whole ones come those from the back."""
    return tl.load(list_ptr + tl.where(i < whole_count, i, tiles - whole_count - part_count + i))


@triton.jit(do_not_specialize=[*_GRAD_STRIDES, *_STRIDES, *_SIZES])
def _grouped_attention_bwd_rows_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    column_ptr,
    key_bias_ptr,
    lse_ptr,
    bits_ptr,
    list_ptr,
    count_ptr,
    delta_ptr,
    dq_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    H,
    M,
    N,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What is subtracted from a row's products in its softmax's gradient, `delta`, and dq where it is asked for.

    `delta` is summed here and not taken from the output, as in `_attention_bwd_rows_kernel`: its rounding would be
    larger than the gradient of a row whose softmax is nearly one-hot.
    """
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    grad_out_ptr += aligned(b * stride_gb + h * stride_gh, ALIGN)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_gm = aligned(stride_gm, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    column_ptr += b * N
    head = row.to(tl.int64) * M
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if q_ptr.dtype.element_ty == tl.float32:
        q1, q2, g1, g2 = 0.0, 0.0, 0.0, 0.0
    else:
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        g1, g2 = load_pieces(grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT)
    bits = tl.load(bits_ptr + b * M + rows, mask=inside, other=0)
    lse = finite_or_zero(tl.load(lse_ptr + head + rows, mask=inside, other=0.0))

    tiles = tl.cdiv(N, BLOCK_N)
    place = b * tl.num_programs(0) + tl.program_id(0)
    whole_count = tl.load(count_ptr + 2 * place)
    part_count = tl.load(count_ptr + 2 * place + 1)
    list_ptr += place * tiles
    delta = tl.zeros([BLOCK_M], tl.float32)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + head + rows, mask=inside, other=0.0)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for LAST in tl.static_range(2 if dq_ptr is not None else 1):
        for i in range(whole_count + part_count):
            columns = _tile_at(list_ptr, i, whole_count, part_count, tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            valid = columns < N
            logits = scale * row_products(
                q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, valid, stride_kn, D, D1, D2, DOT
            )  # [BLOCK_M, BLOCK_N]
            products = row_products(
                g1, g2, grad_out_ptr, rows, inside, stride_gm, v_ptr, columns, valid, stride_vn, D, D1, D2, DOT
            )
            if key_bias_ptr is not None:
                logits += load_key_bias(key_bias_ptr, b, N, columns, valid)[None, :]
            seen = (bits[:, None] & _bit_of(column_ptr, columns, valid)[None, :]) != 0
            weights = exp(tl.where(seen, logits, float("-inf")) - lse[:, None])
            if LAST:
                k1, k2 = load_pieces(k_ptr, columns, valid, stride_kn, D, D1, D2, DOT)
                acc1, acc2 = add_scaled(acc1, acc2, weights * (products - delta[:, None]), k1, k2, D2, DOT)
            else:
                delta += tl.sum(weights * products, 1)

    if delta_ptr is not None:
        tl.store(delta_ptr + head + rows, delta, mask=inside)
    if dq_ptr is not None:
        acc1 *= scale
        if D2 > 0:
            acc2 *= scale
        store_pieces(dq_ptr + head * D, acc1, acc2, rows, inside, D, D, D1, D2)


@triton.jit(do_not_specialize=[*_GRAD_STRIDES, *_STRIDES, *_SIZES])
def _grouped_attention_bwd_columns_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    row_ptr,
    key_bias_ptr,
    lse_ptr,
    delta_ptr,
    bits_ptr,
    list_ptr,
    count_ptr,
    dk_ptr,
    dv_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    H,
    M,
    N,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of columns, as far as they are asked for. Bits and lists are those of columns: of the rows
    that see them."""
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    grad_out_ptr += aligned(b * stride_gb + h * stride_gh, ALIGN)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_gm = aligned(stride_gm, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    row_ptr += b * M
    head = row.to(tl.int64) * M
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    if q_ptr.dtype.element_ty == tl.float32:
        k1, k2, v1, v2 = 0.0, 0.0, 0.0, 0.0
    else:
        k1, k2 = load_pieces(k_ptr, columns, valid, stride_kn, D, D1, D2, DOT)  # [BLOCK_N, D1], [BLOCK_N, D2]
        v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
    bits = tl.load(bits_ptr + b * N + columns, mask=valid, other=0)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, columns, valid)

    tiles = tl.cdiv(M, BLOCK_M)
    place = b * tl.num_programs(0) + tl.program_id(0)
    whole_count = tl.load(count_ptr + 2 * place)
    part_count = tl.load(count_ptr + 2 * place + 1)
    list_ptr += place * tiles
    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = dk1
    if D2 > 0:
        dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
    dv1, dv2 = dk1, dk2
    for i in range(whole_count + part_count):
        rows = _tile_at(list_ptr, i, whole_count, part_count, tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        logits = scale * row_products(
            k1, k2, k_ptr, columns, valid, stride_kn, q_ptr, rows, inside, stride_qm, D, D1, D2, DOT
        )  # [BLOCK_N, BLOCK_M]
        if key_bias_ptr is not None:
            logits += added[:, None]
        seen = (bits[:, None] & _bit_of(row_ptr, rows, inside)[None, :]) != 0
        lse = finite_or_zero(tl.load(lse_ptr + head + rows, mask=inside, other=0.0))
        weights = exp(tl.where(seen, logits, float("-inf")) - lse[None, :])
        if dk_ptr is not None:
            products = row_products(
                v1, v2, v_ptr, columns, valid, stride_vn, grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT
            )
            delta = tl.load(delta_ptr + head + rows, mask=inside, other=0.0)
            q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)
            dk1, dk2 = add_scaled(dk1, dk2, weights * (products - delta[None, :]), q1, q2, D2, DOT)
        if dv_ptr is not None:
            g1, g2 = load_pieces(grad_out_ptr, rows, inside, stride_gm, D, D1, D2, DOT)
            dv1, dv2 = add_scaled(dv1, dv2, weights, g1, g2, D2, DOT)

    part = row.to(tl.int64) * N * D
    if dk_ptr is not None:
        dk1 *= scale
        if D2 > 0:
            dk2 *= scale
        store_pieces(dk_ptr + part, dk1, dk2, columns, valid, D, D, D1, D2)
    if dv_ptr is not None:
        store_pieces(dv_ptr + part, dv1, dv2, columns, valid, D, D, D1, D2)


class _Tiles(NamedTuple):
    """What one side sees of the other, as `_group_tiles_fwd_kernel` writes it."""

    bits: Tensor
    listed: Tensor
    counts: Tensor


def _tiles_of(rows: Tensor, columns: Tensor, allowed: Tensor, block_m: int, block_n: int) -> _Tiles:
    """Of rows [B,M], by groups, the tiles of columns [B,N]; both contiguous. `allowed`: bool [G,G], any strides."""
    (batch, image_tokens), tokens = rows.shape, columns.shape[1]
    down, along = triton.cdiv(image_tokens, block_m), triton.cdiv(tokens, block_n)
    found = _Tiles(
        rows.new_empty(rows.shape, dtype=torch.int32),
        rows.new_empty(batch, down, along, dtype=torch.int32),
        rows.new_empty(batch, down, 2, dtype=torch.int32),
    )
    launch(
        _group_tiles_fwd_kernel,
        (down, batch),
        rows.device,
        config("group_tiles_fwd", rows.device),
        rows,
        columns,
        allowed.view(torch.uint8),
        *found,
        *allowed.stride(),
        image_tokens,
        tokens,
        allowed.shape[0],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return found


def _constants(*tensors: Tensor) -> dict[str, Any]:
    d1, d2 = pieces(tensors[0].shape[3])
    align, dot = align_of(*tensors), dot_dtype(tensors[0].dtype)
    return {"D": tensors[0].shape[3], "D1": d1, "D2": d2, "ALIGN": align, "DOT": dot}


def _config(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    return config(kernel, q.device, d=q.shape[3], n=k.shape[2], m=q.shape[2], itemsize=q.element_size())


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype, and lse [B,H,M] float32. Groups: int64 [B,M] and [B,N] in 0..G-1; `allowed`: bool
    [G,G], G at most 32; `key_bias`: [B,N], float32, or None."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    rows, columns = row_groups.contiguous(), column_groups.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    use = _config("grouped_attention_fwd", q, k)
    launch(
        _grouped_attention_fwd_kernel,
        (triton.cdiv(q.shape[2], use["BLOCK_M"]), q.shape[0] * q.shape[1]),
        q.device,
        use,
        q,
        k,
        v,
        columns,
        None if key_bias is None else key_bias.contiguous(),
        *_tiles_of(rows, columns, allowed, use["BLOCK_M"], use["BLOCK_N"]),
        out,
        lse,
        *(stride for x in (q, k, v) for stride in x.stride()[:3]),
        *q.shape[1:3],
        k.shape[2],
        scale,
        **_constants(q, k, v),
    )
    return out, lse


def grouped_attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    key_bias: Tensor | None,
    scale: float,
    lse: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv in the dtype of q, contiguous; None for each that is not `needed`."""
    grad_out = torch.zeros_like(q) if grad_out is None else unit_stride(grad_out)
    q, k, v, lse = unit_stride(q), unit_stride(k), unit_stride(v), lse.contiguous()
    rows, columns = row_groups.contiguous(), column_groups.contiguous()
    key_bias = None if key_bias is None else key_bias.contiguous()
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for x, wanted in zip((q, k, v), needed, strict=True)
    )
    delta = torch.empty_like(lse) if needed[1] else None
    layout = [stride for x in (grad_out, q, k, v) for stride in x.stride()[:3]]
    layout += [*q.shape[1:3], k.shape[2]]
    constants, heads = _constants(q, k, v, grad_out), q.shape[0] * q.shape[1]
    if needed[0] or needed[1]:
        use = _config("grouped_attention_bwd_rows", q, k)
        launch(
            _grouped_attention_bwd_rows_kernel,
            (triton.cdiv(q.shape[2], use["BLOCK_M"]), heads),
            q.device,
            use,
            grad_out,
            None if grad_lse is None else grad_lse.contiguous(),
            q,
            k,
            v,
            columns,
            key_bias,
            lse,
            *_tiles_of(rows, columns, allowed, use["BLOCK_M"], use["BLOCK_N"]),
            delta,
            dq,
            *layout,
            scale,
            **constants,
        )
    if needed[1] or needed[2]:
        use = _config("grouped_attention_bwd_columns", q, k)
        launch(
            _grouped_attention_bwd_columns_kernel,
            (triton.cdiv(k.shape[2], use["BLOCK_N"]), heads),
            q.device,
            use,
            grad_out,
            q,
            k,
            v,
            rows,
            key_bias,
            lse,
            delta,
            *_tiles_of(columns, rows, allowed.mT, use["BLOCK_N"], use["BLOCK_M"]),
            dk,
            dv,
            *layout,
            scale,
            **constants,
        )
    return dq, dk, dv
