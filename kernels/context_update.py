"""The step of a context update before its projection: the pull of the attention and that of the keys' norms, of all
heads side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, launch, unit_stride

_STRIDES = ["stride_ub", "stride_uh", "stride_un", "stride_kb", "stride_kh", "stride_kn"]


@triton.jit
def _load_flat(ptr, tokens, taken, stride_h, stride_n, start, size, D: tl.constexpr, WIDTH: tl.constexpr):
    """Numbers start.. of all heads side by side, of `tokens`: [TOKENS, WIDTH], float32, zeros beyond `size`."""
    flat = start + tl.arange(0, WIDTH)
    mask = taken[:, None] & (flat < size)[None, :]
    offset = tokens[:, None] * stride_n + (flat // D * stride_h + flat % D)[None, :]
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _squares(k_ptr, tokens, taken, stride_kh, stride_kn, size, D: tl.constexpr, WIDTH: tl.constexpr):
    """||k||^2 of `tokens`, all heads together."""
    total = tl.zeros([tokens.shape[0]], tl.float32)
    for start in range(0, size, WIDTH):
        k = _load_flat(k_ptr, tokens, taken, stride_kh, stride_kn, start, size, D, WIDTH)
        total += tl.sum(k * k, 1)
    return total


@triton.jit(do_not_specialize=[*_STRIDES, "stride_a", "stride_g", "stride_t", "H", "N"])
def _context_pull_fwd_kernel(
    update_ptr,
    k_ptr,
    attn_ptr,
    norm_ptr,
    token_ptr,
    out_ptr,
    stride_ub,
    stride_uh,
    stride_un,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_a,
    stride_g,
    stride_t,
    H,
    N,
    alpha,
    D: tl.constexpr,
    HALVED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out [B,N,H*d] of a block of tokens; every program takes the softmax over all of them anew."""
    b = tl.program_id(1).to(tl.int64)
    update_ptr += b * stride_ub
    k_ptr += b * stride_kb
    size = H * D
    factor = 0.5 if HALVED else 1.0
    top = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
    total = tl.sum(tl.zeros([1], tl.float32), 0)
    for first in range(0, N, BLOCK_ALL):
        tokens = first + tl.arange(0, BLOCK_ALL)
        square = factor * _squares(k_ptr, tokens, tokens < N, stride_kh, stride_kn, size, D, WIDTH)
        square = tl.where(tokens < N, square, float("-inf"))
        highest = tl.maximum(top, tl.max(square, 0))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(square - highest), 0)
        top = highest

    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    taken = tokens < N
    square = factor * _squares(k_ptr, tokens, taken, stride_kh, stride_kn, size, D, WIDTH)
    by_norm = tl.load(norm_ptr + b * stride_g).to(tl.float32) * tl.exp(square - top) / total
    by_attention = tl.load(attn_ptr + b * stride_a).to(tl.float32) + tl.zeros([BLOCK_N], tl.float32)
    if token_ptr is not None:
        by_attention *= tl.load(token_ptr + b * stride_t + tokens, mask=taken, other=0.0).to(tl.float32)
    out_ptr += b * N * size
    for start in range(0, size, WIDTH):
        k = _load_flat(k_ptr, tokens, taken, stride_kh, stride_kn, start, size, D, WIDTH)
        pull = _load_flat(update_ptr, tokens, taken, stride_uh, stride_un, start, size, D, WIDTH) - alpha * k
        out = by_attention[:, None] * pull - by_norm[:, None] * k
        flat = start + tl.arange(0, WIDTH)
        mask = taken[:, None] & (flat < size)[None, :]
        tl.store(out_ptr + tokens[:, None] * size + flat[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def context_pull(
    update: Tensor,
    k: Tensor,
    gamma_attn: Tensor,
    gamma_norm: Tensor,
    token_weight: Tensor | None,
    alpha: float,
    halved: bool,
) -> Tensor:
    """gamma_attn u (update - alpha k) - gamma_norm p k, [B,N,H*d] in k's dtype; p = softmax_n(||k||^2), of half the
    squares if `halved`.

    `gamma_attn`, `gamma_norm`: [] or [B]; `token_weight`: u, [B,N], or None.
    """
    batch, heads, tokens, d = k.shape
    update, k = unit_stride(update), unit_stride(k)
    if token_weight is not None:
        token_weight = unit_stride(token_weight)
    out = k.new_empty(batch, tokens, heads * d)
    use = config("context_pull_fwd", k.device, n=tokens)
    launch(
        _context_pull_fwd_kernel,
        (ceil_div(tokens, use["BLOCK_N"]), batch),
        k.device,
        use,
        update,
        k,
        gamma_attn,
        gamma_norm,
        token_weight,
        out,
        *update.stride()[:3],
        *k.stride()[:3],
        gamma_attn.stride(0) if gamma_attn.ndim else 0,
        gamma_norm.stride(0) if gamma_norm.ndim else 0,
        0 if token_weight is None else token_weight.stride(0),
        heads,
        tokens,
        alpha,
        D=d,
        HALVED=halved,
    )
    return out
