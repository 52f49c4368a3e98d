"""Merging the target columns, biased or not, into attention over all other columns, and the gradients of that.

Targets and pinned columns are few: they are gone through one by one, and their maps are read again in every pass rather
than kept. Without a bias no pinned column moves, and the launchers leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ceil_div, config, launch, pieces, power_of_2, unit_stride
from ._tiles import load_ids, load_pieces, rest_of, store_pieces

_STRIDES = ["vb", "vh", "vn", "gb", "gh", "gm", "target", "pinned"]
_RUN_TIME = [*(f"stride_{name}" for name in _STRIDES), "H", "M", "T", "P", "blocks"]


@triton.jit
def _load_value_piece(v_ptr, column, stride_vn, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    places = START + tl.arange(0, WIDTH)
    mask = places < tl.where(column >= 0, D, 0)
    return tl.load(v_ptr + column * stride_vn + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_value(v_ptr, column, stride_vn, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both pieces of a column's value, [D1] and [D2]; zeros for a padded one."""
    first = _load_value_piece(v_ptr, column, stride_vn, D, 0, D1)
    second = first
    if D2 > 0:
        second = _load_value_piece(v_ptr, column, stride_vn, D, D1, D2)
    return first, second


@triton.jit
def _load_map(logits_ptr, bias_ptr, column, start, rows, inside):
    """A column's logits with the bias, if there is one: [BLOCK_M]; -inf for a padded one, whatever they hold."""
    logits = tl.load(logits_ptr + start + rows, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + start + rows, mask=inside, other=0.0)
    return tl.where(column >= 0, logits, float("-inf"))


@triton.jit
def _top_and_total(rest, logits_ptr, bias_ptr, target_ptr, start, rows, inside, M, T):
    """The largest logit of each row and the sum of exponentials relative to it: [BLOCK_M] each.

    Their logarithm would round: at a bias of 1e4 to three digits.
    """
    top = rest
    for t in range(T):
        top = tl.maximum(top, _load_map(logits_ptr, bias_ptr, tl.load(target_ptr + t), start + t * M, rows, inside))
    total = tl.exp(rest - top)
    for t in range(T):
        total += tl.exp(_load_map(logits_ptr, bias_ptr, tl.load(target_ptr + t), start + t * M, rows, inside) - top)
    return top, total


@triton.jit
def _row_dots(a1, a2, b1, b2, D2: tl.constexpr):
    """Dot products of rows, or of rows and one row, over both pieces of the head: [BLOCK_M]."""
    out = tl.sum(a1 * b1, 1)
    if D2 > 0:
        out += tl.sum(a2 * b2, 1)
    return out


@triton.jit
def _add_weighted(acc1, acc2, weights, v1, v2, D2: tl.constexpr):
    acc1 += weights[:, None] * v1[None, :]
    if D2 > 0:
        acc2 += weights[:, None] * v2[None, :]
    return acc1, acc2


@triton.jit
def _store_value_part(ptr, slot, weights, grad1, grad2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """This block's part of the gradient of a column's value."""
    columns = tl.arange(0, D1)
    tl.store(ptr + slot * D + columns, tl.sum(weights[:, None] * grad1, 0), mask=columns < D)
    if D2 > 0:
        columns = D1 + tl.arange(0, D2)
        tl.store(ptr + slot * D + columns, tl.sum(weights[:, None] * grad2, 0), mask=columns < D)


@triton.jit(do_not_specialize=_RUN_TIME)
def _merge_targets_fwd_kernel(
    rest_out_ptr,
    rest_lse_ptr,
    logits_ptr,
    pinned_logits_ptr,
    v_ptr,
    bias_ptr,
    target_ptr,
    pinned_ptr,
    out_ptr,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_target,
    stride_pinned,
    H,
    M,
    T,
    P,
    PINNED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    v_ptr += b * stride_vb + h * stride_vh
    target_ptr += b * stride_target
    pinned_ptr += b * stride_pinned
    start = head * T * M

    rest = rest_of(tl.load(rest_lse_ptr + head * M + rows, mask=inside, other=0.0).to(tl.float32))
    top, total = _top_and_total(rest, logits_ptr, bias_ptr, target_ptr, start, rows, inside, M, T)
    acc1, acc2 = load_pieces(rest_out_ptr + head * M * D, rows, inside, D, D, D1, D2, tl.float32)
    weight = tl.exp(rest - top) / total
    acc1 *= weight[:, None]
    if D2 > 0:
        acc2 *= weight[:, None]
    for t in range(T):
        column = tl.load(target_ptr + t)
        weight = tl.exp(_load_map(logits_ptr, bias_ptr, column, start + t * M, rows, inside) - top) / total
        v1, v2 = _load_value(v_ptr, column, stride_vn, D, D1, D2)
        acc1, acc2 = _add_weighted(acc1, acc2, weight, v1, v2, D2)
    if PINNED:
        plain_top, plain_total = _top_and_total(rest, logits_ptr, None, target_ptr, start, rows, inside, M, T)
        start = head * P * M
        for p in range(P):
            column = tl.load(pinned_ptr + p)
            logits = _load_map(pinned_logits_ptr, None, column, start + p * M, rows, inside)
            restored = tl.exp(logits - plain_top) / plain_total - tl.exp(logits - top) / total
            v1, v2 = _load_value(v_ptr, column, stride_vn, D, D1, D2)
            acc1, acc2 = _add_weighted(acc1, acc2, restored, v1, v2, D2)
    store_pieces(out_ptr + head * M * D, acc1, acc2, rows, inside, D, D, D1, D2)


@triton.jit(do_not_specialize=_RUN_TIME)
def _merge_targets_bwd_kernel(
    grad_ptr,
    rest_out_ptr,
    rest_lse_ptr,
    logits_ptr,
    pinned_logits_ptr,
    v_ptr,
    bias_ptr,
    target_ptr,
    pinned_ptr,
    grad_rest_out_ptr,
    grad_rest_lse_ptr,
    grad_logits_ptr,
    grad_pinned_ptr,
    grad_bias_ptr,
    parts_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_target,
    stride_pinned,
    H,
    M,
    T,
    P,
    WEIGHTS: tl.constexpr,
    PINNED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """With w = softmax of the biased, a = softmax of the plain logits, a' = w at a pinned column and g_n = dO V_n:

    dz_n = w_n (g_n - sum_i w_i g_i + sum_p a'_p g_p) is the gradient by the bias, and by the logits together with
    -a_n sum_p a_p g_p; d_pinned_p = (a_p - a'_p) g_p. Pointers that are None are gradients that nobody asked for;
    WEIGHTS says whether any is that needs g.
    """
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    v_ptr += b * stride_vb + h * stride_vh
    target_ptr += b * stride_target
    pinned_ptr += b * stride_pinned
    if parts_ptr is not None:
        parts_ptr += (head * tl.num_programs(0) + tl.program_id(0)) * (T + P) * D
    start = head * T * M
    pinned_start = head * P * M

    rest = rest_of(tl.load(rest_lse_ptr + head * M + rows, mask=inside, other=0.0).to(tl.float32))
    top, total = _top_and_total(rest, logits_ptr, bias_ptr, target_ptr, start, rows, inside, M, T)
    rest_weight = tl.exp(rest - top) / total
    grad1, grad2 = load_pieces(grad_ptr + b * stride_gb + h * stride_gh, rows, inside, stride_gm, D, D1, D2, tl.float32)
    if grad_rest_out_ptr is not None:
        first, second = rest_weight[:, None] * grad1, rest_weight[:, None] * grad2
        store_pieces(grad_rest_out_ptr + head * M * D, first, second, rows, inside, D, D, D1, D2)

    if WEIGHTS:
        rest1, rest2 = load_pieces(rest_out_ptr + head * M * D, rows, inside, D, D, D1, D2, tl.float32)
        of_rest = _row_dots(grad1, grad2, rest1, rest2, D2)
        mean = rest_weight * of_rest
        for t in range(T):
            column = tl.load(target_ptr + t)
            weight = tl.exp(_load_map(logits_ptr, bias_ptr, column, start + t * M, rows, inside) - top) / total
            v1, v2 = _load_value(v_ptr, column, stride_vn, D, D1, D2)
            mean += weight * _row_dots(grad1, grad2, v1[None, :], v2[None, :], D2)

    if PINNED:
        plain_top, plain_total = _top_and_total(rest, logits_ptr, None, target_ptr, start, rows, inside, M, T)
        kept = tl.zeros([BLOCK_M], tl.float32)
        for p in range(P):
            column = tl.load(pinned_ptr + p)
            logits = _load_map(pinned_logits_ptr, None, column, pinned_start + p * M, rows, inside)
            plain = tl.exp(logits - plain_top) / plain_total
            edited = tl.exp(logits - top) / total
            if WEIGHTS:
                v1, v2 = _load_value(v_ptr, column, stride_vn, D, D1, D2)
                of_value = _row_dots(grad1, grad2, v1[None, :], v2[None, :], D2)
                mean -= edited * of_value
                kept += plain * of_value
                if grad_pinned_ptr is not None:
                    of_logits = tl.where(column >= 0, (plain - edited) * of_value, 0.0)
                    tl.store(grad_pinned_ptr + pinned_start + p * M + rows, of_logits, mask=inside)
            if parts_ptr is not None:
                _store_value_part(parts_ptr, T + p, plain - edited, grad1, grad2, D, D1, D2)

    if grad_rest_lse_ptr is not None:
        of_lse = rest_weight * (of_rest - mean)
        if PINNED:
            of_lse -= tl.exp(rest - plain_top) / plain_total * kept
        tl.store(grad_rest_lse_ptr + head * M + rows, of_lse, mask=inside)

    for t in range(T):
        column = tl.load(target_ptr + t)
        weight = tl.exp(_load_map(logits_ptr, bias_ptr, column, start + t * M, rows, inside) - top) / total
        if WEIGHTS:
            v1, v2 = _load_value(v_ptr, column, stride_vn, D, D1, D2)
            of_bias = weight * (_row_dots(grad1, grad2, v1[None, :], v2[None, :], D2) - mean)
            of_bias = tl.where(column >= 0, of_bias, 0.0)
            if grad_bias_ptr is not None:
                tl.store(grad_bias_ptr + start + t * M + rows, of_bias, mask=inside)
            if grad_logits_ptr is not None:
                if PINNED:
                    plain = tl.exp(_load_map(logits_ptr, None, column, start + t * M, rows, inside) - plain_top)
                    of_bias -= tl.where(column >= 0, plain / plain_total * kept, 0.0)
                tl.store(grad_logits_ptr + start + t * M + rows, of_bias, mask=inside)
        if parts_ptr is not None:
            _store_value_part(parts_ptr, t, weight, grad1, grad2, D, D1, D2)


@triton.jit(do_not_specialize=_RUN_TIME)
def _merge_targets_values_bwd_kernel(
    parts_ptr,
    grad_v_ptr,
    target_ptr,
    pinned_ptr,
    stride_target,
    stride_pinned,
    H,
    T,
    P,
    blocks,
    COLUMNS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One column's gradient: the sum over the blocks of image tokens, or zero where it is neither target nor pinned."""
    head = tl.program_id(1).to(tl.int64)
    ids = load_ids(target_ptr, pinned_ptr, head // H, stride_target, stride_pinned, T, P, COLUMNS)
    slot = tl.max(tl.where(ids == tl.program_id(0), tl.arange(0, COLUMNS), -1), 0)
    columns = tl.arange(0, BLOCK_D)
    parts_ptr += (head * blocks * (T + P) + slot) * D
    total = tl.zeros([BLOCK_D], tl.float32)
    for block in range(tl.where(slot >= 0, blocks, 0)):
        total += tl.load(parts_ptr + block * (T + P) * D + columns, mask=columns < D, other=0.0)
    out_ptr = grad_v_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(out_ptr + columns, total.to(grad_v_ptr.dtype.element_ty), mask=columns < D)


def _ids(ids: Tensor) -> tuple[Tensor, int]:
    """Ids with neighbours in memory, and the step from sample to sample."""
    ids = unit_stride(ids)
    return ids, ids.stride(0) if ids.ndim == 2 else 0


def merge_targets(
    rest_out: Tensor,
    rest_lse: Tensor,
    logits: Tensor,
    pinned_logits: Tensor,
    v: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    pinned_ids: Tensor,
) -> Tensor:
    """out [B,H,M,d] in v's dtype."""
    batch, heads, image_tokens, d = rest_out.shape
    out = v.new_empty(rest_out.shape)
    v = unit_stride(v)
    (targets, stride_target), (pinned, stride_pinned) = _ids(target_ids), _ids(pinned_ids)
    pins = 0 if bias is None else pinned_logits.shape[2]
    use = config("merge_targets_fwd", v.device, d=d, m=image_tokens)
    d1, d2 = pieces(d, 8)
    launch(
        _merge_targets_fwd_kernel,
        (ceil_div(image_tokens, use["BLOCK_M"]), batch * heads),
        v.device,
        use,
        rest_out.contiguous(),
        rest_lse.contiguous(),
        logits.contiguous(),
        pinned_logits.contiguous(),
        v,
        None if bias is None else bias.contiguous(),
        targets,
        pinned,
        out,
        *v.stride()[:3],
        stride_target,
        stride_pinned,
        heads,
        image_tokens,
        logits.shape[2],
        pins,
        PINNED=pins > 0,
        D=d,
        D1=d1,
        D2=d2,
    )
    return out


def merge_targets_backward(
    grad_out: Tensor,
    rest_out: Tensor,
    rest_lse: Tensor,
    logits: Tensor,
    pinned_logits: Tensor,
    v: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    pinned_ids: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients by rest_out, rest_lse, logits, pinned_logits, v and bias: those `needed`, None for the others."""
    batch, heads, image_tokens, d = rest_out.shape
    differentiable = (rest_out, rest_lse, logits, pinned_logits, v, bias)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and wanted else None
        for x, wanted in zip(differentiable, needed, strict=True)
    ]
    of_rest_out, of_rest_lse, of_logits, of_pinned, of_v, of_bias = grads
    pins = 0 if bias is None else pinned_logits.shape[2]
    if of_pinned is not None and pins == 0:
        of_pinned.zero_()
    grad_out, v = unit_stride(grad_out), unit_stride(v)
    (targets, stride_target), (pinned, stride_pinned) = _ids(target_ids), _ids(pinned_ids)
    use = config("merge_targets_bwd", v.device, d=d, m=image_tokens)
    blocks = ceil_div(image_tokens, use["BLOCK_M"])
    columns = logits.shape[2] + pins
    parts = None if of_v is None else v.new_empty(batch * heads, blocks, columns, d, dtype=torch.float32)
    d1, d2 = pieces(d, 8)
    launch(
        _merge_targets_bwd_kernel,
        (blocks, batch * heads),
        v.device,
        use,
        grad_out,
        rest_out.contiguous(),
        rest_lse.contiguous(),
        logits.contiguous(),
        pinned_logits.contiguous(),
        v,
        None if bias is None else bias.contiguous(),
        targets,
        pinned,
        of_rest_out,
        of_rest_lse,
        of_logits,
        of_pinned,
        of_bias,
        parts,
        *grad_out.stride()[:3],
        *v.stride()[:3],
        stride_target,
        stride_pinned,
        heads,
        image_tokens,
        logits.shape[2],
        pins,
        WEIGHTS=any(x is not None for x in (of_rest_lse, of_logits, of_pinned, of_bias)),
        PINNED=pins > 0,
        D=d,
        D1=d1,
        D2=d2,
    )
    if of_v is not None:
        launch(
            _merge_targets_values_bwd_kernel,
            (v.shape[2], batch * heads),
            v.device,
            config("merge_targets_values_bwd", v.device, d=d),
            parts,
            of_v,
            targets,
            pinned,
            stride_target,
            stride_pinned,
            heads,
            logits.shape[2],
            pins,
            blocks,
            COLUMNS=power_of_2(columns),
            D=d,
            BLOCK_D=power_of_2(d),
        )
    return grads
