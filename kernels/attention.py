"""Attention forward in four forms, one kernel: plain; over all columns but the targets, with the targets' statistics;
and with a bias on the target columns, read from memory or spanned by Gaussians in the kernel.

Targets and pinned columns are gathered into a small tile of their own, so that the rest never sees a bias and the
targets' logits are at hand. The keys and values of one prompt, in half precision, stay on chip while queries stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gaussian import bias_tile
from ._launch import ceil_div, config, dot_dtype, launch, pieces, power_of_2, unit_stride
from ._tiles import (
    add_weighted,
    aligned,
    exp,
    finite_or_zero,
    is_named,
    load_ids,
    load_key_bias,
    load_pieces,
    one_if_zero,
    row_dots,
    row_products,
    store_pieces,
)

PLAIN = tl.constexpr(0)
STATISTICS = tl.constexpr(1)
BIASED = tl.constexpr(2)
REGULATED = tl.constexpr(3)


@triton.jit
def _free_logits(q1, q2, k1, k2, free, scale, D2: tl.constexpr):
    """The scaled logits of the columns that are `free`, -inf elsewhere: [BLOCK_M, COLUMNS]."""
    return tl.where(free[None, :], scale * row_dots(q1, q2, k1, k2, D2), float("-inf"))


# Sizes and strides that happen to be 1 or a multiple of 16 shall not make another kernel; ALIGN says what matters.
_RUN_TIME = [
    *(
        f"stride_{x}{dimension}"
        for x, last in (("q", "m"), ("k", "n"), ("v", "n"), ("o", "m"))
        for dimension in "bh" + last
    ),
    *("stride_target", "stride_pinned", "H", "N", "T", "P", "tiles", "width", "r_y", "r_x"),
]


@triton.jit(do_not_specialize=_RUN_TIME)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    target_ptr,
    pinned_ptr,
    bias_ptr,
    key_bias_ptr,
    out_ptr,
    lse_ptr,
    logits_ptr,
    pinned_logits_ptr,
    square_ptr,
    plain_lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_target,
    stride_pinned,
    H,
    M,
    N,
    T,
    P,
    tiles,
    scale,
    bias_scale,
    width,
    r_y,
    r_x,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    FORM: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    COLUMNS: tl.constexpr,
    PINNED: tl.constexpr,
    ON_CHIP: tl.constexpr,
    ALIGN: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(1)
    b = (row // H).to(tl.int64)
    h = (row % H).to(tl.int64)
    q_ptr += aligned(b * stride_qb + h * stride_qh, ALIGN)
    k_ptr += aligned(b * stride_kb + h * stride_kh, ALIGN)
    v_ptr += aligned(b * stride_vb + h * stride_vh, ALIGN)
    out_ptr += aligned(b * stride_ob + h * stride_oh, ALIGN)
    stride_qm = aligned(stride_qm, ALIGN)
    stride_kn = aligned(stride_kn, ALIGN)
    stride_vn = aligned(stride_vn, ALIGN)
    stride_om = aligned(stride_om, ALIGN)
    head = row.to(tl.int64) * M

    if FORM != PLAIN:
        slots = tl.arange(0, COLUMNS)
        ids = load_ids(target_ptr, pinned_ptr, b, stride_target, stride_pinned, T, P, COLUMNS)
        named = ids >= 0
        is_target = slots < T
        target_ids = tl.where(is_target, ids, -1)

    if ON_CHIP:
        columns1 = tl.arange(0, N1)
        free1 = columns1 < N
        if FORM != PLAIN:
            free1 = free1 & ~is_named(columns1, target_ids)
        ka1, ka2 = load_pieces(k_ptr, columns1, columns1 < N, stride_kn, D, D1, D2, DOT)
        va1, va2 = load_pieces(v_ptr, columns1, columns1 < N, stride_vn, D, D1, D2, DOT)
        if key_bias_ptr is not None:
            added1 = load_key_bias(key_bias_ptr, b, N, columns1, columns1 < N)
        if N2 > 0:
            columns2 = N1 + tl.arange(0, N2)
            free2 = columns2 < N
            if FORM != PLAIN:
                free2 = free2 & ~is_named(columns2, target_ids)
            kb1, kb2 = load_pieces(k_ptr, columns2, columns2 < N, stride_kn, D, D1, D2, DOT)
            vb1, vb2 = load_pieces(v_ptr, columns2, columns2 < N, stride_vn, D, D1, D2, DOT)
            if key_bias_ptr is not None:
                added2 = load_key_bias(key_bias_ptr, b, N, columns2, columns2 < N)

    first = tl.program_id(0) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(M, BLOCK_M))):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = rows < M
        if q_ptr.dtype.element_ty == tl.float32:
            q1, q2 = 0.0, 0.0
        else:
            q1, q2 = load_pieces(q_ptr, rows, inside, stride_qm, D, D1, D2, DOT)  # [BLOCK_M, D1], [BLOCK_M, D2]
        if FORM != PLAIN:
            # Loaded here, not once: they are few and cached, and registers are what the main tile runs out of.
            special = scale * row_products(
                q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, ids, named, stride_kn, D, D1, D2, DOT
            )  # [BLOCK_M, COLUMNS]
            if key_bias_ptr is not None:
                special += load_key_bias(key_bias_ptr, b, N, ids, named)[None, :]
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        acc2 = acc1
        if D2 > 0:
            acc2 = tl.zeros([BLOCK_M, D2], tl.float32)

        if ON_CHIP:
            la = _free_logits(q1, q2, ka1, ka2, free1, scale, D2)  # [BLOCK_M, N1]
            if key_bias_ptr is not None:
                la += added1[None, :]
            maximum = tl.max(la, 1)
            if N2 > 0:
                lb = _free_logits(q1, q2, kb1, kb2, free2, scale, D2)  # [BLOCK_M, N2]
                if key_bias_ptr is not None:
                    lb += added2[None, :]
                maximum = tl.maximum(maximum, tl.max(lb, 1))
            highest = finite_or_zero(maximum)
            pa = exp(la - highest[:, None])
            total = tl.sum(pa, 1)
            square = tl.sum(pa * pa, 1)
            acc1, acc2 = add_weighted(acc1, acc2, pa, va1, va2, D2, DOT)
            if N2 > 0:
                pb = exp(lb - highest[:, None])
                total += tl.sum(pb, 1)
                square += tl.sum(pb * pb, 1)
                acc1, acc2 = add_weighted(acc1, acc2, pb, vb1, vb2, D2, DOT)
        else:
            maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, N, N1):
                columns = start + tl.arange(0, N1)
                free = columns < N
                if FORM != PLAIN:
                    free = free & ~is_named(columns, target_ids)
                logits = row_products(
                    q1, q2, q_ptr, rows, inside, stride_qm, k_ptr, columns, columns < N, stride_kn, D, D1, D2, DOT
                )
                logits = tl.where(free[None, :], scale * logits, float("-inf"))  # [BLOCK_M, N1]
                if key_bias_ptr is not None:
                    logits += load_key_bias(key_bias_ptr, b, N, columns, free)[None, :]
                v1, v2 = load_pieces(v_ptr, columns, columns < N, stride_vn, D, D1, D2, DOT)
                before = maximum
                maximum = tl.maximum(before, tl.max(logits, 1))
                highest = finite_or_zero(maximum)
                shrink = exp(before - highest)
                p = exp(logits - highest[:, None])
                total = total * shrink + tl.sum(p, 1)
                square = square * shrink * shrink + tl.sum(p * p, 1)
                acc1 *= shrink[:, None]
                if D2 > 0:
                    acc2 *= shrink[:, None]
                acc1, acc2 = add_weighted(acc1, acc2, p, v1, v2, D2, DOT)
            highest = finite_or_zero(maximum)

        if FORM != PLAIN:
            plain = tl.where((named & is_target)[None, :], special, float("-inf"))
            plain_top = finite_or_zero(tl.maximum(maximum, tl.max(plain, 1)))
            plain_total = total * exp(maximum - plain_top) + tl.sum(exp(plain - plain_top[:, None]), 1)
            if key_bias_ptr is not None:
                plain_total = one_if_zero(plain_total)

        if FORM < BIASED:
            tl.store(lse_ptr + head + rows, highest + tl.log(total), mask=inside)
            norm = 1.0 / one_if_zero(total)
        if FORM == STATISTICS:
            if square_ptr is not None:
                share = exp(maximum - plain_top) / plain_total
                tl.store(square_ptr + head + rows, square * share * share, mask=inside)
            written = tl.where(named[None, :], special, float("-inf"))
            places = rows[:, None] + slots[None, :] * M
            mask = inside[:, None] & is_target[None, :]
            tl.store(logits_ptr + head * T + places, written, mask=mask)
            if PINNED:
                mask = inside[:, None] & ((slots >= T) & (slots < T + P))[None, :]
                tl.store(pinned_logits_ptr + head * P - T.to(tl.int64) * M + places, written, mask=mask)
        if FORM >= BIASED:
            if FORM == BIASED:
                places = rows[:, None] + slots[None, :] * M
                mask = inside[:, None] & (named & is_target)[None, :]
                bias = tl.load(bias_ptr + head * T + places, mask=mask, other=0.0)  # [BLOCK_M, COLUMNS]
            else:
                theta_ptr = bias_ptr + row.to(tl.int64) * T * r_y * r_x
                bias = bias_tile(
                    theta_ptr,
                    rows,
                    width,
                    T,
                    r_y,
                    r_x,
                    start_y,
                    step_y,
                    rest_y,
                    start_x,
                    step_x,
                    rest_x,
                    COLUMNS,
                )
                bias = tl.trans(bias)
            edited = tl.where((named & is_target)[None, :], special + bias_scale * bias, float("-inf"))
            top = finite_or_zero(tl.maximum(maximum, tl.max(edited, 1)))
            weights = exp(edited - top[:, None])  # [BLOCK_M, COLUMNS]
            shrink = exp(maximum - top)
            total = total * shrink + tl.sum(weights, 1)
            if key_bias_ptr is not None:
                total = one_if_zero(total)
            norm = 1.0 / total
            weights *= norm[:, None]
            if PINNED:
                # Not from the logarithms: their rounding would be the weight's where a pinned column holds the row.
                pinned = tl.where((named & (slots >= T))[None, :], special, float("-inf"))
                plain_norm = 1.0 / plain_total
                weights += exp(pinned - plain_top[:, None]) * plain_norm[:, None]
                weights -= exp(pinned - top[:, None]) * norm[:, None]
                if plain_lse_ptr is not None:
                    tl.store(plain_lse_ptr + head + rows, plain_top + tl.log(plain_total), mask=inside)
            if lse_ptr is not None:
                tl.store(lse_ptr + head + rows, top + tl.log(total), mask=inside)
            norm *= shrink

        acc1 *= norm[:, None]
        if D2 > 0:
            acc2 *= norm[:, None]
        if FORM >= BIASED:
            vs1, vs2 = load_pieces(v_ptr, ids, named, stride_vn, D, D1, D2, DOT)
            acc1, acc2 = add_weighted(acc1, acc2, weights, vs1, vs2, D2, DOT)
        store_pieces(out_ptr, acc1, acc2, rows, inside, stride_om, D, D1, D2)


def new_rows(q: Tensor) -> Tensor:
    """[B,H,M] float32, a number for every row of q [B,H,M,d]."""
    batch, heads, image_tokens, _ = q.shape  # a slice of a shape takes the host two microseconds
    return q.new_empty((batch, heads, image_tokens), dtype=torch.float32)


def align_of(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides the strides of all but the last dimension."""
    align = 16
    for x in tensors:
        align = math.gcd(align, *x.stride()[:-1])
    return align


# The grid's width, the centres r_y and r_x, and `gaussian_bias.kernel_axes`; and what a kernel without them is given.
Basis = tuple[int, int, int, float, float, float, float, float, float]
NO_BASIS: Basis = (1, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def basis_of(bias: Tensor, width: int, axes: Sequence[float]) -> Basis | None:
    """The basis of theta [B,H,T,r_y,r_x] on a grid of that width; None for a bias S [B,H,T,M], with a width of 0."""
    return (width, *bias.shape[3:], *axes) if width else None  # type: ignore[return-value]


def _forward(
    form: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    target_ids: Tensor | None = None,
    pinned_ids: Tensor | None = None,
    bias: Tensor | None = None,
    bias_scale: float = 1.0,
    basis: Basis = NO_BASIS,
    logits: Tensor | None = None,
    pinned_logits: Tensor | None = None,
    square: Tensor | None = None,
    plain_lse: Tensor | None = None,
) -> None:
    batch, heads, image_tokens, d = q.shape
    tokens = k.shape[2]
    targets = 0 if target_ids is None else target_ids.shape[-1]
    pinned = 0 if pinned_ids is None else pinned_ids.shape[-1]
    sizes = {"d": d, "n": tokens, "m": image_tokens, "itemsize": q.element_size(), "unkeyed": int(key_bias is None)}
    use = dict(config("attention_fwd", q.device, **sizes))
    tiles, longest = use.pop("TILES"), use.pop("BLOCK_N")
    d1, d2 = pieces(d)
    on_chip = tokens <= use.pop("ON_CHIP_N") and q.dtype != torch.float32
    n1, n2 = pieces(tokens) if on_chip else (longest, 0)
    grid = (ceil_div(ceil_div(image_tokens, use["BLOCK_M"]), tiles), batch * heads)
    launch(
        _attention_fwd_kernel,
        grid,
        q.device,
        use,
        q,
        k,
        v,
        target_ids,
        pinned_ids,
        bias,
        None if key_bias is None else key_bias.contiguous(),
        out,
        lse,
        logits,
        pinned_logits,
        square,
        plain_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *(ids.stride(0) if ids is not None and ids.ndim == 2 else 0 for ids in (target_ids, pinned_ids)),
        heads,
        image_tokens,
        tokens,
        targets,
        pinned,
        tiles,
        scale,
        bias_scale,
        *basis,
        FORM=form.value,
        D=d,
        D1=d1,
        D2=d2,
        N1=n1,
        N2=n2,
        COLUMNS=max(power_of_2(targets + pinned), 16) if targets else 0,
        PINNED=pinned > 0,
        ON_CHIP=on_chip,
        ALIGN=align_of(q, k, v, out),
        DOT=dot_dtype(q.dtype),
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in `dtype`, by default q's, and lse [B,H,M] float32. `key_bias`: [B,N], float32, or None."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format, dtype=dtype)
    lse = new_rows(q)
    _forward(PLAIN, unit_stride(q), unit_stride(k), unit_stride(v), out, lse, key_bias, scale)
    return out, lse


def target_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    with_square: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """rest_out, rest_lse, logits, rest_square or None, and pinned_logits [B,H,P,M]; all float32."""
    batch, heads, image_tokens, d = q.shape
    maps = q.new_empty(batch, heads, image_tokens, d, dtype=torch.float32)
    rest_lse = maps.new_empty(batch, heads, image_tokens)
    logits = maps.new_empty(batch, heads, target_ids.shape[-1], image_tokens)
    pinned_logits = maps.new_empty(batch, heads, pinned_ids.shape[-1], image_tokens)
    square = torch.empty_like(rest_lse) if with_square else None
    _forward(
        STATISTICS,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        maps,
        rest_lse,
        key_bias,
        scale,
        target_ids,
        pinned_ids,
        logits=logits,
        pinned_logits=pinned_logits,
        square=square,
    )
    return maps, rest_lse, logits, square, pinned_logits


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    width: int,
    axes: Sequence[float],
    with_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [B,H,M,d], and for the backward pass the logsumexp with the bias and, where there are pinned columns, without
    it. `bias` is S [B,H,T,M] or, with the `width` of the grid and its `axes`, theta [B,H,T,r_y,r_x]; float32."""
    basis = basis_of(bias, width, axes)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = new_rows(q) if with_lse else None
    plain_lse = torch.empty_like(lse) if lse is not None and pinned_ids.shape[-1] else None
    _forward(
        BIASED if basis is None else REGULATED,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        out,
        lse,
        key_bias,
        scale,
        target_ids,
        pinned_ids,
        bias.contiguous(),
        bias_scale,
        basis or NO_BASIS,
        plain_lse=plain_lse,
    )
    return out, lse, plain_lse
