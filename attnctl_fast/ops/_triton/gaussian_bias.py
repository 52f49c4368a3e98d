"""`gaussian_bias` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque


def _forward(theta: Tensor, grid: Sequence[int], axes: Sequence[float]) -> Tensor:
    from ...kernels import gaussian_bias as kernels

    return kernels.gaussian_bias(theta, grid, axes)


def _backward(grad: Tensor, grid: Sequence[int], centres: Sequence[int], axes: Sequence[float]) -> Tensor:
    from ...kernels import gaussian_bias as kernels

    return kernels.gaussian_bias_backward(grad, grid, centres, axes)


_forward_op = opaque(
    "gaussian_bias_triton(Tensor theta, int[] grid, float[] axes) -> Tensor",
    _forward,
    lambda theta, grid, axes: theta.new_empty(*theta.shape[:3], grid[0] * grid[1]),
)
_backward_op = opaque(
    "gaussian_bias_triton_backward(Tensor grad, int[] grid, int[] centres, float[] axes) -> Tensor",
    _backward,
    lambda grad, grid, centres, axes: grad.new_empty(*grad.shape[:3], *centres),
)


class _GaussianBias(Function):
    @staticmethod
    def forward(theta: Tensor, grid: Sequence[int], axes: Sequence[float]) -> Tensor:
        return _forward_op(theta, grid, axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        theta, *ctx.axes = inputs
        ctx.centres = theta.shape[3:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grid, axes = ctx.axes
        return _backward_op(grad, grid, list(ctx.centres), axes), None, None


def gaussian_bias(theta: Tensor, grid: Sequence[int], axes: Sequence[float]) -> Tensor:
    """S [B,H,T,M] in theta's dtype; `axes`: from `kernel_axes`."""
    return (_GaussianBias.apply if differentiated(theta) else _forward_op)(theta, grid, axes)
