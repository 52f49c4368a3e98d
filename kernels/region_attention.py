"""Attention whose logits are pulled to their row's extremes, to the maximum where row and column share a region and to
the minimum elsewhere. The columns are gone through twice, first for the extremes: nothing of size M*N is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, dot_dtype, launch, pieces, unit_stride
from ._tiles import (
    LOG2_E,
    add_weighted,
    aligned,
    finite_or_zero,
    load_key_bias,
    load_pieces,
    one_if_zero,
    row_products,
    store_pieces,
)
from .attention import align_of

_RUN_TIME = [f"stride_{x}{dimension}" for x, last in (("q", "m"), ("k", "n"), ("v", "n")) for dimension in "bh" + last]


@triton.jit(do_not_specialize=[*_RUN_TIME, "H", "M", "N"])
def _region_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    row_regions_ptr,
    column_regions_ptr,
    weight_ptr,
    key_bias_ptr,
    out_ptr,
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
    EVEN: tl.constexpr,
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
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    if q_ptr.dtype.element_ty == tl.float32:
        q1, q2 = 0.0, 0.0
    else:
        q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]

    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    low = tl.full([BLOCK_M], float("inf"), tl.float32)
    for start in range(0, N, BLOCK_N):
        # The last column again, where there is none: it changes no extreme.
        columns = tl.minimum(start + tl.arange(0, BLOCK_N), N - 1)
        products = row_products(
            q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, columns < N, stride_kn, D, D1, D2, DOT
        )  # [BLOCK_M, BLOCK_N]
        if key_bias_ptr is None:
            high = tl.maximum(high, tl.max(products, 1))
            low = tl.minimum(low, tl.min(products, 1))
        else:
            added = load_key_bias(key_bias_ptr, b, N, columns, columns < N) * LOG2_E
            logits = products * (scale * LOG2_E) + added[None, :]
            high = tl.maximum(high, tl.max(logits, 1))
            low = tl.minimum(low, tl.min(tl.where(added[None, :] > float("-inf"), logits, float("inf")), 1))

    # From here on logits are logarithms to base 2. A negative scale swaps the extremes.
    scale *= LOG2_E
    if key_bias_ptr is None:
        high, low = tl.maximum(high * scale, low * scale), tl.minimum(high * scale, low * scale)
    row_regions = tl.load(row_regions_ptr + b * M + rows, mask=inside, other=0)
    weight = tl.load(weight_ptr + b * M + rows, mask=inside, other=0.0)
    kept, high, low = (1.0 - weight) * scale, weight * high, weight * low
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = (columns < N) | EVEN  # known to the compiler, where all tiles are whole
        products = row_products(
            q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, valid, stride_kn, D, D1, D2, DOT
        )
        column_regions = tl.load(column_regions_ptr + b * N + columns, mask=valid, other=0)
        shared = (row_regions[:, None] & column_regions[None, :]) != 0
        logits = kept[:, None] * products + tl.where(shared, high[:, None], low[:, None])
        if key_bias_ptr is not None:
            added = load_key_bias(key_bias_ptr, b, N, columns, valid) * LOG2_E
            valid = valid & (added > float("-inf"))
            logits += (1.0 - weight)[:, None] * added[None, :]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        v1, v2 = load_pieces(v_ptr, columns, valid, stride_vn, D, D1, D2, DOT)
        before = maximum
        maximum = tl.maximum(before, tl.max(logits, 1))
        highest = maximum
        if key_bias_ptr is not None:
            highest = finite_or_zero(maximum)
        shrink = tl.exp2(before - highest)
        p = tl.exp2(logits - highest[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc1 *= shrink[:, None]
        if D2 > 0:
            acc2 *= shrink[:, None]
        acc1, acc2 = add_weighted(acc1, acc2, p, v1, v2, D2, DOT)
    if key_bias_ptr is not None:
        total = one_if_zero(total)
    acc1 /= total[:, None]
    if D2 > 0:
        acc2 /= total[:, None]
    store_pieces(out_ptr + row.to(tl.int64) * M * D, acc1, acc2, rows, inside, D, D, D1, D2)


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """out [B,H,M,d] in q's dtype. `key_bias`: [B,N], float32, or None."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, image_tokens, d = q.shape
    tokens = k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    use = config("region_attention_fwd", q.device, d=d, n=tokens, m=image_tokens, itemsize=q.element_size())
    d1, d2 = pieces(d)
    launch(
        _region_attention_fwd_kernel,
        (ceil_div(image_tokens, use["BLOCK_M"]), batch * heads),
        q.device,
        use,
        q,
        k,
        v,
        row_regions.contiguous(),
        column_regions.contiguous(),
        weight.contiguous(),
        None if key_bias is None else key_bias.contiguous(),
        out,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        image_tokens,
        tokens,
        scale,
        D=d,
        D1=d1,
        D2=d2,
        EVEN=tokens % use["BLOCK_N"] == 0,
        ALIGN=align_of(q, k, v),
        DOT=dot_dtype(q.dtype),
    )
    return out
