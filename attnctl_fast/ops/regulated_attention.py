"""Attention with a Gaussian-basis bias on the target columns: the edited layer of attention regulation."""

from __future__ import annotations

from torch import Tensor

from .._impl import resolve
from .._validate import (
    TokenIds,
    check_device,
    check_dtype,
    check_grid,
    check_kernel_limits,
    check_key_bias,
    check_qkv,
    check_scale,
    check_targets,
    wide_dtype,
)
from ._heads import Grouped
from .biased_attention import biased_attention_triton, with_bias
from .gaussian_bias import Sigma, basis_shape, check_theta, gaussian_bias, kernel_axes


def regulated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    target_ids: TokenIds,
    grid: tuple[int, int],
    *,
    sigma: Sigma | None = None,
    centres: str = "official",
    pinned_ids: TokenIds = (),
    scale: float | None = None,
    key_bias: Tensor | None = None,
    bias_inside_scale: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Compute `biased_attention` whose bias is `gaussian_bias(theta, grid)` (arXiv 2403.06381, Eq. 9-10).

    Differentiable in q, k, v and theta. With Triton the bias is never in memory; otherwise it is, `[B,H,T,M]`.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: keys `[B,H,N,d]`.
        v: values `[B,H,N,d]`.
        theta: weights of the Gaussians `[B,H,T,r_y,r_x]`; float32, or float64 for float64 inputs.
        target_ids: `[T]` or `[B,T]` padded with -1 (a padded target's theta is ignored).
        grid: (height, width), height*width == M.
        sigma: width of the Gaussians in cells, as for `gaussian_bias`.
        centres: where they lie, as for `gaussian_bias`.
        pinned_ids: columns that keep their unbiased probability; the row is not renormalised.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        bias_inside_scale: False is the released code's convention, True the paper's.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: as `biased_attention` and `gaussian_bias`, or a grid that does not match M.
    """
    grouped = check_qkv(q, k, v)
    grid = check_grid(grid, q.shape[2])
    targets, pinned = check_targets(target_ids, pinned_ids, k)
    impl = resolve(impl, q.device)
    check_theta(theta, (*q.shape[:2], targets.shape[-1]), basis_shape(grid, sigma, centres))
    check_device("theta", theta, "q", q.device)
    theta = check_dtype("theta", theta, wide_dtype(q.dtype))
    if grouped:
        heads, key_bias = Grouped(q, k), check_key_bias(key_bias, k)
        given = heads.queries(q), heads.keys(k), heads.keys(v), heads.queries(theta), heads.samples(targets)
        found = regulated_attention(
            *given,
            grid,
            sigma=sigma,
            centres=centres,
            pinned_ids=heads.samples(pinned),
            scale=scale,
            key_bias=heads.samples(key_bias),
            bias_inside_scale=bias_inside_scale,
            impl=impl,
        )
        return heads.whole(found)
    key_bias, scale = check_key_bias(key_bias, k), check_scale(scale, q.shape[3])
    inside = scale if bias_inside_scale else 1.0
    if impl == "triton":
        check_kernel_limits(q, targets.shape[-1] + pinned.shape[-1])
        axes = kernel_axes(grid, sigma, centres)
        return biased_attention_triton(q, k, v, theta, targets, pinned, key_bias, scale, inside, grid[1], axes)
    bias = gaussian_bias(theta, grid, sigma=sigma, centres=centres, impl=impl)
    return with_bias(q, k, v, bias, targets, pinned, key_bias, scale, inside, impl)
