"""Attention by softmax and 1.5-entmax, mixed: a program has all columns of its rows in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, dot_dtype, launch, power_of_2, unit_stride
from ._tiles import aligned, exp, finite_or_zero, load_key_bias, one_if_zero
from .attention import align_of

# Columns that a program has in registers.
MOST_COLUMNS = 512
_RUN_TIME = [f"stride_{x}{dimension}" for x, last in (("q", "m"), ("k", "n"), ("v", "n")) for dimension in "bh" + last]


@triton.jit(do_not_specialize=[*_RUN_TIME, "H", "M", "N"])
def _entmax_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_bias_ptr,
    weight_ptr,
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
    weight,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The head's width is read WIDTH columns at a time, so that a tile of all text tokens is small."""
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
    columns = tl.arange(0, BLOCK_ALL)
    inside, valid = rows < M, columns < N

    logits = tl.zeros([BLOCK_M, BLOCK_ALL], tl.float32)
    for start in range(0, D, WIDTH):
        part = start + tl.arange(0, WIDTH)
        in_head = (part < D)[None, :]
        q = tl.load(q_ptr + rows[:, None] * stride_qm + part[None, :], inside[:, None] & in_head, other=0.0)
        k = tl.load(k_ptr + columns[:, None] * stride_kn + part[None, :], valid[:, None] & in_head, other=0.0)
        logits = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), logits, input_precision="ieee")
    logits = tl.where(valid[None, :], scale * logits, float("-inf"))
    if key_bias_ptr is not None:
        logits += load_key_bias(key_bias_ptr, b, N, columns, valid)[None, :]
    logits -= finite_or_zero(tl.max(logits, 1))[:, None]
    dense = exp(logits)
    dense *= (1.0 / one_if_zero(tl.sum(dense, 1)))[:, None]

    # The threshold at which the squares of what is above it add up to one, by Newton's method on their norm: it is
    # convex and falls, so that from below no step passes the root.
    logits *= 0.5
    threshold = tl.full([BLOCK_M], -1.0, tl.float32)
    for _ in tl.static_range(STEPS):
        above = tl.maximum(logits - threshold[:, None], 0.0)
        norm = tl.sqrt(tl.sum(above * above, 1))
        threshold += (norm - 1.0) * norm / one_if_zero(tl.sum(above, 1))
    above = tl.maximum(logits - threshold[:, None], 0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr).to(tl.float32)
    mixed = ((1.0 - weight) * dense + weight * above * above).to(DOT)

    out_ptr += row.to(tl.int64) * M * D
    for start in range(0, D, WIDTH):
        part = start + tl.arange(0, WIDTH)
        in_head = (part < D)[None, :]
        v = tl.load(v_ptr + columns[:, None] * stride_vn + part[None, :], valid[:, None] & in_head, other=0.0)
        out = tl.dot(mixed, v.to(DOT), input_precision="ieee")
        tl.store(
            out_ptr + rows[:, None] * D + part[None, :], out.to(out_ptr.dtype.element_ty), inside[:, None] & in_head
        )


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    weight_now: Tensor | None,
    weight: float,
    scale: float,
    steps: int,
) -> Tensor:
    """out [B,H,M,d] in q's dtype. `key_bias`: [B,N], float32, or None. `weight_now`, a number in memory, stands for
    `weight`; `steps`: of Newton's method."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, image_tokens, d = q.shape
    tokens = k.shape[2]
    if tokens > MOST_COLUMNS:
        raise ValueError(
            f"the Triton kernels hold at most {MOST_COLUMNS} text tokens of a row, not {tokens}; use impl='eager'"
        )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    use = config("entmax_attention_fwd", q.device, n=tokens, itemsize=q.element_size())
    launch(
        _entmax_attention_fwd_kernel,
        (ceil_div(image_tokens, use["BLOCK_M"]), batch * heads),
        q.device,
        use,
        q,
        k,
        v,
        None if key_bias is None else key_bias.contiguous(),
        weight_now,
        out,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        image_tokens,
        tokens,
        scale,
        weight,
        D=d,
        ALIGN=align_of(q, k, v),
        DOT=dot_dtype(q.dtype),
        STEPS=steps,
        BLOCK_ALL=max(16, power_of_2(tokens)),
    )
    return out
