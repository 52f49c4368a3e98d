"""Attention and its probabilities of chosen tokens, averaged over the heads or of each head.

Where the keys and values of a prompt fit on chip, one kernel: a program goes over heads with a tile of image tokens, so
that the mean is summed in registers. Elsewhere the attention kernel runs first, and that of maps_from_lse.py makes the
chosen columns from its logsumexp. Where the heads are shared by several programs, each writes its part of the mean, and
the parts are added in a fixed order.
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
    aligned,
    finite_or_zero,
    load_key_bias,
    load_pieces,
    one_if_zero,
    row_dots,
    slots_of,
    store_maps,
    store_piece,
)
from .attention import align_of, attention, new_rows
from .maps_from_lse import chosen_columns, shared_heads

_STRIDES = [f"stride_{x}{y}" for x, last in (("q", "m"), ("k", "n"), ("v", "n")) for y in "bh" + last]


@triton.jit(do_not_specialize=[*_STRIDES, "stride_slot", "H", "M", "N", "count", "heads"])
def _attention_maps_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    key_bias_ptr,
    out_ptr,
    lse_ptr,
    maps_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_slot,
    H,
    M,
    N,
    count,
    heads,
    weight,
    scale,
    PER_HEAD: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N1: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out and lse of `heads` heads, and their `count` maps, [B,H,count,M], or the sum of these times `weight`,
    [groups,B,count,M].

    Tiles are transposed: all products then have the text's or the head's many rows for the warps to share.
    """
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if slot_ptr is not None:
        slot_ptr += b * stride_slot
    columns = tl.arange(0, N1)
    taken = columns < N
    slots = slots_of(slot_ptr, columns, taken)
    if key_bias_ptr is not None:
        added = load_key_bias(key_bias_ptr, b, N, columns, taken) * LOG2_E
    mean = tl.zeros([N1, BLOCK_M], tl.float32)

    first = group * heads
    # What is the same for every head is mostly offsets, which would fill the registers.
    for h in tl.range(first, tl.minimum(first + heads, H), disable_licm=True):
        head = b * H + h
        of_q = q_ptr + aligned(b * stride_qb + h * stride_qh, ALIGN)
        of_k = k_ptr + aligned(b * stride_kb + h * stride_kh, ALIGN)
        of_v = v_ptr + aligned(b * stride_vb + h * stride_vh, ALIGN)
        q1, q2 = load_pieces(of_q, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        k1, k2 = load_pieces(of_k, columns, taken, stride_kn, D, D1, D2, DOT)  # [N1, D1], [N1, D2]
        logits = tl.where(taken[:, None], row_dots(k1, k2, q1, q2, D2) * (scale * LOG2_E), float("-inf"))
        if key_bias_ptr is not None:
            logits += added[:, None]
        top = tl.max(logits, 0)
        if key_bias_ptr is not None:
            top = finite_or_zero(top)
        p = tl.exp2(logits - top[None, :])  # [N1, BLOCK_M]
        total = tl.sum(p, 0)
        if key_bias_ptr is not None:
            total = one_if_zero(total)
        total = tl.log2(total)
        tl.store(lse_ptr + head * M + rows, (top + total) * LN_2, mask=inside)
        norm = tl.exp2(-total)[None, :]
        if PER_HEAD:
            store_maps(maps_ptr + head * count * M, p * norm, slots, rows, inside, M)
        else:
            mean += p * norm
        weights = p.to(DOT)
        v1, v2 = load_pieces(of_v, columns, taken, stride_vn, D, D1, D2, DOT)
        out = tl.trans(tl.dot(tl.trans(v1), weights) * norm)
        store_piece(out_ptr + head * M * D, out, rows, inside, D, D, 0, D1)
        if D2 > 0:
            out = tl.trans(tl.dot(tl.trans(v2), weights) * norm)
            store_piece(out_ptr + head * M * D, out, rows, inside, D, D, D1, D2)
    if not PER_HEAD:
        store_maps(maps_ptr + (group * tl.num_programs(1) + b) * count * M, mean * weight, slots, rows, inside, M)


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype, and in float32 the maps of `token_ids` (None: of all tokens), [B,n,M] or `per_head`
    [B,H,n,M], and lse [B,H,M].

    `slots`: which of the ids each of the context's tokens is, -1 for none; int32 [1 or B, at least N]. `key_bias`:
    [B,N], float32, or None.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    key_bias = None if key_bias is None else key_bias.contiguous()
    batch, heads, image_tokens, d = q.shape
    tokens = k.shape[2]
    count = tokens if token_ids is None else token_ids.shape[-1]
    # The parts of a mean take at most a quarter of what all maps would.
    most = heads if per_head else max(1, min(heads, heads * tokens // (4 * count)))
    sizes = {"d": d, "n": tokens, "m": image_tokens, "itemsize": q.element_size()}
    use = dict(config("attention_maps_fwd", q.device, **sizes))
    if tokens > use.pop("ON_CHIP_N") or q.dtype == torch.float32:
        out, lse = attention(q, k, v, key_bias, scale)
        return out, chosen_columns(q, k, lse, token_ids, key_bias, per_head, scale, most), lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = new_rows(q)
    blocks = ceil_div(image_tokens, use["BLOCK_M"])
    groups, each = shared_heads(heads, most, blocks * batch, use.pop("PROGRAMS"))
    padded = token_ids is not None and token_ids.ndim == 2
    allocate = lse.new_zeros if padded else lse.new_empty
    maps = allocate((batch, heads, count, image_tokens) if per_head else (groups, batch, count, image_tokens))
    d1, d2 = pieces(d)
    launch(
        _attention_maps_fwd_kernel,
        (blocks, batch, groups),
        q.device,
        use,
        q,
        k,
        v,
        slots,
        key_bias,
        out,
        lse,
        maps,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        0 if slots is None or slots.shape[0] == 1 else slots.stride(0),
        heads,
        image_tokens,
        tokens,
        count,
        each,
        1.0 / heads,
        scale,
        PER_HEAD=per_head,
        D=d,
        D1=d1,
        D2=d2,
        # At least as many as a group of four warps shares on sm_90 and later.
        N1=max(power_of_2(tokens), 64),
        ALIGN=align_of(q, k, v),
        DOT=dot_dtype(q.dtype),
    )
    if per_head:
        return out, maps, lse
    return out, maps[0] if groups == 1 else maps.sum(0), lse
