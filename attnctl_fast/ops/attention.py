"""Scaled dot-product attention with its logsumexp, over all columns or all but some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_qkv, check_scale
from ._library import NAMESPACE, composite, without_autocast
from ._triton import attention as _triton

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

attention_reference = composite(
    "attention_reference(Tensor q, Tensor k, Tensor v, Tensor excluded_ids, float scale) -> (Tensor, Tensor)",
    reference.attention,
)


def _mask(q: Tensor, k: Tensor, excluded_ids: Tensor) -> Tensor | None:
    """-inf on the excluded columns, 0 elsewhere: [B,1,M,N] without memory along M; None when nothing is excluded."""
    if excluded_ids.shape[-1] == 0:
        return None
    batch, tokens = k.shape[0], k.shape[2]
    ids = excluded_ids.expand(batch, -1)
    spill = torch.where(ids < 0, tokens, ids)
    mask = q.new_zeros(batch, tokens + 1).scatter_(1, spill, -torch.inf)[:, :tokens]
    return mask[:, None, None, :].expand(-1, 1, q.shape[2], -1)


def _dense_logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = scale * (q @ k.mT)
    return logits if mask is None else logits + mask


@without_autocast
def _dense_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Where no fused attention returns its logsumexp on every accelerator: the logits in memory."""
    logits = _dense_logits(q, k, mask, scale)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)) @ v, lse


@without_autocast
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


def _kept(gradients: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        x.contiguous() if wanted else x.new_empty(0) for x, wanted in zip(gradients, needed, strict=True)
    )


def _unit_stride(*tensors: Tensor) -> list[Tensor]:
    """The CPU's fused attention reads a head's numbers as neighbours, unchecked."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _like(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the layout of empty_like(x), which is the one that the fake promises."""
    wanted = torch.empty_like(x)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, excluded_ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    mask = _mask(q, k, excluded_ids)
    if q.device.type != "cpu":
        out, lse = _dense_forward(q, k, v, mask, scale)
        return _like(q, out), lse
    out, lse = _cpu_forward(*_unit_stride(q, k, v), attn_mask=mask, scale=scale)
    lse = lse.contiguous()
    if mask is not None:
        empty = mask[:, :, 0].isneginf().all(-1, keepdim=True)
        lse = lse.masked_fill(empty, -torch.inf)
    if (lse == 0).any():
        # What the kernel says of rows that are all NaN, as if they were masked.
        broken = q.isnan().any(-1) | k.isnan().any((-1, -2)).unsqueeze(-1)
        out, lse = out.masked_fill(broken.unsqueeze(-1), torch.nan), lse.masked_fill(broken, torch.nan)
    return _like(q, out), lse


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, excluded_ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3])


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    excluded_ids: Tensor,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; an empty tensor for one that is not needed and would cost extra."""
    mask = _mask(q, k, excluded_ids)
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    if q.device.type != "cpu":
        return _dense_backward(grad_out, grad_lse, q, k, v, out, lse, mask, scale, needed)
    grad_out, q, k, v, out = _unit_stride(grad_out, q, k, v, out)
    if grad_lse is None:
        gradients = _cpu_backward(grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
        return _kept(gradients, needed)
    # dl = P (dP - rowsum(dO O) + dlse): a value column of ones whose output gradient is dlse, and whose saved output is
    # 0 so that the row sum does not see it, adds exactly the last term.
    grad = torch.cat([grad_out, grad_lse.unsqueeze(-1)], -1)
    wider_q, wider_k, wider_out = (F.pad(x, (0, 1)) for x in (q, k, out))
    wider_v = F.pad(v, (0, 1), value=1.0)
    gradients = _cpu_backward(grad, wider_q, wider_k, wider_v, wider_out, lse, 0.0, False, attn_mask=mask, scale=scale)
    return _kept([x[..., :-1] for x in gradients], needed)


@attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    excluded_ids: Tensor,
    scale: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _kept([x.new_empty(x.shape) for x in (q, k, v)], needed)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, excluded_ids, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, excluded_ids)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, excluded_ids = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return None, None, None, None, None
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    needed = list(ctx.needs_input_grad[:3])
    gradients = attention_backward_op(grad_out, grad_lse, q, k, v, out, lse, excluded_ids, ctx.scale, needed)
    return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=True)), None, None


attention_op.register_autograd(_backward, setup_context=_save)


def attention_without(
    q: Tensor, k: Tensor, v: Tensor, excluded_ids: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the columns that are not in `excluded_ids`; out 0 and lse -inf where no column is left.

    Half-precision inputs are computed in float32, and both results are: rounding `out` before it is merged, or its
    gradient, costs more than the last digit.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    run = attention_reference if impl == "reference" else attention_op
    return run(q.to(wide), k.to(wide), v.to(wide), excluded_ids, scale)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, return_lse: bool = False, impl: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v.

    Differentiable in q, k and v, through the output and through the logsumexp. NaN and inf propagate.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k, v: keys and values `[B,H,N,d]`, of the dtype and device of q.
        scale: factor of the logits, 1/sqrt(d) by default.
        return_lse: also return the logsumexp of each row's scaled logits.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, or `(out, lse)` with lse `[B,H,M]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty dimension, or (Triton) float64 or a head width
            outside 8..256.
    """
    check_qkv(q, k, v)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if impl == "triton":
        check_kernel_limits(q)
        out, lse = _triton.attention(q, k, v, scale)
    else:
        nothing = torch.empty(0, dtype=torch.int64, device=q.device)
        out, lse = attention_without(q, k, v, nothing, scale, impl)
        out = out.to(q.dtype)
    return (out, lse) if return_lse else out
