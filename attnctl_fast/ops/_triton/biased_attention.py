"""`biased_attention` and `regulated_attention` by Triton kernels: one operation, whose bias is S or theta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import fake_gradients, gradients, only

# With a width of 0, bias is S [B,H,T,M]. Otherwise it is theta [B,H,T,r_y,r_x], width is that of the grid, and axes are
# what `gaussian_bias.kernel_axes` gives.
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor bias, Tensor target_ids, Tensor pinned_ids, Tensor? key_bias"
_SETTINGS = "float scale, float bias_scale, int width, float[] axes"


def _basis(bias: Tensor, width: int, axes: list[float]) -> tuple[Any, ...] | None:
    return (width, *bias.shape[3:], *axes) if width else None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    width: int,
    axes: list[float],
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from ...kernels import attention as kernels

    basis = _basis(bias, width, axes)
    out, *lses = kernels.biased_attention(
        q, k, v, bias, target_ids, pinned_ids, key_bias, scale, bias_scale, basis, with_lse
    )
    lse, plain_lse = (bias.new_empty(0) if x is None else x for x in lses)
    return out, lse, plain_lse


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    width: int,
    axes: list[float],
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (q.shape[:3] if keep else (0,) for keep in (with_lse, with_lse and pinned_ids.shape[-1] > 0))
    lse, plain_lse = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return q.new_empty(q.shape), lse, plain_lse


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    lse: Tensor,
    plain_lse: Tensor,
    scale: float,
    bias_scale: float,
    width: int,
    axes: list[float],
    needed: list[bool],
) -> list[Tensor]:
    from ...kernels import attention_backward as kernels

    lses = (lse, plain_lse if pinned_ids.shape[-1] else None)
    basis = _basis(bias, width, axes)
    grads = kernels.biased_attention_backward(
        grad_out, q, k, v, bias, target_ids, pinned_ids, key_bias, *lses, scale, bias_scale, basis, needed
    )
    return gradients(grads, (q, k, v, bias))


_forward_op = opaque(
    f"biased_attention_triton({_ARGUMENTS}, {_SETTINGS}, bool with_lse) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
_backward_op = opaque(
    f"biased_attention_triton_backward(Tensor grad_out, {_ARGUMENTS}, Tensor lse, Tensor plain_lse, "
    f"{_SETTINGS}, bool[] needed) -> Tensor[]",
    _backward,
    lambda grad_out, *arguments: fake_gradients(list(arguments[:4]), arguments[-1]),
)


class _BiasedAttention(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:7], *output[1:])
        ctx.settings = inputs[7:]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:4])
        return *only(needed, _backward_op(grad_out, *ctx.saved_tensors, *ctx.settings, needed)), *[None] * 7


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    width: int = 0,
    axes: tuple[float, ...] = (),
) -> Tensor:
    """out [B,H,M,d] in q's dtype, with bias_scale times the bias added to the scaled logits of the targets."""
    arguments = (q, k, v, bias, target_ids, pinned_ids, key_bias, scale, bias_scale, width, list(axes))
    if differentiated(q, k, v, bias):
        return _BiasedAttention.apply(*arguments)[0]
    return _forward_op(*arguments, False)[0]
