"""Attention to several contexts, each with a softmax of its own, while every block of queries is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, dot_dtype, launch, pieces, unit_stride
from ._tiles import (
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


@triton.jit(do_not_specialize=["stride_qb", "stride_qh", "stride_qm", "H", "M"])
def _composed_attention_fwd_kernel(
    q_ptr,
    k_ptrs,
    v_ptrs,
    key_bias_ptrs,
    shares,
    out_ptr,
    lse_ptr,
    strides,
    tokens,
    stride_qb,
    stride_qh,
    stride_qm,
    H,
    M,
    scale,
    CONTEXTS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out, and the lse of every context, [C,B,H,M]. `strides` are those of batch, head and token of every context's k
    and then its v; `shares` and `tokens` are their weights and lengths. By value: nothing is copied to the device.
    Without `shares`, out is [C,B,H,M,d], the attention to every context by itself."""
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    head = row.to(tl.int64) * M
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if q_ptr.dtype.element_ty == tl.float32:
        q1, q2 = 0.0, 0.0
    else:
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
    out1 = tl.zeros([BLOCK_M, D1], tl.float32)
    out2 = out1
    if D2 > 0:
        out2 = tl.zeros([BLOCK_M, D2], tl.float32)

    for context in tl.static_range(CONTEXTS):
        k_ptr = k_ptrs[context] + aligned(b * strides[6 * context] + h * strides[6 * context + 1], ALIGN)
        v_ptr = v_ptrs[context] + aligned(b * strides[6 * context + 3] + h * strides[6 * context + 4], ALIGN)
        stride_kn = aligned(strides[6 * context + 2], ALIGN)
        stride_vn = aligned(strides[6 * context + 5], ALIGN)
        N = tokens[context]
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        acc2 = acc1
        if D2 > 0:
            acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < N
            logits = row_products(
                q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, valid, stride_kn, D, D1, D2, DOT
            )
            logits = tl.where(valid[None, :], scale * logits, float("-inf"))  # [BLOCK_M, BLOCK_N]
            if key_bias_ptrs is not None:
                logits += load_key_bias(key_bias_ptrs[context], b, N, columns, valid)[None, :]
            v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
            before = maximum
            maximum = tl.maximum(before, tl.max(logits, 1))
            highest = finite_or_zero(maximum)
            shrink = exp(before - highest)
            p = exp(logits - highest[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc1 *= shrink[:, None]
            if D2 > 0:
                acc2 *= shrink[:, None]
            acc1, acc2 = add_weighted(acc1, acc2, p, v1, v2, D2, DOT)
        lse = finite_or_zero(maximum) + tl.log(total)
        if key_bias_ptrs is not None:
            total = one_if_zero(total)
        own = (context * tl.num_programs(1)).to(tl.int64) * M + head
        tl.store(lse_ptr + own + rows, lse, mask=inside)
        if shares is None:
            norm = 1.0 / total
            store_pieces(out_ptr + own * D, acc1 * norm[:, None], acc2 * norm[:, None], rows, inside, D, D, D1, D2)
        else:
            norm = shares[context] / total
            out1 += acc1 * norm[:, None]
            if D2 > 0:
                out2 += acc2 * norm[:, None]
    if shares is not None:
        store_pieces(out_ptr + head * D, out1, out2, rows, inside, D, D, D1, D2)


def composed_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_biases: Sequence[Tensor],
    shares: Sequence[float] | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype and the lse [C,B,H,M], float32, of C contexts; without `shares`, out is [C,B,H,M,d],
    each attention by itself. `key_biases`: [B,N_i] each, float32, or none at all."""
    q = unit_stride(q)
    ks, vs = tuple(map(unit_stride, ks)), tuple(map(unit_stride, vs))
    batch, heads, image_tokens, d = q.shape
    out = q.new_empty(q.shape if shares is not None else (len(ks), *q.shape))
    lse = q.new_empty((len(ks), batch, heads, image_tokens), dtype=torch.float32)
    longest = max(k.shape[2] for k in ks)
    use = config("composed_attention_fwd", q.device, d=d, n=longest, m=image_tokens, itemsize=q.element_size())
    d1, d2 = pieces(d)
    launch(
        _composed_attention_fwd_kernel,
        (ceil_div(image_tokens, use["BLOCK_M"]), batch * heads),
        q.device,
        use,
        q,
        ks,
        vs,
        tuple(x.contiguous() for x in key_biases) if key_biases else None,
        None if shares is None else tuple(shares),
        out,
        lse,
        tuple(stride for pair in zip(ks, vs, strict=True) for x in pair for stride in x.stride()[:3]),
        tuple(k.shape[2] for k in ks),
        *q.stride()[:3],
        heads,
        image_tokens,
        scale,
        CONTEXTS=len(ks),
        D=d,
        D1=d1,
        D2=d2,
        ALIGN=align_of(q, *ks, *vs),
        DOT=dot_dtype(q.dtype),
    )
    return out, lse
