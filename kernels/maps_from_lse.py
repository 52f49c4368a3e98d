"""The attention maps of chosen columns from the logsumexp of all, averaged over the heads or of each head.

A program goes over heads with a tile of rows and one of columns, so that the mean is summed in registers; where the
heads are shared by several programs, each writes its part of the mean, and the parts are added in a fixed order.
Backward, one kernel goes over the columns with a tile of rows, for the gradients of q and of the logsumexp, and one
over the rows with a tile of columns, for that of k, whose parts a third one adds in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_gradients import _map_gradient
from ._launch import ceil_div, config, dot_dtype, launch, pieces, power_of_2, unit_stride
from ._tiles import add_scaled, aligned, exp, load_key_bias, load_pieces, row_products, store_maps, store_pieces
from .attention import align_of


@triton.jit
def _load_ids(id_ptr, slots, count):
    """The columns that `slots` are, without ids the slots themselves, and which of them there are."""
    wanted = slots < count
    ids = slots
    if id_ptr is not None:
        ids = tl.load(id_ptr + slots, mask=wanted, other=-1).to(tl.int32)
    return ids, wanted & (ids >= 0)


@triton.jit
def _load_lse(lse_ptr, rows, inside):
    """The logsumexp of `rows`, inf where it is of no columns or of no row: what is left of such a row is zeros."""
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


_STRIDES = ["stride_qb", "stride_qh", "stride_qm", "stride_kb", "stride_kh", "stride_kn", "stride_lb", "stride_lh"]
_RUN_TIME = [*_STRIDES, "stride_id", "H", "M", "N", "count"]


@triton.jit(do_not_specialize=[*_RUN_TIME, "heads", "tiles"])
def _maps_from_lse_fwd_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    id_ptr,
    key_bias_ptr,
    maps_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_id,
    H,
    M,
    N,
    count,
    heads,
    tiles,
    weight,
    scale,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the maps of `heads` heads, [B,H,count,M], or of their sum times `weight`, [groups,B,count,M]; `tiles`:
    how many of them the columns are. Programs that share rows are neighbours."""
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    slots = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if id_ptr is not None:
        id_ptr += b * stride_id
    ids, named = _load_ids(id_ptr, slots, count)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, ids, named)
    places = tl.where(slots < count, slots, -1).to(tl.int64)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = group * heads
    for h in range(first, tl.minimum(first + heads, H)):
        of_q = q_ptr + aligned(b * stride_qb + h * stride_qh, ALIGN)
        of_k = k_ptr + aligned(b * stride_kb + h * stride_kh, ALIGN)
        if q_ptr.dtype.element_ty == tl.float32:
            q1, q2 = 0.0, 0.0
        else:
            q1, q2 = load_pieces(of_q, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        logits = row_products(q1, q2, of_q, rows, inside, stride_qm, of_k, ids, named, stride_kn, D, D1, D2, DOT)
        logits *= scale
        if key_bias_ptr is not None:
            logits += added[None, :]
        lse = _load_lse(lse_ptr + b * stride_lb + h * stride_lh, rows, inside)
        p = tl.where(named[None, :], exp(logits - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        if PER_HEAD:
            store_maps(maps_ptr + (b * H + h) * count * M, tl.trans(p), places, rows, inside, M)
        else:
            total += p
    if not PER_HEAD:
        total = tl.trans(total * weight)
        store_maps(maps_ptr + (group * tl.num_programs(1) + b) * count * M, total, places, rows, inside, M)


@triton.jit(do_not_specialize=[*_RUN_TIME, "stride_mb", "stride_mh"])
def _maps_from_lse_bwd_rows_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    id_ptr,
    key_bias_ptr,
    dq_ptr,
    dlse_ptr,
    stride_mb,
    stride_mh,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_id,
    H,
    M,
    N,
    count,
    weight,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq and the gradient of the logsumexp, or one of them, of a tile of rows. `weight`: of a head in the maps."""
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    grad_ptr += b * stride_mb + h * stride_mh
    if id_ptr is not None:
        id_ptr += b * stride_id
    head = row.to(tl.int64) * M
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if q_ptr.dtype.element_ty == tl.float32:
        q1, q2 = 0.0, 0.0
    else:
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
    lse = _load_lse(lse_ptr + b * stride_lb + h * stride_lh, rows, inside)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)

    for start in range(0, count, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        ids, named = _load_ids(id_ptr, slots, count)
        logits = row_products(q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, ids, named, stride_kn, D, D1, D2, DOT)
        logits *= scale
        if key_bias_ptr is not None:
            logits += load_key_bias(key_bias_ptr, b, N, ids, named)[None, :]
        p = tl.where(named[None, :], exp(logits - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        grad = weight * p * _map_gradient(grad_ptr, tl.where(named, slots, -1), rows, inside, M, False)
        total += tl.sum(grad, 1)
        if dq_ptr is not None:
            k1, k2 = load_pieces(k_ptr, ids, named, stride_kn, D, D1, D2, DOT)  # [BLOCK_N, D1], [BLOCK_N, D2]
            acc1, acc2 = add_scaled(acc1, acc2, grad, k1, k2, D2, DOT)
    if dlse_ptr is not None:
        tl.store(dlse_ptr + head + rows, -total, mask=inside)
    if dq_ptr is not None:
        acc1 *= scale
        if D2 > 0:
            acc2 *= scale
        store_pieces(dq_ptr + head * D, acc1, acc2, rows, inside, D, D, D1, D2)


@triton.jit(do_not_specialize=[*_RUN_TIME, "stride_mb", "stride_mh", "splits", "blocks"])
def _maps_from_lse_bwd_columns_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    lse_ptr,
    id_ptr,
    key_bias_ptr,
    dk_ptr,
    stride_mb,
    stride_mh,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_lb,
    stride_lh,
    stride_id,
    H,
    M,
    N,
    count,
    splits,
    blocks,
    weight,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk of a tile of columns, summed over one of `splits` parts of the rows, each of so many `blocks`:
    [splits,B,H,count,d]. Tiles are transposed, as in _attention_gradients.py."""
    split = tl.program_id(0) % splits
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    grad_ptr += b * stride_mb + h * stride_mh
    if id_ptr is not None:
        id_ptr += b * stride_id
    part = (split.to(tl.int64) * tl.num_programs(1) + row) * count * D
    slots = tl.program_id(0) // splits * BLOCK_N + tl.arange(0, BLOCK_N)
    ids, named = _load_ids(id_ptr, slots, count)
    places = tl.where(named, slots, -1)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, ids, named)
    if q_ptr.dtype.element_ty == tl.float32:
        k1, k2 = 0.0, 0.0
    else:
        k1, k2 = load_pieces(k_ptr, ids, named, stride_kn, D, D1, D2, DOT)  # [BLOCK_N, D1], [BLOCK_N, D2]
    acc1 = tl.zeros([BLOCK_N, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_N, D2], tl.float32)

    last = tl.minimum((split + 1) * blocks, tl.cdiv(M, BLOCK_M))
    for block in range(split * blocks, last):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        logits = row_products(k1, k2, k_ptr, ids, named, stride_kn, q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)
        logits *= scale
        if key_bias_ptr is not None:
            logits += added[:, None]
        lse = _load_lse(lse_ptr + b * stride_lb + h * stride_lh, rows, inside)
        p = tl.where(named[:, None], exp(logits - lse[None, :]), 0.0)  # [BLOCK_N, BLOCK_M]
        grad = weight * p * _map_gradient(grad_ptr, places, rows, inside, M, True)
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        acc1, acc2 = add_scaled(acc1, acc2, grad, q1, q2, D2, DOT)
    acc1 *= scale
    if D2 > 0:
        acc2 *= scale
    store_pieces(dk_ptr + part, acc1, acc2, slots, slots < count, D, D, D1, D2)


@triton.jit(do_not_specialize=["stride_id", "H", "N", "count", "splits"])
def _maps_from_lse_bwd_merge_kernel(
    part_ptr,
    id_ptr,
    dk_ptr,
    stride_id,
    H,
    N,
    count,
    splits,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The parts of dk [splits,B,H,count,d], added, at their columns in dk [B,H,N,d], which is zeros elsewhere."""
    row = tl.program_id(1)
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids, named = _load_ids(id_ptr + (row // H).to(tl.int64) * stride_id, slots, count)
    columns = tl.arange(0, WIDTH)
    # Ids on a GPU are read by nobody before; one that names no column must not write over something else.
    mask = (named & (ids < N))[:, None] & (columns < D)[None, :]
    size = count.to(tl.int64) * D
    part_ptr += row * size
    total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for _ in range(splits):
        total += tl.load(part_ptr + slots[:, None] * D + columns[None, :], mask=mask, other=0.0)
        part_ptr += tl.num_programs(1) * size
    dk_ptr += row.to(tl.int64) * N * D
    tl.store(dk_ptr + ids[:, None] * D + columns[None, :], total.to(dk_ptr.dtype.element_ty), mask=mask)


def shared_heads(heads: int, most: int, tiles: int, programs: int) -> tuple[int, int]:
    """Into how many groups of how many heads, at most `most`, so that there are about `programs` programs."""
    each = ceil_div(heads, min(most, ceil_div(programs, tiles)))
    return ceil_div(heads, each), each


def _layout(q: Tensor, k: Tensor, lse: Tensor, ids: Tensor | None, count: int) -> list[int]:
    """The strides of q, k, lse and the ids, then H, M, N and the number of columns."""
    strides = [*q.stride()[:3], *k.stride()[:3], *lse.stride()[:2]]
    strides.append(0 if ids is None or ids.ndim == 1 else ids.stride(0))
    return [*strides, *q.shape[1:3], k.shape[2], count]


def _constants(q: Tensor, k: Tensor) -> dict[str, Any]:
    d1, d2 = pieces(q.shape[3])
    return {"D": q.shape[3], "D1": d1, "D2": d2, "ALIGN": align_of(q, k), "DOT": dot_dtype(q.dtype)}


def _config(kernel: str, q: Tensor, count: int) -> dict[str, int]:
    return dict(config(kernel, q.device, d=q.shape[3], n=count, m=q.shape[2], itemsize=q.element_size()))


def chosen_columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    most: int,
) -> Tensor:
    """The maps of `token_ids` (None: of all columns) in float32, [B,n,M] or `per_head` [B,H,n,M]; the mean in at most
    `most` parts of that size."""
    batch, heads, image_tokens, _ = q.shape
    count = k.shape[2] if token_ids is None else token_ids.shape[-1]
    ids = None if token_ids is None else unit_stride(token_ids)
    use = _config("maps_from_lse_fwd", q, count)
    blocks, tiles = ceil_div(image_tokens, use["BLOCK_M"]), ceil_div(count, use["BLOCK_N"])
    groups, each = shared_heads(heads, most, blocks * tiles * batch, use.pop("PROGRAMS"))
    maps = lse.new_empty((batch, heads, count, image_tokens) if per_head else (groups, batch, count, image_tokens))
    launch(
        _maps_from_lse_fwd_kernel,
        (blocks * tiles, batch, groups),
        q.device,
        use,
        q,
        k,
        lse,
        ids,
        key_bias,
        maps,
        *_layout(q, k, lse, ids, count),
        each,
        tiles,
        1.0 / heads,
        scale,
        PER_HEAD=per_head,
        **_constants(q, k),
    )
    return maps if per_head else maps[0] if groups == 1 else maps.sum(0)


def maps_from_lse(
    q: Tensor, k: Tensor, lse: Tensor, token_ids: Tensor, key_bias: Tensor | None, per_head: bool, scale: float
) -> Tensor:
    """The maps of `token_ids` in float32, [B,n,M] or `per_head` [B,H,n,M]. `lse`: [B,H,M], float32. `key_bias`: [B,N],
    float32, or None."""
    # The parts of a mean take at most a quarter of what the maps of all heads would.
    most = q.shape[1] if per_head else max(1, q.shape[1] // 4)
    key_bias = None if key_bias is None else key_bias.contiguous()
    given = unit_stride(q), unit_stride(k), unit_stride(lse)
    return chosen_columns(*given, token_ids, key_bias, per_head, scale, most)


def maps_from_lse_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: Tensor,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq and dk in the dtype of q, and the gradient of lse, contiguous; None for each that is not `needed`."""
    q, k, lse, grad, ids = unit_stride(q), unit_stride(k), unit_stride(lse), grad.contiguous(), unit_stride(token_ids)
    (batch, heads, image_tokens, d), count = q.shape, token_ids.shape[-1]
    inputs = grad, q, k, lse, ids, None if key_bias is None else key_bias.contiguous()
    layout = [grad.stride(0), grad.stride(1) if per_head else 0, *_layout(q, k, lse, ids, count)]
    weight, constants = 1.0 if per_head else 1.0 / heads, _constants(q, k)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needed[0] else None
    dlse = torch.empty_like(lse, memory_format=torch.contiguous_format) if needed[2] else None
    if needed[0] or needed[2]:
        use = _config("maps_from_lse_bwd_rows", q, count)
        grid = (ceil_div(image_tokens, use["BLOCK_M"]), batch * heads)
        launch(
            _maps_from_lse_bwd_rows_kernel,
            grid,
            q.device,
            use,
            *inputs,
            dq,
            dlse,
            *layout,
            weight,
            scale,
            **constants,
        )
    if not needed[1]:
        return dq, None, dlse
    use = _config("maps_from_lse_bwd_columns", q, count)
    blocks, tiles = ceil_div(image_tokens, use["BLOCK_M"]), ceil_div(count, use["BLOCK_N"])
    each = ceil_div(blocks, min(blocks, ceil_div(use.pop("PROGRAMS"), tiles * batch * heads)))
    splits = ceil_div(blocks, each)
    parts = lse.new_empty(splits, batch, heads, count, d)
    launch(
        _maps_from_lse_bwd_columns_kernel,
        (tiles * splits, batch * heads),
        q.device,
        use,
        *inputs,
        parts,
        *layout,
        splits,
        each,
        weight,
        scale,
        **constants,
    )
    dk = k.new_zeros(k.shape)
    use = _config("maps_from_lse_bwd_merge", q, count)
    launch(
        _maps_from_lse_bwd_merge_kernel,
        (ceil_div(count, use["BLOCK_N"]), batch * heads),
        q.device,
        use,
        parts,
        ids,
        dk,
        0 if ids.ndim == 1 else ids.stride(0),
        heads,
        k.shape[2],
        count,
        splits,
        D=d,
        WIDTH=power_of_2(d),
    )
    return dq, dk, dlse
