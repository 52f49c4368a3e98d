"""`attention` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque


def _forward(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    from ...kernels import attention as kernels

    return kernels.attention(q, k, v, key_bias, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def gradients(grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of `inputs` as an operation can return them: an empty tensor for one that is None."""
    return [x.new_empty(0) if grad is None else grad for grad, x in zip(grads, inputs, strict=True)]


def fake_gradients(inputs: list[Tensor], needed: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape) if keep else x.new_empty(0) for x, keep in zip(inputs, needed, strict=True)]


def only(needed: list[bool], grads: list[Tensor]) -> list[Tensor | None]:
    return [x if keep else None for x, keep in zip(grads, needed, strict=True)]


def _backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    from ...kernels import attention_backward as kernels

    return gradients(kernels.attention_backward(grad_out, *arguments), arguments[1:4])


_forward_op = opaque(
    "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? key_bias, float scale) -> (Tensor, Tensor)",
    _forward,
    _fake,
)
_backward_op = opaque(
    "attention_triton_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? key_bias, Tensor lse, float scale, bool[] needed) -> Tensor[]",
    _backward,
    lambda grad_out, grad_lse, q, k, v, key_bias, lse, scale, needed: fake_gradients([q, k, v], needed),
)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lse: Tensor,
    scale: float,
    needed: list[bool],
    grad_lse: Tensor | None = None,
) -> list[Tensor | None]:
    """dq, dk and dv, as `needed` says of each."""
    return only(needed, _backward_op(grad_out, grad_lse, q, k, v, key_bias, lse, scale, needed))


class _Attention(Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        return _forward_op(q, k, v, key_bias, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, key_bias, lse = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        grad_out = torch.zeros_like(q) if grad_out is None else grad_out
        needed = list(ctx.needs_input_grad[:3])
        return *backward(grad_out, q, k, v, key_bias, lse, ctx.scale, needed, grad_lse), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype and lse [B,H,M] float32."""
    run = _Attention.apply if differentiated(q, k, v) else _forward_op
    return run(q, k, v, key_bias, scale)
