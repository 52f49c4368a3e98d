"""Gaussian smoothing of attention maps, as Attend-and-Excite and T-SAM smooth them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_grid, check_kernel_dtype, wide_dtype
from ._library import composite, differentiable, launcher
from ._objective import Array, arrays, tensor

# Of the Triton kernels: the cells of a kernel along an axis.
KERNEL_TAPS = 7

smooth_maps_reference = composite(
    "smooth_maps_reference(Tensor maps, int[] grid, float[] taps) -> Tensor", reference.smooth_maps
)


def check_maps(maps: Tensor) -> None:
    """Raise ValueError unless maps is [B,n,M], non-empty and floating-point."""
    if maps.ndim != 3:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; it must be [batch, tokens, image tokens]")
    if not maps.dtype.is_floating_point:
        raise ValueError(f"maps has dtype {maps.dtype}; it must be a floating-point tensor")
    if 0 in maps.shape:
        raise ValueError(f"maps has shape {tuple(maps.shape)}: every dimension must be at least 1")


def check_smoothing(
    grid: tuple[int, int], image_tokens: int, sigma: float, kernel_size: int
) -> tuple[list[int], list[float]]:
    """Return the checked grid, and the kernel along one axis: exp(-((x - mu) / 2 sigma)^2) over its sum."""
    sides = check_grid(grid, image_tokens)
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size!r}; it must be an odd int of at least 1 (1 does not smooth)")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; it must be positive and finite")
    radius = kernel_size // 2
    if radius >= min(sides):
        raise ValueError(
            f"a kernel of {kernel_size} reflects {radius} cells at each border, but the grid is {sides[0]}x{sides[1]}; "
            "pass a smaller kernel_size (1 does not smooth) or choose a layer with a larger grid"
        )
    weights = [math.exp(-(((x - radius) / (2 * sigma)) ** 2)) for x in range(kernel_size)]
    return list(sides), [weight / sum(weights) for weight in weights]


def check_kernel_taps(taps: Sequence[float]) -> None:
    """Raise ValueError unless the Triton kernels smooth with `taps`."""
    if len(taps) > KERNEL_TAPS:
        raise ValueError(
            f"the Triton kernels smooth with a kernel_size of at most {KERNEL_TAPS}, not {len(taps)}; use impl='eager'"
        )


@functools.lru_cache(maxsize=64)
def _kept_axis(side: int, taps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Array:
    """Return the smoothing along an axis as a matrix [side, side]; for use inside of opaque operations."""
    radius = len(taps) // 2
    weights = np.zeros((side, side))
    for row in range(side):
        for shift, weight in enumerate(taps, row - radius):
            reflected = abs(shift) if shift < side else 2 * (side - 1) - shift
            weights[row, reflected] += weight
    return arrays(torch.tensor(weights, dtype=dtype, device=device))[0]


def smooth(maps: Tensor, grid: Sequence[int], taps: Sequence[float], adjoint: bool = False) -> Array:
    """Smooth maps [..,M], or the gradient of that: a numpy array where they lie on a CPU."""
    (x,) = arrays(maps)
    if len(taps) == 1:
        return x
    along_y, along_x = (_kept_axis(side, tuple(taps), maps.dtype, maps.device) for side in grid)
    if not adjoint:
        along_y, along_x = along_y.T, along_x.T
    # Both axes by products of whole matrices: a product of many small ones costs a call each.
    rows = x.reshape(-1, grid[1]) @ along_x
    columns = rows.reshape(-1, *grid).swapaxes(1, 2).reshape(-1, grid[0]) @ along_y
    return columns.reshape(-1, grid[1], grid[0]).swapaxes(1, 2).reshape(x.shape)


def _forward(maps: Tensor, grid: Sequence[int], taps: Sequence[float], adjoint: bool = False) -> Tensor:
    if len(taps) == 1:
        return maps.clone(memory_format=torch.contiguous_format)
    return tensor(smooth(maps, grid, taps, adjoint))


def _backward(
    grad: Tensor, maps: Tensor, grid: Sequence[int], taps: Sequence[float], needed: Sequence[bool]
) -> list[Tensor | None]:
    return [_forward(grad, grid, taps, True)]


_SCHEMA = "(Tensor maps, int[] grid, float[] taps) -> Tensor"
_eager = differentiable(
    f"smooth_maps{_SCHEMA}", _forward, lambda maps, *_: maps.new_empty(maps.shape), _backward, leaves=1, linear=True
)
_triton = differentiable(
    f"smooth_maps_triton{_SCHEMA}",
    launcher("smooth_maps", "smooth_maps"),
    lambda maps, *_: maps.new_empty(maps.shape, dtype=torch.float32),
    launcher("smooth_maps", "smooth_maps_backward"),
    leaves=1,
    linear=True,
)


def wide(maps: Tensor) -> Tensor:
    """Return half precision in float32."""
    return maps.to(wide_dtype(maps.dtype))


def smooth_maps(
    maps: Tensor,
    grid: tuple[int, int],
    *,
    sigma: float = 0.5,
    kernel_size: int = 3,
    impl: str | None = None,
) -> Tensor:
    """Convolve every token's map with a Gaussian, its border reflected.

    As in the released code of Attend-and-Excite and T-SAM.

    Along each axis the kernel is `exp(-((x - mu) / (2 sigma))^2)` over its sum, mu = (kernel_size - 1) / 2: the
    released code's, which is wider by sqrt(2) than a Gaussian of standard deviation sigma. Differentiable in maps. NaN
    and inf reach the cells around theirs; with `"eager"`, which multiplies whole matrices, all cells of their map.

    Args:
        maps: `[B,n,M]`; float.
        grid: (height, width) of the maps, height * width = M.
        sigma: width of the kernel in cells.
        kernel_size: its cells along an axis, odd; 1 does not smooth.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        `[B,n,M]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: maps of another shape or dtype, or empty; a grid that is not M cells or smaller than the kernel
            reflects, an even kernel_size, or a sigma that is not positive; or (Triton) float64 or a kernel_size over 7.
    """
    check_maps(maps)
    sides, taps = check_smoothing(grid, maps.shape[2], sigma, kernel_size)
    impl = resolve(impl, maps.device)
    if impl == "triton":
        check_kernel_dtype(maps)
        check_kernel_taps(taps)
        return _triton(maps, sides, taps)
    if impl == "reference":
        return smooth_maps_reference(wide(maps), sides, taps)
    return _eager(wide(maps), sides, taps)
