"""The inner loop of attention regulation: gradient descent on the weights of a Gaussian bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_grid
from ._library import NAMESPACE
from ._objective import Distance, Objective, Terms, softmax_backward
from .gaussian_bias import Sigma, axis_basis, basis_axes, check_theta, full_basis
from .target_statistics import TargetStatistics

SELECTIONS = ("sample", "batch")


class Regulation(NamedTuple):
    """bias: what to add to the targets' scaled logits, `[B,H,T,M]`. theta: the weights behind it, `[B,H,T,r_y,r_x]`.
    losses: of every step, per batch and head, `[steps,B,H]`, step 0 being that of the initial theta."""

    bias: Tensor
    theta: Tensor
    losses: Tensor


class _Gaussians:
    """S = G_y theta G_x^T and its transpose, for `n*T` maps at once."""

    def __init__(self, grid: Sequence[int], sigma: Sequence[float], centres: str, like: Tensor) -> None:
        axis_y, axis_x, _, _ = basis_axes((grid[0], grid[1]), (sigma[0], sigma[1]), centres)
        self.height, self.width = grid
        self.y = axis_basis(self.height, axis_y, sigma[0], like)
        self.x = axis_basis(self.width, axis_x, sigma[1], like)

    def span(self, theta: Tensor) -> Tensor:
        """[.., r_y, r_x] to [.., M]."""
        maps = theta.flatten(0, -3)
        rows = (maps.flatten(0, 1) @ self.x.mT).view(len(maps), -1, self.width)
        return torch.bmm(self.y.expand(len(maps), -1, -1), rows).view(*theta.shape[:-2], -1)

    def project(self, maps: Tensor) -> Tensor:
        """[.., M] to [.., r_y, r_x]."""
        grids = maps.view(-1, self.height, self.width)
        columns = torch.bmm(self.y.mT.expand(len(grids), -1, -1), grids)
        return (columns.flatten(0, 1) @ self.x).view(*maps.shape[:-1], -1, self.x.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::regulate", mutates_args=())
def regulate_op(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    grid: Sequence[int],
    sigma: Sequence[float],
    centres: str,
    bias_scale: float,
    steps: int,
    step_size: float,
    select: str,
    objective: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    aim = Objective(objective, quantile, level, mass, mass_weight, penalty)
    batch, heads, targets, _ = logits.shape
    maps, rest = logits.flatten(0, 1), rest_lse.flatten(0, 1)
    terms = Terms(maps, aim)
    gaussians = _Gaussians(grid, sigma, centres, logits)

    edited = torch.cat([maps, rest.unsqueeze(1)], 1)
    columns = edited[:, :targets]
    distance = None
    if rest_square is not None:
        distance = Distance.of(edited.softmax(1), rest_square.flatten(0, 1))
    gradient = torch.zeros_like(edited)
    history = logits.new_empty(steps, batch * heads, targets, *theta.shape[3:])
    history[0] = theta.flatten(0, 1)
    thetas = history.unbind()
    high, mean, distances = [], [], []
    # A step on penalty * mean theta^2 only shrinks theta.
    shrink = None
    if objective == "official":
        shrink = (1 - (2 * step_size * penalty / theta[0, 0, 0].numel()) * terms.share)[..., None, None]

    for step, current in enumerate(thetas):
        torch.add(maps, gaussians.span(current), alpha=bias_scale, out=columns)
        probabilities = edited.softmax(1)
        measured = terms.measure(probabilities)
        high.append(measured.high)
        mean.append(measured.mean)
        if distance is not None:
            distances.append(distance.value(probabilities))
        if step + 1 == steps:
            break
        total = terms.gradient_(gradient, measured)
        if distance is not None:
            total = total + penalty * distance.gradient(probabilities, distances[-1])
        descent = gaussians.project(softmax_backward(total, probabilities))[:, :targets]
        shrunk = current if shrink is None else current * shrink
        torch.add(shrunk, descent, alpha=-step_size * bias_scale, out=thetas[step + 1])

    losses = terms.loss(torch.stack(high), torch.stack(mean))
    if distance is not None:
        losses = losses + penalty * torch.stack(distances)
    if objective == "official":
        losses = losses + penalty * (terms.share * history.square().mean((-1, -2))).sum(-1)
    losses = losses.view(steps, batch, heads)
    best = reference.keep_best(losses, select)
    kept = history.view(steps, *theta.shape)[best, torch.arange(batch, device=best.device)]
    bias = bias_scale * gaussians.span(kept)
    return bias.masked_fill((terms.share == 0).view(batch, heads, targets, 1), 0.0), kept, losses


@torch.library.custom_op(f"{NAMESPACE}::regulate_reference", mutates_args=())
def regulate_reference_op(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    grid: Sequence[int],
    sigma: Sequence[float],
    centres: str,
    bias_scale: float,
    steps: int,
    step_size: float,
    select: str,
    objective: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    basis = full_basis((grid[0], grid[1]), (sigma[0], sigma[1]), centres, logits)
    terms = (quantile, level, mass, mass_weight, penalty)
    return reference.regulate(
        logits, rest_lse, rest_square, theta, basis, bias_scale, objective, steps, step_size, select, *terms
    )


def _fake(logits, rest_lse, rest_square, theta, grid, sigma, centres, bias_scale, steps, *rest):  # type: ignore[no-untyped-def]
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(logits, memory_format=contiguous),
        torch.empty_like(theta, memory_format=contiguous),
        logits.new_empty(steps, *logits.shape[:2]),
    )


regulate_op.register_fake(_fake)
regulate_reference_op.register_fake(_fake)


def regulate(
    stats: TargetStatistics,
    grid: tuple[int, int],
    *,
    theta: Tensor | None = None,
    generator: torch.Generator | None = None,
    objective: str = "official",
    steps: int = 20,
    step_size: float = 100.0,
    sigma: Sigma | None = None,
    centres: str = "official",
    bias_scale: float = 1.0,
    select: str = "sample",
    quantile: float = 0.9,
    level: float = 0.9,
    mass: float | None = None,
    mass_weight: float | None = None,
    penalty: float | None = None,
    impl: str | None = None,
) -> Regulation:
    """Find the bias that makes the targets' attention meet the objective (arXiv 2403.06381, Eq. 9-15).

    Evaluates `steps` weights theta, each a gradient step of `step_size` on the loss of its batch and head after the last,
    and keeps those with the lowest loss. Costs O(M T r) per step for r centres along an axis, touches neither q, k and v
    nor a full attention map, and never waits for the device. Not differentiable. NaN in the statistics gives NaN losses.

    Args:
        stats: from `target_statistics` (`with_square=True` for the paper's objective).
        grid: (height, width), height*width == M.
        theta: initial weights `[B,H,T,r_y,r_x]` (see `basis_shape`) in the logits' dtype; None draws them uniformly from
            [0, 1), as the released code does.
        generator: for that draw; on the device of the statistics.
        steps: how many weights are evaluated, the initial one included (released code: 20).
        step_size: of the descent, per head (the released code's 100 * B * H on the mean over batch and heads is the same).
        sigma, centres: as for `gaussian_bias`.
        bias_scale: factor of S before it is added to the scaled logits: 1 in the released code; the paper adds S before
            scaling, which is bias_scale = scale.
        select: whose loss decides which step is kept: `"sample"` (mean over the heads of each sample, so that a sample's
            result does not depend on its batch) or `"batch"` (over all, the released code's for several images). The
            paper does not say; the last step is kept only if it is the best.
        objective, quantile, level, mass, mass_weight, penalty: as for `regulation_loss`.
        impl: `"eager"` or `"reference"`; None for the default.

    Returns:
        `Regulation(bias, theta, losses)`; `bias` goes to `merge_targets` and is zero for padded targets.

    Raises:
        ValueError: a grid that does not match M or holds no centre, theta that does not fit, sigma not positive, or
            steps < 1.
    """
    logits = stats.logits
    check_grid(grid, logits.shape[3])
    axis_y, axis_x, sigma_y, sigma_x = basis_axes(grid, sigma, centres)
    aim = Objective.checked(objective, quantile, level, mass, mass_weight, penalty, stats.rest_square)
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; it must be one of {', '.join(map(repr, SELECTIONS))}")
    shape = (*logits.shape[:3], len(axis_y), len(axis_x))
    if theta is None:
        theta = torch.rand(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    check_theta(theta, shape[:3], shape[3:])
    if theta.dtype != logits.dtype or theta.device != logits.device:
        raise ValueError(
            f"theta is {theta.dtype} on {theta.device}, but the statistics are {logits.dtype} on {logits.device}; cast it"
        )
    run = regulate_reference_op if resolve(impl) == "reference" else regulate_op
    square = stats.rest_square if objective == "paper" else None
    detached = [x if x is None else x.detach() for x in (logits, stats.rest_lse, square, theta)]
    settings = (bias_scale, steps, step_size, select, aim.name, *aim.terms)
    return Regulation(*run(*detached, list(grid), [sigma_y, sigma_x], centres, *settings))
