"""`merge_targets` by Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque

_ARGUMENTS = (
    "Tensor rest_out, Tensor rest_lse, Tensor logits, Tensor pinned_logits, Tensor v, Tensor? bias, "
    "Tensor target_ids, Tensor pinned_ids"
)


def _forward(*arguments: Any) -> Tensor:
    from ...kernels import merge_targets as kernels

    return kernels.merge_targets(*arguments)


def _backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    from ...kernels import merge_targets as kernels

    grads = kernels.merge_targets_backward(grad_out, *arguments)
    return [grad_out.new_empty(0) if x is None else x for x in grads]


def _fake_backward(grad_out: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, _, _, needed = arguments
    return [
        x.new_empty(x.shape) if x is not None and wanted else grad_out.new_empty(0)
        for x, wanted in zip(inputs, needed, strict=True)
    ]


_forward_op = opaque(
    f"merge_targets_triton({_ARGUMENTS}) -> Tensor",
    _forward,
    lambda rest_out, rest_lse, logits, pinned_logits, v, *rest: v.new_empty(rest_out.shape),
)
_backward_op = opaque(
    f"merge_targets_triton_backward(Tensor grad_out, {_ARGUMENTS}, bool[] needed) -> Tensor[]",
    _backward,
    _fake_backward,
)


class _MergeTargets(Function):
    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[:6])
        grads = _backward_op(grad_out, *ctx.saved_tensors, needed)
        return *(x if wanted else None for x, wanted in zip(grads, needed, strict=True)), None, None


def merge_targets(
    rest_out: Tensor,
    rest_lse: Tensor,
    logits: Tensor,
    pinned_logits: Tensor,
    v: Tensor,
    bias: Tensor | None,
    target_ids: Tensor,
    pinned_ids: Tensor,
) -> Tensor:
    """out [B,H,M,d] in v's dtype."""
    inputs = (rest_out, rest_lse, logits, pinned_logits, v, bias)
    run = _MergeTargets.apply if differentiated(*inputs) else _forward_op
    return run(*inputs, target_ids, pinned_ids)
