"""Attention to several contexts at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import differentiated, launcher, once_differentiable, opaque, widened
from ._tiled import attend_to_each, few_columns
from .attention import attend_only

# Of the sum of the weights' sizes: below it, normalising would amplify rounding instead of composing.
LEAST_TOTAL = 1e-3


def check_weights(weights: Sequence[float], contexts: int) -> list[float]:
    """Return `weights` over their sum.

    ValueError unless they are one finite number per context with a sum that is not (nearly) zero.
    """
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


_backward_op = torch.ops.attnctl_fast.attention_triton_backward


def _fake(
    q: Tensor, ks: list[Tensor], vs: list[Tensor], key_biases: list[Tensor], shares: list[float], scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(len(ks), *q.shape[:3], dtype=torch.float32)


_forward_op = opaque(
    "composed_attention_triton(Tensor q, Tensor[] ks, Tensor[] vs, Tensor[] key_biases, float[] shares, float scale) "
    "-> (Tensor, Tensor)",
    launcher("composed_attention", "composed_attention"),
    _fake,
)


def _split(contexts: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return keys, values and key biases, which may be none, of `count` contexts."""
    return list(contexts[:count]), list(contexts[count : 2 * count]), list(contexts[2 * count :])


class _Function(Function):
    @staticmethod
    def forward(shares: list[float], scale: float, q: Tensor, *contexts: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_op(q, *_split(contexts, len(shares)), shares, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.shares, ctx.scale, *tensors = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> tuple[Any, ...]:
        lse, q, *contexts = ctx.saved_tensors
        ks, vs, key_biases = _split(contexts, len(ctx.shares))
        needed = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * len(needed)
        if grad_out is None:
            return None, None, *grads
        for i, share in enumerate(ctx.shares):
            of_k, of_v = 1 + i, 1 + len(ks) + i
            wanted = [needed[0], needed[of_k], needed[of_v]]
            if not any(wanted):
                continue
            grad, key_bias = (grad_out * share).to(q.dtype), key_biases[i] if key_biases else None
            found = _backward_op(grad, None, q, ks[i], vs[i], key_bias, ctx.scale, lse[i], wanted)
            dq, grads[of_k], grads[of_v] = (x if made else None for x, made in zip(found, wanted, strict=True))
            if dq is not None:
                grads[0] = dq if grads[0] is None else grads[0] + dq
        return None, None, *grads


def _given(ks: Sequence[Tensor], key_biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the key bias of every context, zeros for None; an empty list where none has one."""
    if all(x is None for x in key_biases):
        return []
    wide = wide_dtype(ks[0].dtype)
    pairs = zip(ks, key_biases, strict=True)
    return [k.new_zeros(k.shape[0], k.shape[2], dtype=wide) if x is None else x for k, x in pairs]


def _triton(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_biases: Sequence[Tensor | None],
    shares: list[float],
    scale: float,
) -> Tensor:
    biases = _given(ks, key_biases)
    if differentiated(q, *ks, *vs):
        # Views, for torch.compile takes no tensor twice and contexts may be the same.
        return _Function.apply(shares, scale, q, *(x.view_as(x) for x in (*ks, *vs, *biases)))[0]
    return _forward_op(q, list(ks), list(vs), biases, shares, scale)[0]


_attend_to_each_op = opaque(
    "composed_attention_to_few(Tensor q, Tensor[] ks, Tensor[] vs, Tensor[] key_biases, float[] shares, float scale) "
    "-> Tensor",
    attend_to_each,
    lambda q, *_: torch.empty_like(q),
)


def _eager(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_biases: Sequence[Tensor | None],
    shares: list[float],
    scale: float,
) -> Tensor:
    dtype, count = q.dtype, len(ks)
    q, *contexts = widened(q, *ks, *vs)
    ks, vs = contexts[:count], contexts[count:]
    alone = not differentiated(q, *contexts)
    # To vmap, an operation of lists is a closed box.
    if alone and not torch._C._are_functorch_transforms_active() and all(few_columns(q, k) for k in ks):
        return _attend_to_each_op(q, ks, vs, _given(ks, key_biases), shares, scale).to(dtype)
    # In place where no gradient needs it: new memory costs as much as the sum.
    multiply, add = (Tensor.mul_, Tensor.add_) if alone else (torch.mul, torch.add)
    out = None
    for k, v, share, bias in zip(ks, vs, shares, key_biases, strict=True):
        one = attend_only(q, k, v, None, None, scale, bias)
        out = multiply(one, share) if out is None else add(out, one, alpha=share)
    assert out is not None
    return out.to(dtype)


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
    """Compute the weighted mean of attention to several contexts.

    That is sum_i w_i softmax(scale q k_i^T) v_i / sum_i w_i (arXiv 2306.09869, "CACAO").

    A positive weight adds a context (conjunction), a negative one takes it away (negation); the main context has
    weight 1. As the weights are normalised, this is what combining after the output projection gives. Differentiable in
    q, ks and vs.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        ks: keys `[B,H,N_i,d]` of every context; their lengths may differ.
        vs: values `[B,H,N_i,d]` of every context.
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
    grouped = [check_qkv(q, k, v) for k, v in zip(ks, vs, strict=True)]
    if len({k.shape[1] for k in ks}) > 1:
        raise ValueError(f"ks have {[k.shape[1] for k in ks]} heads; give the keys of all contexts as many")
    if key_bias is not None and len(key_bias) != len(ks):
        raise ValueError(f"key_bias holds {len(key_bias)} for {len(ks)} contexts; pass one, or None, per context")
    given = [None] * len(ks) if key_bias is None else key_bias
    biases = [check_key_bias(x, k, f"key_bias[{i}]") for i, (x, k) in enumerate(zip(given, ks, strict=True))]
    if grouped[0]:
        heads = Grouped(q, ks[0])
        of_k, of_v = ([heads.keys(x) for x in every] for every in (ks, vs))
        own = [heads.samples(x) for x in biases]
        found = composed_attention(heads.queries(q), of_k, of_v, weights, scale=scale, key_bias=own, impl=impl)
        return heads.whole(found)
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
        return _triton(q, ks, vs, biases, shares, scale)
    return _eager(q, ks, vs, biases, shares, scale)
