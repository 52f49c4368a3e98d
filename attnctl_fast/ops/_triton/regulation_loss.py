"""`regulation_loss` by Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque

_ARGUMENTS = (
    "Tensor logits, Tensor rest_lse, Tensor? rest_square, Tensor bias, Tensor? theta, "
    "str objective, float quantile, float level, float? mass, float mass_weight, float penalty"
)
_INPUTS = 5


def _forward(*arguments: Any) -> Tensor:
    from ...kernels import regulation_loss as kernels

    return kernels.regulation_loss(arguments[:_INPUTS], *arguments[_INPUTS:])


def _backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    from ...kernels import regulation_loss as kernels

    *aim, needed = arguments[_INPUTS:]
    gradients = kernels.regulation_loss_backward(grad, arguments[:_INPUTS], needed, *aim)
    return [grad.new_empty(0) if x is None else x for x in gradients]


def _fake_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return [
        x.new_empty(x.shape) if wanted else grad.new_empty(0)
        for x, wanted in zip(arguments[:_INPUTS], arguments[-1], strict=True)
    ]


_forward_op = opaque(
    f"regulation_loss_triton({_ARGUMENTS}) -> Tensor",
    _forward,
    lambda logits, *rest: logits.new_empty(logits.shape[:2]),
)
_backward_op = opaque(
    f"regulation_loss_triton_backward(Tensor grad, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)


class _RegulationLoss(Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:_INPUTS])
        ctx.aim = inputs[_INPUTS:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:_INPUTS])
        gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.aim, needed)
        kept = (x if wanted else None for x, wanted in zip(gradients, needed, strict=True))
        return *kept, *[None] * len(ctx.aim)


def regulation_loss(
    logits: Tensor, rest_lse: Tensor, rest_square: Tensor | None, bias: Tensor, theta: Tensor | None, *aim: Any
) -> Tensor:
    """loss [B,H]; rest_square for the paper's objective only, theta for the official one only. `aim`: the objective's
    name and `Objective.terms`."""
    inputs = (logits, rest_lse, rest_square, bias, theta)
    return (_RegulationLoss.apply if differentiated(*inputs) else _forward_op)(*inputs, *aim)
