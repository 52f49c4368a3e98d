"""Normalized attention guidance of the attention to two texts: one program holds whole rows, all heads' features."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._launch import config, launch, power_of_2, unit_stride
from ._tiles import exp
from .composed_attention import composed_attention

# Numbers of one row that a program holds, heads and their width rounded up to powers of two.
MOST_FEATURES = 16384


@triton.jit
def _load_row(ptr, strides, b, m, heads, columns, inside):
    """All heads' features of a row, [HEADS, WIDTH], float32."""
    places = ptr + b * strides[0] + m * strides[2] + heads[:, None] * strides[1] + columns[None, :]
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _merged(out, lse_ptr, places, in_heads, shared, shared_lse):
    """Attention over the columns of both softmaxes, each of which has its logsumexp."""
    lse = tl.load(lse_ptr + places, mask=in_heads, other=0.0)
    highest = tl.maximum(lse, shared_lse)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    own, other = exp(lse - highest), exp(shared_lse - highest)
    total = own + other
    total = tl.where(total == 0.0, 1.0, total)
    return out * (own / total)[:, None] + shared * (other / total)[:, None]


@triton.jit(do_not_specialize=["H", "M"])
def _normalized_guidance_fwd_kernel(
    positive_ptr,
    negative_ptr,
    lse_ptr,
    negative_lse_ptr,
    shared_ptr,
    shared_lse_ptr,
    alpha_ptr,
    out_ptr,
    positive_strides,
    negative_strides,
    shared_strides,
    H,
    M,
    scale,
    tau,
    alpha,
    NORM: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [B,H,M,D]. Strides are those of batch, head and row; the logsumexps are [B,H,M], read where something is
    `shared`."""
    m = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    heads, columns = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    in_heads = heads < H
    inside = in_heads[:, None] & (columns < D)[None, :]
    positive = _load_row(positive_ptr, positive_strides, b, m, heads, columns, inside)
    negative = _load_row(negative_ptr, negative_strides, b, m, heads, columns, inside)
    places = (b * H + heads) * M + m
    if shared_ptr is not None:
        shared = _load_row(shared_ptr, shared_strides, b, m, heads, columns, inside)
        shared_lse = tl.load(shared_lse_ptr + places, mask=in_heads, other=0.0)
        positive = _merged(positive, lse_ptr, places, in_heads, shared, shared_lse)
        negative = _merged(negative, negative_lse_ptr, places, in_heads, shared, shared_lse)
    if alpha_ptr is not None:
        alpha = tl.load(alpha_ptr).to(tl.float32)
    guided = scale * positive - (scale - 1.0) * negative
    if NORM == 1:
        size, allowed = tl.sum(tl.abs(guided)), tau * tl.sum(tl.abs(positive))
    else:
        size, allowed = tl.sqrt(tl.sum(guided * guided)), tau * tl.sqrt(tl.sum(positive * positive))
    within = size <= allowed  # not where a number of the row is NaN, which the whole row then is
    shrink = tl.where(within, 1.0, allowed / tl.where(within, 1.0, size))
    out = (alpha * shrink) * guided + (1.0 - alpha) * positive
    tl.store(out_ptr + places[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def normalized_guidance(
    positive: Tensor,
    negative: Tensor,
    lses: Sequence[Tensor],
    shared: Sequence[Tensor],
    alpha_now: Tensor | None,
    scale: float,
    tau: float,
    alpha: float,
    norm: int,
) -> Tensor:
    """out [B,H,M,d] in the dtype of `positive`. `lses` are those of positive and negative, `shared` an attention with
    its own, or both are none; `alpha_now`, a number in memory, stands for `alpha`."""
    batch, heads, rows, d = positive.shape
    padded = power_of_2(heads), power_of_2(d)
    if padded[0] * padded[1] > MOST_FEATURES:
        raise ValueError(
            f"the Triton kernels hold rows of at most {MOST_FEATURES} features, not {heads} heads of {d}, which take "
            f"{padded[0]} x {padded[1]}; use impl='eager'"
        )
    positive, negative = unit_stride(positive), unit_stride(negative)
    out = positive.new_empty(positive.shape)
    part, part_lse = (unit_stride(shared[0]), shared[1].contiguous()) if shared else (None, None)
    lse, negative_lse = (x.contiguous() for x in lses) if shared else (None, None)
    launch(
        _normalized_guidance_fwd_kernel,
        (rows, batch),
        positive.device,
        config("normalized_guidance_fwd", positive.device, features=padded[0] * padded[1]),
        positive,
        negative,
        lse,
        negative_lse,
        part,
        part_lse,
        alpha_now,
        out,
        positive.stride()[:3],
        negative.stride()[:3],
        None if part is None else part.stride()[:3],
        heads,
        rows,
        scale,
        tau,
        alpha,
        NORM=norm,
        D=d,
        HEADS=padded[0],
        WIDTH=padded[1],
    )
    return out


def attention_to_each(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], key_biases: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """The attention to C contexts, [C,B,H,M,d] in q's dtype, and its lse [C,B,H,M], float32; q is read once."""
    return composed_attention(q, ks, vs, key_biases, None, scale)
