"""Attention together with the gradient of its energy by the context."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_qkv, check_scale
from ._library import composite
from ._triton import attention_with_context_gradient as _triton
from .attention import attention_without

attention_with_context_gradient_reference = composite(
    "attention_with_context_gradient_reference(Tensor q, Tensor k, Tensor v, Tensor? query_weight, float scale) "
    "-> (Tensor, Tensor)",
    reference.attention_with_context_gradient,
)


def weighted(q: Tensor, query_weight: Tensor | None) -> Tensor:
    """w Q: `q` [B,H,M,d] times `query_weight` [B,M]."""
    return q if query_weight is None else q * query_weight[:, None, :, None].to(q.dtype)


def _eager(q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    nothing = torch.empty(0, dtype=torch.int64, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    out, _ = attention_without(q, k, v, nothing, scale, "eager")
    # softmax_m(l^T) (w Q) is attention as well, of the keys to the queries.
    update, _ = attention_without(k, q, weighted(q, query_weight), nothing, scale, "eager")
    return out, update


def check_query_weight(query_weight: Tensor | None, q: Tensor) -> Tensor | None:
    """`query_weight` as [B,M] in float32, or float64 for float64 q; ValueError unless it is [M] or [B,M] of floats."""
    if query_weight is None:
        return None
    batch, tokens = q.shape[0], q.shape[2]
    if query_weight.shape not in ((tokens,), (batch, tokens)) or not query_weight.dtype.is_floating_point:
        raise ValueError(
            f"query_weight is {query_weight.dtype} of shape {tuple(query_weight.shape)}; it must be a float tensor "
            f"with one weight per image token: [{tokens}] or [{batch}, {tokens}]"
        )
    if query_weight.device != q.device:
        raise ValueError(f"query_weight is on {query_weight.device} but q is on {q.device}; move it there")
    return query_weight.to(torch.promote_types(q.dtype, torch.float32)).expand(batch, tokens)


def attention_with_context_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_weight: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and how its energy pulls on the keys: softmax(l) v and softmax_m(l^T) (w q) for l = scale q k^T.

    The first softmax runs over the text tokens, the second over the image tokens (arXiv 2306.09869, "Bayesian context
    update"; MATH.md section 2): `update` is minus the gradient of -sum_n logsumexp_m(l_mn) by the keys, over the scale.
    `context_update` makes the increment of the context from it. Differentiable in q, k, v and query_weight, through
    both results. NaN and inf propagate.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k, v: keys and values `[B,H,N,d]`, of the dtype and device of q.
        query_weight: w, a weight per image token in the update, `[M]` or `[B,M]`, float: for inpainting the mask at the
            layer's grid. The output does not know of it.
        scale: factor of the logits, 1/sqrt(d) by default.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, and update `[B,H,N,d]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty dimension, or (Triton) float64 or a head width
            outside 8..256.
    """
    check_qkv(q, k, v)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    query_weight = check_query_weight(query_weight, q)
    if impl == "triton":
        check_kernel_limits(q)
        return _triton.attention_with_context_gradient(q, k, v, query_weight, scale)
    run = attention_with_context_gradient_reference if impl == "reference" else _eager
    out, update = run(q, k, v, query_weight, scale)
    return out.to(q.dtype), update
