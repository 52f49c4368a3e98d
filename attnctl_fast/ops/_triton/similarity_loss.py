"""`similarity_loss` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque

_ARGUMENTS = "Tensor maps, Tensor text_similarity, Tensor? lengths, int[] grid, float[] taps, str variant, float weight"


def _forward(maps: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ...kernels import similarity as kernels

    loss, smoothed, mixing = kernels.similarity_loss(maps, *arguments)
    return (
        loss,
        loss.new_empty(0) if smoothed is None else smoothed,
        loss.new_empty(0) if mixing is None else mixing,
    )


def _fake(maps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = maps.shape
    loss = maps.new_empty(batch, dtype=torch.float32)
    if not rest[-1]:
        return loss, loss.new_empty(0), loss.new_empty(0)
    return loss, loss.new_empty(maps.shape), loss.new_empty(batch, tokens, tokens)


def _backward(
    grad: Tensor, smoothed: Tensor, mixing: Tensor, grid: Sequence[int], taps: Sequence[float], dtype: torch.dtype
) -> Tensor:
    from ...kernels import similarity as kernels

    return kernels.similarity_loss_backward(grad, smoothed, mixing, grid, taps, dtype)


_forward_op = opaque(f"similarity_loss_triton({_ARGUMENTS}, bool needed) -> (Tensor, Tensor, Tensor)", _forward, _fake)
_backward_op = opaque(
    "similarity_loss_triton_backward(Tensor grad, Tensor smoothed, Tensor mixing, int[] grid, float[] taps, "
    "ScalarType dtype) -> Tensor",
    _backward,
    lambda grad, smoothed, mixing, grid, taps, dtype: smoothed.new_empty(smoothed.shape, dtype=dtype),
)


class _SimilarityLoss(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(*arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, smoothed, mixing = output
        ctx.save_for_backward(smoothed, mixing, inputs[0])
        ctx.mark_non_differentiable(smoothed, mixing)
        ctx.how = *inputs[3:5], inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward_op(grad, *ctx.saved_tensors[:2], *ctx.how), *[None] * 6


def similarity_loss(maps: Tensor, *arguments: Any) -> Tensor:
    """loss [B]; `arguments`: text_similarity [B,n,n] in float32, lengths, grid, taps, variant and weight."""
    if differentiated(maps):
        return _SimilarityLoss.apply(maps, *arguments)[0]
    return _forward_op(maps, *arguments, False)[0]
