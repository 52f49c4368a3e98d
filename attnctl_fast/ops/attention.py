"""Scaled dot-product attention with its logsumexp: over all columns, all but some, or with a bias on some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import (
    composite,
    differentiable,
    differentiated,
    launcher,
    may_hold_map,
    opaque,
    widened,
    without_autocast,
)
from ._tiled import attend_to_few, few_columns

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

attention_reference = composite(
    "attention_reference(Tensor q, Tensor k, Tensor v, Tensor excluded_ids, float scale, Tensor? key_bias) "
    "-> (Tensor, Tensor)",
    reference.attention,
)


def gather_columns(x: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of x [B,H,N,d] that `ids` name, [B,H,T,d].

    A padded id takes row 0, which its user must mask.
    """
    if ids.ndim == 1:
        return x.index_select(2, ids)
    rows = ids.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, rows)


def gather_key_bias(key_bias: Tensor, ids: Tensor) -> Tensor:
    """Return the numbers of key_bias [B,N] that `ids` name: [B,T], as `gather_columns`."""
    return key_bias.index_select(1, ids) if ids.ndim == 1 else key_bias.gather(1, ids.clamp(min=0))


def _mask(q: Tensor, k: Tensor, ids: Tensor | None, bias: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """Return the number to add to every logit, or None for nothing.

    `key_bias` [B,N] is added on all columns, and `bias` [B,H,T,M] on the columns `ids`, [B,H,M,N]; without a bias -inf,
    [B,1,M,N] without memory along M.
    """
    batch, tokens = k.shape[0], k.shape[2]
    if ids is None or ids.shape[-1] == 0:
        return None if key_bias is None else _of_every_row(key_bias, q)
    if bias is not None and ids.ndim == 1:
        # Fused attention reads aligned rows faster.
        mask = q.new_zeros(*q.shape[:3], -(-tokens // 8) * 8).index_copy_(3, ids, bias.mT)[..., :tokens]
        return mask if key_bias is None else mask + key_bias[:, None, None, :]
    spill = torch.where(ids < 0, tokens, ids).expand(batch, -1)
    if bias is None:
        mask = q.new_zeros(batch, tokens + 1).scatter_(1, spill, -torch.inf)[:, :tokens]
        return _of_every_row(mask if key_bias is None else mask + key_bias, q)
    mask = q.new_zeros(*q.shape[:3], tokens + 1)
    mask = mask.scatter_(3, spill[:, None, None, :].expand(*q.shape[:3], -1), bias.mT)[..., :tokens]
    return mask if key_bias is None else mask + key_bias[:, None, None, :]


def _of_every_row(mask: Tensor, q: Tensor) -> Tensor:
    """Return `mask` [B,N] as [B,1,M,N]."""
    return mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)


def _dense_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = scale * (q @ k.mT)
    return logits if mask is None else logits + mask


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with the logits in memory, where no fused attention returns its logsumexp on every accelerator."""
    logits = _dense_logits(q, k, mask, scale)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)) @ v, lse


def _dense_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = torch.exp(_dense_logits(q, k, mask, scale) - lse.unsqueeze(-1))
    grad_q, grad_k, grad_v = (q.new_empty(0) for _ in range(3))
    if needed[0] or needed[1]:
        row = (grad_out * out).sum(-1)
        row = row if grad_lse is None else row - grad_lse
        grad_logits = probabilities * (grad_out @ v.mT - row.unsqueeze(-1)) * scale
        grad_q = grad_logits @ k if needed[0] else grad_q
        grad_k = grad_logits.mT @ q if needed[1] else grad_k
    return grad_q, grad_k, probabilities.mT @ grad_out if needed[2] else grad_v


def _fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Sequence[Tensor]:
    """Return all three gradients by the CPU's own backward."""
    grad_out, q, k, v, out = _unit_stride(grad_out, q, k, v, out)
    if grad_lse is None:
        return _cpu_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    # dl = P (dP - rowsum(dO O) + dlse): a value column of ones whose output gradient is dlse, and whose saved output is
    # 0 so that the row sum does not see it, adds exactly the last term.
    grad = torch.cat([grad_out, grad_lse.unsqueeze(-1)], -1)
    wider_q, wider_k, wider_out = (F.pad(x, (0, 1)) for x in (q, k, out))
    wider_v = F.pad(v, (0, 1), value=1.0)
    gradients = _cpu_backward(grad, wider_q, wider_k, wider_v, wider_out, lse, 0.0, False, attn_mask=mask, scale=scale)
    return [x[..., :-1] for x in gradients]


def _bias_gradient(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    bias: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Return P (dP - rowsum(dO O) + dlse) of the columns that have a bias, [B,H,T,M]."""
    logits = (scale * gather_columns(k, ids)) @ q.mT + bias
    if key_bias is not None:
        logits = logits + gather_key_bias(key_bias, ids)[:, None, :, None]
    row = (grad_out * out).sum(-1)
    row = row if grad_lse is None else row - grad_lse
    slope = gather_columns(v, ids) @ grad_out.mT - row.unsqueeze(2)
    found = slope * torch.exp(logits - lse.unsqueeze(2))
    return found if ids.ndim == 1 else found.masked_fill((ids < 0)[:, None, :, None], 0.0)


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    """Return `x` with neighbouring numbers of a head, which the CPU's fused attention takes for granted, unchecked."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _like(x: Tensor, result: Tensor) -> Tensor:
    """Return `result` in the layout of empty_like(x), which is the one that the fake promises."""
    if result.stride() == x.stride() and result.shape == x.shape:
        return result
    wanted = torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def masked_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for (out, lse) in the layouts that `masked_forward` makes them in."""
    if q.device.type != "cpu":
        return torch.empty_like(q), q.new_empty(q.shape[:3])
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1]).transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    mask = _mask(q, k, ids, bias, key_bias)
    empty = None
    if mask is not None and (bias is None or key_bias is not None):
        empty = mask[:, :, 0].isneginf().all(-1, keepdim=True)
    return masked_forward(q, k, v, mask, empty, scale)


def masked_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, empty: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) with `mask` added to the logits, [B,H,M,N] or what expands to it.

    `empty`, [B,H,M] or likewise: which rows it leaves no column, None for none.
    """
    if q.device.type != "cpu":
        out, lse = _dense_forward(q, k, v, mask, scale)
        return _like(q, out), lse
    out, lse = _cpu_forward(*_unit_stride(q, k, v), attn_mask=mask, scale=scale)
    if empty is not None:
        lse.masked_fill_(empty, -torch.inf)
    if not lse.bool().all():
        # Zero is what the kernel says of rows that are all NaN, as if they were masked.
        broken = q.isnan().any(-1) | k.isnan().any((-1, -2)).unsqueeze(-1)
        out.masked_fill_(broken.unsqueeze(-1), torch.nan)
        lse.masked_fill_(broken, torch.nan)
    return _like(q, out), lse


def masked_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    needed: Sequence[bool],
) -> Sequence[Tensor]:
    """Return dq, dk and dv of `masked_forward`; what is not needed may be empty. `lse` is 0 where it was -inf."""
    given = (grad_out, grad_lse, q, k, v, out, lse, mask, scale)
    return _fused_backward(*given) if q.device.type == "cpu" else _dense_backward(*given, needed)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    found: list[Tensor | None] = [None] * 4
    if any(needed[:3]):
        mask = _mask(q, k, ids, bias, key_bias)
        gradients = masked_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale, needed)
        found[:3] = [x.contiguous() if wanted else None for x, wanted in zip(gradients, needed, strict=False)]
    if needed[3]:
        assert ids is not None and bias is not None
        found[3] = _bias_gradient(grad_out, grad_lse, q, k, v, ids, bias, key_bias, out, lse, scale)
    return found


attention_op = differentiable(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? ids, Tensor? key_bias, float scale) "
    "-> (Tensor, Tensor)",
    _forward,
    lambda q, *_: masked_result(q),
    _backward,
    leaves=4,
    results=2,
    saves=(0, 1),
)
_attend_to_few_op = opaque(
    "attention_to_few(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? ids, Tensor? key_bias, float scale) "
    "-> Tensor",
    attend_to_few,
    lambda q, *_: torch.empty_like(q),
)
_attention_triton = differentiable(
    "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? key_bias, float scale) -> (Tensor, Tensor)",
    launcher("attention", "attention"),
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)),
    launcher("attention_backward", "attention_backward"),
    leaves=3,
    results=2,
    saves=(1,),
)


@without_autocast
def _held(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Run `attend` in differentiable operations, with the map in memory until the backward pass."""
    mask = None if bias is None and key_bias is None else _mask(q, k, ids, bias, key_bias)
    logits = (scale * q) @ k.mT
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) if key_bias is None else torch.ops.aten._safe_softmax(logits, -1)) @ v


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) by the eager form.

    `ids` are left out where there is no bias [B,H,T,M], and have it where there is; `key_bias` [B,N] is added to all
    columns.

    Half-precision inputs are computed in float32, and both results are: rounding `out` before it is merged, or its
    gradient, costs more than the last digit.
    """
    q, k, v = widened(q, k, v)
    if differentiated(q, k, v, bias):
        # Views, for torch.compile takes no tensor twice.
        q, k, v = (x.view_as(x) for x in (q, k, v))
    return attention_op(q, k, v, bias, ids, key_bias, scale)


def attend_only(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor | None,
    bias: Tensor | None,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Return the output of `attend` in q's dtype: no columns are left out, so `ids` come with a bias only.

    On a CPU, where a map may be held, its gradients are faster from that.
    """
    dtype = q.dtype
    q, k, v = widened(q, k, v)
    if differentiated(q, k, v) and may_hold_map(q, k):
        out = _held(q, k, v, ids, bias, key_bias, scale)
    elif few_columns(q, k, ids) and not differentiated(q, k, v, bias):
        out = _attend_to_few_op(q, k, v, bias, ids, key_bias, scale)
    else:
        out, _ = attend(q, k, v, ids, bias, scale, key_bias)
    return out if out.dtype == dtype else out.to(dtype)


def attention_without(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded_ids: Tensor | None,
    scale: float,
    impl: str,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over the columns that are not in `excluded_ids`, as `attend`.

    Out is 0 and lse -inf where no column is left.
    """
    if impl == "eager":
        return attend(q, k, v, excluded_ids, None, scale, key_bias)
    wide = wide_dtype(q.dtype)
    ids = torch.empty(0, dtype=torch.int64, device=q.device) if excluded_ids is None else excluded_ids
    return attention_reference(q.to(wide), k.to(wide), v.to(wide), ids, scale, key_bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention: softmax(scale q k^T + key_bias) v.

    Differentiable in q, k and v, through the output and through the logsumexp. NaN and inf propagate. Where every
    column is masked, the output and all gradients are 0 and the logsumexp is -inf.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B,H,N,d]`, of the dtype and device of q; or with fewer heads, each of which is that of as many of q's
            that stand together (grouped-query attention): as in all operations, without a copy for every head.
        v: values, likewise.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: what is added to the scaled logits of every column, `[B,N]`, any float dtype, used in float32 (float64
            for float64 inputs); -inf masks a column. A constant: it has no gradient.
        return_lse: also return the logsumexp of each row's scaled logits.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, or `(out, lse)` with lse `[B,H,M]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty dimension, a key_bias that requires a gradient
            or holds NaN or +inf (read on a CPU only), or (Triton) float64 or a head width outside 8..256.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        given = heads.queries(q), heads.keys(k), heads.keys(v)
        how: dict[str, Any] = {"scale": scale, "key_bias": heads.samples(key_bias), "impl": impl}
        out, lse = attention(*given, **how, return_lse=True) if return_lse else (attention(*given, **how), None)
        return (heads.whole(out), heads.whole(lse)) if return_lse else heads.whole(out)
    if impl == "triton":
        check_kernel_limits(q)
        out, lse = _attention_triton(q, k, v, key_bias, scale)
    elif impl == "eager" and not return_lse:
        return attend_only(q, k, v, None, None, scale, key_bias)
    else:
        out, lse = attention_without(q, k, v, None, scale, impl, key_bias)
        out = out.to(q.dtype)
    return (out, lse) if return_lse else out
