"""Attention to several contexts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, check_qkv, check_scale
from ._triton import composed_attention as _triton
from .attention import attend_only

# Of the sum of the weights' sizes: below it, normalising would amplify rounding instead of composing.
LEAST_TOTAL = 1e-3


def check_weights(weights: Sequence[float], contexts: int) -> list[float]:
    """`weights` over their sum; ValueError unless they are one finite number per context with a sum that is not
    (nearly) zero."""
    weights = [float(x) for x in weights]
    if len(weights) != contexts:
        raise ValueError(f"weights holds {len(weights)} numbers for {contexts} contexts; pass one per context")
    if not all(math.isfinite(x) for x in weights):
        raise ValueError(f"weights is {weights}; every weight must be finite")
    total, size = sum(weights), sum(abs(x) for x in weights)
    if abs(total) <= LEAST_TOTAL * size:
        raise ValueError(
            f"weights {weights} sum to {total:g}; the output is divided by their sum, so negated contexts must not "
            "weigh as much as the others: lower a negative weight"
        )
    return [x / total for x in weights]


def composed_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    scale: float | None = None,
    key_bias: Sequence[Tensor | None] | None = None,
    impl: str | None = None,
) -> Tensor:
    """sum_i w_i softmax(scale q k_i^T) v_i / sum_i w_i (arXiv 2306.09869, "CACAO").

    A positive weight adds a context (conjunction), a negative one takes it away (negation); the main context has
    weight 1. As the weights are normalised, this is what combining after the output projection gives. Differentiable in
    q, ks and vs.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        ks, vs: keys and values `[B,H,N_i,d]` of every context; their lengths may differ.
        weights: one number per context; or a tensor `[contexts]` of them, which is trusted, and under torch.compile may
            change without a new graph.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: one `[B,N_i]` or None per context, added to its scaled logits, -inf for a masked column: as for
            `attention`. A context all of whose columns are masked adds nothing but its weight to the sum of weights.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, another number of ks, vs and weights, no context, or
            weights whose sum is (nearly) zero.
    """
    if len(ks) != len(vs) or not ks:
        raise ValueError(f"there are {len(ks)} keys and {len(vs)} values; pass one of each per context, at least one")
    for k, v in zip(ks, vs, strict=True):
        check_qkv(q, k, v)
    if key_bias is not None and len(key_bias) != len(ks):
        raise ValueError(f"key_bias holds {len(key_bias)} for {len(ks)} contexts; pass one, or None, per context")
    given = [None] * len(ks) if key_bias is None else key_bias
    biases = [check_key_bias(x, k, f"key_bias[{i}]") for i, (x, k) in enumerate(zip(given, ks, strict=True))]
    if isinstance(weights, Tensor):
        if weights.shape != (len(ks),):
            raise ValueError(f"weights has shape {tuple(weights.shape)} for {len(ks)} contexts; pass one per context")
        vs = [v * share for v, share in zip(vs, (weights / weights.sum()).unbind(), strict=True)]
        shares = [1.0] * len(ks)
    else:
        shares = check_weights(weights, len(ks))
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if impl == "reference":
        return reference.composed_attention(q, ks, vs, shares, scale, biases).to(q.dtype)
    if impl == "triton":
        check_kernel_limits(q)
        return _triton.composed_attention(q, ks, vs, biases, shares, scale)
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    out = None
    for k, v, share, bias in zip(ks, vs, shares, biases, strict=True):
        one = attend_only(wide, k.to(wide.dtype), v.to(wide.dtype), None, None, scale, bias)
        out = share * one if out is None else torch.add(out, one, alpha=share)
    assert out is not None
    return out.to(q.dtype)
