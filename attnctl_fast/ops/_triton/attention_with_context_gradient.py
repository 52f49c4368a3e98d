"""`attention_with_context_gradient` by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import backward as attention_backward

_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> _Results:
    from ...kernels import context_gradient as kernels

    return kernels.attention_with_context_gradient(q, k, v, query_weight, key_bias, scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> _Results:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), lse, lse.new_empty(k.shape), lse.new_empty(k.shape[:3])


_forward_op = opaque(
    "attention_with_context_gradient_triton(Tensor q, Tensor k, Tensor v, Tensor? query_weight, Tensor? key_bias, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Function(Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
    ) -> _Results:
        return _forward_op(q, k, v, query_weight, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Results) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1], output[3])
        ctx.mark_non_differentiable(output[1], output[3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, _: Any, grad_update: Tensor | None, __: Any) -> tuple[Any, ...]:
        """Each result is an attention, and so are their gradients."""
        q, k, v, weight, key_bias, lse, column_lse = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        dq = dk = dv = dweight = None
        if grad_out is not None and any(needed[:3]):
            dq, dk, dv = attention_backward(grad_out, q, k, v, key_bias, lse, ctx.scale, list(needed[:3]))
        if grad_update is not None and (needed[0] or needed[1] or needed[3]):
            values = q if weight is None else (q * weight[:, None, :, None]).to(q.dtype)
            wanted = [needed[1], needed[0], needed[0] or needed[3]]
            grad = grad_update.to(q.dtype)
            # The logsumexp of a masked column is +inf: nothing of its row has a weight.
            of_keys, of_queries, of_values = attention_backward(grad, k, q, values, None, column_lse, ctx.scale, wanted)
            dk = _sum(dk, of_keys)
            if needed[3] and of_values is not None:
                dweight = (q.float() * of_values.float()).sum((1, 3))
            if needed[0] and of_values is not None:
                if weight is not None:
                    of_values = (of_values * weight[:, None, :, None]).to(q.dtype)
                dq = _sum(_sum(dq, of_queries), of_values)
        return dq, dk, dv, dweight, None, None


def attention_with_context_gradient(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype and update [B,H,N,d] float32; `query_weight` [B,M] float32."""
    run = _Function.apply if differentiated(q, k, v, query_weight) else _forward_op
    out, _, update, _ = run(q, k, v, query_weight, key_bias, scale)
    return out, update
