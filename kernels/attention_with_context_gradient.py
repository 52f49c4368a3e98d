"""Attention and the pull of its energy on the keys, softmax_m(l^T) (w Q), from one pass over the queries.

A program's share of the rows streams past all columns: a tile's logits serve the row softmax of the output and a column
softmax that runs along in registers. A second kernel adds the programs' columns in a fixed order. Where a context is
too long or a head too wide for that, and in float32, the attention kernel runs twice instead: the second softmax is
attention as well, of the keys to the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, dot_dtype, launch, pieces, power_of_2, unit_stride
from ._tiles import (
    LN_2,
    LOG2_E,
    add_weighted,
    aligned,
    finite_or_zero,
    load_key_bias,
    load_pieces,
    one_if_zero,
    row_dots,
    store_piece,
    store_pieces,
)
from .attention import align_of, attention, new_rows

# How many parts are read at a time, where they are merged.
MERGED = 16

_STRIDES = [f"stride_{x}{y}" for x, last in (("q", "m"), ("k", "n"), ("v", "n")) for y in "bh" + last]


@triton.jit(do_not_specialize=[*_STRIDES, "stride_w", "H", "M", "N", "tiles"])
def _context_gradient_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    weight_ptr,
    key_bias_ptr,
    out_ptr,
    lse_ptr,
    update_ptr,
    top_ptr,
    total_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_w,
    H,
    M,
    N,
    tiles,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N1: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out and lse of one of several parts of the rows, `tiles` tiles, and the part's columns: sums [parts,B,H,N,d] over
    rows, their largest logits and the totals of the weights, [parts,B,H,N]; of an only part, the update and the
    logsumexp.

    Logits are transposed: all three products then have the text's or the head's many rows for the warps to share, and a
    warp's columns stay its own from tile to tile. They are logarithms to base 2 here, as is `top_ptr` of
    several parts. A masked column's sums are 0, and the logsumexp of its logits is +inf: so are its weights 0 in the
    backward pass.
    """
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    head = row.to(tl.int64) * M
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row

    columns = tl.arange(0, N1)
    taken = columns < N
    kept = taken
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, columns, taken) * LOG2_E
        kept = taken & (added > float("-inf"))
    top = tl.full([N1], float("-inf"), tl.float32)
    total = tl.zeros([N1], tl.float32)
    update1 = tl.zeros([N1, D1], tl.float32)
    update2 = tl.zeros([N1, D2 if D2 > 0 else 16], tl.float32)

    # Once, into shared memory, where matrix units find them.
    k1, k2 = load_pieces(k_ptr, columns, taken, stride_kn, D, D1, D2, DOT)  # [N1, D1], [N1, D2]
    v1, v2 = load_pieces(v_ptr, columns, taken, stride_vn, D, D1, D2, DOT)
    first = tl.program_id(0) * tiles
    # What is the same for every tile is mostly offsets, which would fill the registers.
    for tile in tl.range(first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M)), disable_licm=True):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        logits = tl.where(kept[:, None], row_dots(k1, k2, q1, q2, D2) * (scale * LOG2_E), float("-inf"))
        biased = logits
        if key_bias_ptr is not None:
            biased += added[:, None]
        highest = tl.max(biased, 0)
        if key_bias_ptr is not None:
            highest = finite_or_zero(highest)
        p = tl.exp2(biased - highest[None, :])  # [N1, BLOCK_M]
        norm = tl.sum(p, 0)
        if key_bias_ptr is not None:
            norm = one_if_zero(norm)
        norm = tl.log2(norm)
        tl.store(lse_ptr + head + rows, (highest + norm) * LN_2, mask=inside)
        norm = tl.exp2(-norm)[None, :]
        p = p.to(DOT)
        out = tl.trans(tl.dot(tl.trans(v1), p) * norm)
        store_piece(out_ptr + head * D, out, rows, inside, D, D, 0, D1)
        if D2 > 0:
            out = tl.trans(tl.dot(tl.trans(v2), p) * norm)
            store_piece(out_ptr + head * D, out, rows, inside, D, D, D1, D2)

        logits = tl.where(inside[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        safe = finite_or_zero(highest)
        shrink = tl.exp2(top - safe)
        weights = tl.exp2(logits - safe[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if weight_ptr is not None:
            # Here rather than on the queries: one rounding fewer, and fewer registers.
            weights *= tl.load(weight_ptr + b * stride_w + rows, mask=inside, other=0.0)[None, :]
        update1, update2 = add_weighted(update1 * shrink[:, None], update2 * shrink[:, None], weights, q1, q2, D2, DOT)
        top = highest

    update_ptr += part * N * D
    if PARTS:
        tl.store(top_ptr + part * N + columns, top, mask=taken)
        tl.store(total_ptr + part * N + columns, total, mask=taken)
    else:
        lse = (finite_or_zero(top) + tl.log2(total)) * LN_2
        tl.store(top_ptr + part * N + columns, tl.where(kept, lse, float("inf")), mask=taken)
        total = tl.where(kept, total, 1.0)
        update1 /= total[:, None]
        update2 /= total[:, None]
    store_pieces(update_ptr, update1, update2, columns, taken, D, D, D1, D2)


@triton.jit(do_not_specialize=["N", "parts"])
def _context_gradient_merge_kernel(
    parts_ptr,
    tops_ptr,
    totals_ptr,
    update_ptr,
    lse_ptr,
    N,
    parts,
    D: tl.constexpr,
    D1: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The update and the logsumexp of a block of columns, from all parts in order, several at a time."""
    row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    taken = columns < N
    places = tl.arange(0, D1)
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, D1], tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = (part < parts)[:, None] & taken[None, :]
        source = (part[:, None] * rows + row) * N + columns[None, :]  # [BLOCK_PARTS, BLOCK_N]
        tops = tl.load(tops_ptr + source, mask=there, other=float("-inf"))
        highest = tl.maximum(top, tl.max(tops, 0))
        safe = finite_or_zero(highest)
        shrink, grow = tl.exp2(top - safe), tl.exp2(tops - safe[None, :])
        total = total * shrink + tl.sum(grow * tl.load(totals_ptr + source, mask=there, other=0.0), 0)
        mask = there[:, :, None] & (places < D)[None, None, :]
        x = tl.load(parts_ptr + source[:, :, None] * D + places[None, None, :], mask=mask, other=0.0)
        acc = acc * shrink[:, None] + tl.sum(grow[:, :, None] * x, 0)
        top = highest
    kept = taken
    if MASKED:
        kept = taken & (total != 0.0)
    total = tl.where(kept, total, 1.0)
    store_piece(update_ptr + row * N * D, acc / total[:, None], columns, taken, D, D, 0, D1)
    lse = (finite_or_zero(top) + tl.log2(total)) * LN_2
    if MASKED:
        lse = tl.where(kept, lse, float("inf"))
    tl.store(lse_ptr + row * N + columns, lse, mask=taken)


def attention_with_context_gradient(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype; in float32 the update [B,H,N,d], the lse [B,H,M] and that of the columns, [B,H,N].

    `query_weight`: [B,M], and `key_bias`: [B,N], float32, or None. A masked column has an update of 0, an lse of +inf.
    """
    batch, heads, image_tokens, d = q.shape
    tokens = k.shape[2]
    use = dict(config("context_gradient_fwd", q.device, d=d, n=tokens, m=image_tokens, itemsize=q.element_size()))
    programs, most = use.pop("PROGRAMS"), use.pop("ON_CHIP_N")
    if tokens > most or q.dtype == torch.float32:
        values = q if query_weight is None else (q * query_weight[:, None, :, None]).to(q.dtype)
        update, column_lse = attention(k, q, values, None, scale, torch.float32)
        if key_bias is not None:
            masked = key_bias.isneginf().unsqueeze(1)
            update.masked_fill_(masked.unsqueeze(-1), 0.0)
            column_lse.masked_fill_(masked, torch.inf)
        out, lse = attention(q, k, v, key_bias, scale)
        return out, update, lse, column_lse
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if query_weight is not None:
        query_weight = unit_stride(query_weight)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = new_rows(q)
    update = lse.new_empty(batch, heads, tokens, d)
    column_lse = lse.new_empty(batch, heads, tokens)
    blocks = ceil_div(image_tokens, use["BLOCK_M"])
    tiles = ceil_div(blocks, min(blocks, ceil_div(programs, batch * heads)))
    parts = ceil_div(blocks, tiles)
    sums, tops, totals = update, column_lse, column_lse
    if parts > 1:
        sums, tops = update.new_empty(parts, *update.shape), column_lse.new_empty(parts, *column_lse.shape)
        totals = torch.empty_like(tops)
    d1, d2 = pieces(d)
    launch(
        _context_gradient_fwd_kernel,
        (parts, batch * heads),
        q.device,
        use,
        q,
        k,
        v,
        query_weight,
        None if key_bias is None else key_bias.contiguous(),
        out,
        lse,
        sums,
        tops,
        totals,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if query_weight is None else query_weight.stride(0),
        heads,
        image_tokens,
        tokens,
        tiles,
        scale,
        D=d,
        D1=d1,
        D2=d2,
        # At least as many as a group of four warps shares on sm_90 and later.
        N1=max(power_of_2(tokens), 64),
        PARTS=parts > 1,
        ALIGN=align_of(q, k, v),
        DOT=dot_dtype(q.dtype),
    )
    if parts > 1:
        use = config("context_gradient_merge", q.device)
        launch(
            _context_gradient_merge_kernel,
            (ceil_div(tokens, use["BLOCK_N"]), batch * heads),
            q.device,
            use,
            sums,
            tops,
            totals,
            update,
            column_lse,
            tokens,
            parts,
            D=d,
            D1=max(power_of_2(d), 16),
            MASKED=key_bias is not None,
            BLOCK_PARTS=MERGED,
        )
    return out, update, lse, column_lse
