"""`map_similarity` by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque


def _forward(maps: Tensor) -> tuple[Tensor, Tensor]:
    from ...kernels import similarity as kernels

    return kernels.map_similarity(maps)


def _backward(grad: Tensor, maps: Tensor, similarity: Tensor, inverse: Tensor) -> Tensor:
    from ...kernels import similarity as kernels

    return kernels.map_similarity_backward(grad, maps, similarity, inverse)


def _fake(maps: Tensor) -> tuple[Tensor, Tensor]:
    inverse = maps.new_empty(maps.shape[:2], dtype=torch.float32)
    return inverse.new_empty(*maps.shape[:2], maps.shape[1]), inverse


_forward_op = opaque("map_similarity_triton(Tensor maps) -> (Tensor, Tensor)", _forward, _fake)
_backward_op = opaque(
    "map_similarity_triton_backward(Tensor grad, Tensor maps, Tensor similarity, Tensor inverse) -> Tensor",
    _backward,
    lambda grad, maps, similarity, inverse: maps.new_empty(maps.shape),
)


class _MapSimilarity(Function):
    @staticmethod
    def forward(maps: Tensor) -> tuple[Tensor, Tensor]:
        return _forward_op(maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor]:
        return (_backward_op(grad, *ctx.saved_tensors),)


def map_similarity(maps: Tensor) -> Tensor:
    """The cosines [B,n,n] in float32."""
    return (_MapSimilarity.apply if differentiated(maps) else _forward_op)(maps)[0]
