"""The Gaussian basis of attention regulation and the bias that it spans (arXiv 2403.06381, Eq. 9-10)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._observed import observed
from .._validate import check_grid, check_kernel_dtype
from ._library import composite, differentiable, launcher, widened

CENTRES = ("official", "paper")
Sigma = float | tuple[float, float]


def default_sigma(grid: tuple[int, int]) -> tuple[float, float]:
    """Return the width of the Gaussians per axis, (sigma_y, sigma_x): `side // 16` as in the released code, at least 1.

    Below 16 the released code takes `side // 16` as well, which is zero, and fails; here 1 is the smallest width.
    """
    height, width = check_grid(grid)
    return float(max(height // 16, 1)), float(max(width // 16, 1))


def _axis_centres(side: int, sigma: float, centres: str) -> list[float]:
    """Return the centres along an axis, in cells counted from 0.

    `official`: range(2 sigma, side, 2 sigma). `paper`: 2 sigma p, counted from 1.
    """
    step = 2 * sigma
    if centres == "official":
        count = max(-int(-(side - step) // step), 0)
        return [step * (p + 1) for p in range(count)]
    return [step * p - 1 for p in range(1, int(side / step) + 1)]


def basis_axes(
    grid: tuple[int, int], sigma: Sigma | None, centres: str
) -> tuple[list[float], list[float], float, float]:
    """Return the checked (centres_y, centres_x, sigma_y, sigma_x); do not change the lists, which are kept."""
    axes = _axes if torch.compiler.is_compiling() else _kept_axes
    return axes(check_grid(grid), tuple(sigma) if isinstance(sigma, list) else sigma, centres)


def _axes(grid: tuple[int, int], sigma: Sigma | None, centres: str) -> tuple[list[float], list[float], float, float]:
    height, width = grid
    if centres not in CENTRES:
        raise ValueError(f"centres is {centres!r}; it must be one of {', '.join(map(repr, CENTRES))}")
    if sigma is None:
        sigma = default_sigma(grid)
    pair = tuple(sigma) if isinstance(sigma, (tuple, list)) else (sigma, sigma)
    if len(pair) != 2:
        raise ValueError(f"sigma is {sigma}; it must be one number or (sigma_y, sigma_x)")
    sigma_y, sigma_x = float(pair[0]), float(pair[1])
    if not (0 < sigma_y < float("inf") and 0 < sigma_x < float("inf")):
        raise ValueError(f"sigma is {sigma}; it must be positive and finite (None takes the default of the grid)")
    axes = _axis_centres(height, sigma_y, centres), _axis_centres(width, sigma_x, centres)
    for side, name, axis, width_ in ((height, "height", axes[0], sigma_y), (width, "width", axes[1], sigma_x)):
        if not axis:
            raise ValueError(
                f"the grid's {name} {side} holds no centre for sigma {width_:g} ({centres} centres lie {2 * width_:g} "
                "apart); pass a smaller sigma or choose a layer with a larger grid"
            )
    return *axes, sigma_y, sigma_x


_kept_axes = functools.lru_cache(maxsize=1024)(_axes)


def basis_shape(grid: tuple[int, int], sigma: Sigma | None = None, centres: str = "official") -> tuple[int, int]:
    """Return the number of centres along each axis, (r_y, r_x): the last two dimensions of theta."""
    axis_y, axis_x, _, _ = basis_axes(grid, sigma, centres)
    return len(axis_y), len(axis_x)


def kernel_axes(grid: tuple[int, int], sigma: Sigma | None, centres: str) -> list[float]:
    """Return the numbers that the kernels make the basis of, along y and then along x.

    They are start, step and rest, so that centre i lies at start + (i + 1) * (step + rest). The step has 12 bits, and
    its multiples are exact in float32.
    """
    _, _, sigma_y, sigma_x = basis_axes(grid, sigma, centres)
    start = 0.0 if centres == "official" else -1.0
    axes = []
    for width in (sigma_y, sigma_x):
        mantissa, exponent = math.frexp(2 * width)
        step = math.ldexp(round(mantissa * 2**12), exponent - 12)
        axes += [start, step, 2 * width - step]
    return axes


def axis_basis(side: int, centres: Sequence[float], sigma: float, like: Tensor) -> Tensor:
    """Return G[y, i] = exp(-(y - c_i)^2 / 2 sigma^2): [side, r].

    It is zero below 1e-30, since a CPU multiplies subnormal numbers up to ten times more slowly.
    """
    cells = torch.arange(side, dtype=like.dtype, device=like.device)
    weights = torch.exp(
        -((cells[:, None] - torch.tensor(centres, dtype=like.dtype, device=like.device)) ** 2) / (2 * sigma**2)
    )
    return torch.where(weights < 1e-30, 0.0, weights)


def full_basis(grid: tuple[int, int], sigma: Sigma | None, centres: str, like: Tensor) -> Tensor:
    """Return the reference's basis [r_y, r_x, height, width]."""
    axis_y, axis_x, sigma_y, sigma_x = basis_axes(grid, sigma, centres)
    as_tensor = like.new_tensor
    return reference.gaussian_basis(as_tensor(axis_y), as_tensor(axis_x), sigma_y, sigma_x, grid)


gaussian_bias_reference = composite(
    "gaussian_bias_reference(Tensor theta, Tensor basis) -> Tensor", reference.gaussian_bias
)


@functools.lru_cache(maxsize=64)
def kept_axis_basis(
    side: int, centres: tuple[float, ...], sigma: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `axis_basis`, made once, where nobody traces what is done with it; do not write to it."""
    with torch.inference_mode(False):
        return axis_basis(side, centres, sigma, torch.empty(0, dtype=dtype, device=device))


def _bases(
    height: int, width: int, axis_y: list[float], axis_x: list[float], sigma_y: float, sigma_x: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the basis along y and that along x."""
    if observed((like,)):
        return axis_basis(height, axis_y, sigma_y, like), axis_basis(width, axis_x, sigma_x, like)
    how = like.dtype, like.device
    return kept_axis_basis(height, tuple(axis_y), sigma_y, *how), kept_axis_basis(width, tuple(axis_x), sigma_x, *how)


def _spanned(theta: Tensor, basis_y: Tensor, basis_x: Tensor) -> Tensor:
    """Return G_y theta G_x^T by two calls: matmul would find out their shapes, and those of the gradients, itself."""
    (*leading, along_y, _), (height, width) = theta.shape, (len(basis_y), len(basis_x))
    maps = math.prod(leading)
    rows = (theta.flatten(0, 3) @ basis_x.mT).view(maps, along_y, width)
    return torch.bmm(basis_y.expand(maps, -1, -1), rows).view(*leading, height * width)


gaussian_bias_op = composite("gaussian_bias(Tensor theta, Tensor basis_y, Tensor basis_x) -> Tensor", _spanned)


def _fake(theta: Tensor, grid: Sequence[int], *_: object) -> Tensor:
    return theta.new_empty(*theta.shape[:3], grid[0] * grid[1])


_triton = differentiable(
    "gaussian_bias_triton(Tensor theta, int[] grid, float[] axes) -> Tensor",
    launcher("gaussian_bias", "gaussian_bias"),
    _fake,
    launcher("gaussian_bias", "gaussian_bias_backward"),
    leaves=1,
    linear=True,
)


def check_theta(theta: Tensor, shape: tuple[int, ...], axes: tuple[int, ...], name: str = "theta") -> None:
    """Raise ValueError, under its `name`, unless theta is a float tensor of the (leading) shape [B,H,T,r_y,r_x]."""
    if not theta.dtype.is_floating_point or theta.ndim != 5 or theta.shape[:3] != (shape or theta.shape[:3]):
        wanted = [*(shape or "BHT"), *axes]
        raise ValueError(f"{name} is {theta.dtype} of shape {tuple(theta.shape)}; it must be a float tensor {wanted}")
    if tuple(theta.shape[3:]) != axes:
        raise ValueError(
            f"{name} has {theta.shape[3]}x{theta.shape[4]} centres, but this grid, sigma and centres give "
            f"{axes[0]}x{axes[1]} (see ops.basis_shape)"
        )


def gaussian_bias(
    theta: Tensor,
    grid: tuple[int, int],
    *,
    sigma: Sigma | None = None,
    centres: str = "official",
    impl: str | None = None,
) -> Tensor:
    """Compute S = G_y theta G_x^T, a sum of Gaussians on the grid (arXiv 2403.06381, Eq. 9-10).

    Differentiable in theta.

    Args:
        theta: weights `[B,H,T,r_y,r_x]` of the centres, y along the rows of the grid; float.
        grid: (height, width) of the layer.
        sigma: width of the Gaussians in cells, one float or (sigma_y, sigma_x); None takes `default_sigma(grid)`.
        centres: `"official"` (every 2 sigma from cell 2 sigma, counted from 0, short of the side) or `"paper"` (every
            2 sigma counted from 1, the side included).
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        S `[B,H,T,M]`, M = height*width, in theta's dtype.

    Raises:
        ValueError: sigma not positive, a grid that holds no centre, unknown centres, or a theta that does not fit.
    """
    height, width = check_grid(grid)
    axes = basis_axes((height, width), sigma, centres)
    check_theta(theta, (), (len(axes[0]), len(axes[1])))
    impl = resolve(impl, theta.device)
    if impl == "triton":
        check_kernel_dtype(theta)
        return _triton(theta, [height, width], kernel_axes(grid, sigma, centres))
    (wide,) = widened(theta)
    if impl == "reference":
        span = gaussian_bias_reference(wide, full_basis((height, width), sigma, centres, wide))
    else:
        span = gaussian_bias_op(wide, *_bases(height, width, *axes, wide))
    return span if span.dtype == theta.dtype else span.to(theta.dtype)
