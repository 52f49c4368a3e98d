"""`smooth_maps` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque

Numbers = Sequence[int]
Taps = Sequence[float]


def _forward(maps: Tensor, grid: Numbers, taps: Taps) -> Tensor:
    from ...kernels import smooth_maps as kernels

    return kernels.smooth_maps(maps, grid, taps)


def _backward(grad: Tensor, grid: Numbers, taps: Taps, dtype: torch.dtype) -> Tensor:
    from ...kernels import smooth_maps as kernels

    return kernels.smooth_maps(grad, grid, taps, adjoint=True, dtype=dtype)


_forward_op = opaque(
    "smooth_maps_triton(Tensor maps, int[] grid, float[] taps) -> Tensor",
    _forward,
    lambda maps, grid, taps: maps.new_empty(maps.shape, dtype=torch.float32),
)
_backward_op = opaque(
    "smooth_maps_triton_backward(Tensor grad, int[] grid, float[] taps, ScalarType dtype) -> Tensor",
    _backward,
    lambda grad, grid, taps, dtype: grad.new_empty(grad.shape, dtype=dtype),
)


class _SmoothMaps(Function):
    @staticmethod
    def forward(maps: Tensor, grid: Numbers, taps: Taps) -> Tensor:
        return _forward_op(maps, grid, taps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        maps, *ctx.how = inputs
        ctx.dtype = maps.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _backward_op(grad, *ctx.how, ctx.dtype), None, None


def smooth_maps(maps: Tensor, grid: Numbers, taps: Taps) -> Tensor:
    """[B,n,M] in float32; `taps`: the kernel along one axis."""
    return (_SmoothMaps.apply if differentiated(maps) else _forward_op)(maps, grid, taps)
