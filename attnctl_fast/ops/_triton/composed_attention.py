"""`composed_attention` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import backward as attention_backward


def _forward(q: Tensor, ks: list[Tensor], vs: list[Tensor], shares: list[float], scale: float) -> tuple[Tensor, Tensor]:
    from ...kernels import composed_attention as kernels

    return kernels.composed_attention(q, ks, vs, shares, scale)


def _fake(q: Tensor, ks: list[Tensor], vs: list[Tensor], shares: list[float], scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(len(ks), *q.shape[:3], dtype=torch.float32)


_forward_op = opaque(
    "composed_attention_triton(Tensor q, Tensor[] ks, Tensor[] vs, float[] shares, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake,
)


class _Function(Function):
    @staticmethod
    def forward(shares: list[float], scale: float, q: Tensor, *contexts: Tensor) -> tuple[Tensor, Tensor]:
        half = len(contexts) // 2
        return _forward_op(q, list(contexts[:half]), list(contexts[half:]), shares, scale)

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
        count = len(contexts) // 2
        needed = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * len(needed)
        if grad_out is None:
            return None, None, *grads
        for i in range(count):
            wanted = [needed[0], needed[1 + i], needed[1 + count + i]]
            if not any(wanted):
                continue
            grad = (grad_out * ctx.shares[i]).to(q.dtype)
            dq, dk, dv = attention_backward(grad, q, contexts[i], contexts[count + i], lse[i], ctx.scale, wanted)
            if dq is not None:
                grads[0] = dq if grads[0] is None else grads[0] + dq
            grads[1 + i], grads[1 + count + i] = dk, dv
        return None, None, *grads


def composed_attention(
    q: Tensor, ks: Sequence[Tensor], vs: Sequence[Tensor], shares: list[float], scale: float
) -> Tensor:
    """out [B,H,M,d] in q's dtype."""
    if differentiated(q, *ks, *vs):
        # Views, for torch.compile takes no tensor twice and contexts may be the same.
        return _Function.apply(shares, scale, q, *(x.view_as(x) for x in (*ks, *vs)))[0]
    return _forward_op(q, list(ks), list(vs), shares, scale)[0]
