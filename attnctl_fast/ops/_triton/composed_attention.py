"""`composed_attention` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import backward as attention_backward


def _forward(
    q: Tensor, ks: list[Tensor], vs: list[Tensor], key_biases: list[Tensor], shares: list[float], scale: float
) -> tuple[Tensor, Tensor]:
    from ...kernels import composed_attention as kernels

    return kernels.composed_attention(q, ks, vs, key_biases, shares, scale)


def _fake(
    q: Tensor, ks: list[Tensor], vs: list[Tensor], key_biases: list[Tensor], shares: list[float], scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(len(ks), *q.shape[:3], dtype=torch.float32)


_forward_op = opaque(
    "composed_attention_triton(Tensor q, Tensor[] ks, Tensor[] vs, Tensor[] key_biases, float[] shares, float scale) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake,
)


def _split(contexts: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Keys, values and key biases, which may be none, of `count` contexts."""
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
            dq, dk, dv = attention_backward(grad, q, ks[i], vs[i], key_bias, lse[i], ctx.scale, wanted)
            if dq is not None:
                grads[0] = dq if grads[0] is None else grads[0] + dq
            grads[of_k], grads[of_v] = dk, dv
        return None, None, *grads


def composed_attention(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_biases: Sequence[Tensor | None],
    shares: list[float],
    scale: float,
) -> Tensor:
    """out [B,H,M,d] in q's dtype."""
    biases: list[Tensor] = []
    if any(x is not None for x in key_biases):
        for k, x in zip(ks, key_biases, strict=True):
            biases.append(k.new_zeros(k.shape[0], k.shape[2], dtype=torch.float32) if x is None else x)
    if differentiated(q, *ks, *vs):
        # Views, for torch.compile takes no tensor twice and contexts may be the same.
        return _Function.apply(shares, scale, q, *(x.view_as(x) for x in (*ks, *vs, *biases)))[0]
    return _forward_op(q, list(ks), list(vs), biases, shares, scale)[0]
