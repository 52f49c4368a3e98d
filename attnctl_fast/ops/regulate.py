"""The inner loop of attention regulation: gradient descent on the weights of a Gaussian bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_grid
from ._library import launcher, opaque
from ._objective import (
    Array,
    Distance,
    Objective,
    Terms,
    arrays,
    check_kernel_maps,
    joined,
    namespace,
    softmax,
    softmax_backward_,
    tensor,
)
from .gaussian_bias import Sigma, basis_axes, check_theta, full_basis, kept_axis_basis, kernel_axes
from .target_statistics import TargetStatistics, check_statistics

SELECTIONS = ("sample", "batch")
# Of the Triton kernels: cells and centres along an axis of the grid.
KERNEL_SIDE, KERNEL_CENTRES = 256, 64


class Regulation(NamedTuple):
    """The result of `regulate`.

    Attributes:
        bias: the number to add to the targets' scaled logits, `[B,H,T,M]`.
        theta: the weights of the step that was kept, `[B,H,T,r_y,r_x]`.
        losses: those of every step, per batch and head, `[steps,B,H]`, step 0 being that of the initial theta.
    """

    bias: Tensor
    theta: Tensor
    losses: Tensor


def _span(theta: Array, basis_y: Array, basis_x: Array, bias_scale: float) -> Array:
    """Return the bias [.., height, width] of the weights [.., r_y, r_x]."""
    xp = namespace(theta)
    span = xp.matmul(basis_y, xp.matmul(theta, basis_x.swapaxes(0, 1)))
    return span if bias_scale == 1 else bias_scale * span


def keep_best(losses: Array, thetas: Array, select: str) -> Array:
    """Return the weights of the step with the lowest loss.

    Losses are [steps,B,H] and weights [steps,B,H,..].
    """
    xp = namespace(losses)
    total = losses.mean(2)
    if select == "batch":
        total = total.mean(1, keepdims=True) + xp.zeros_like(total)
    best = xp.where(xp.isnan(total), xp.inf, total).argmin(0)
    samples = np.arange(len(best)) if xp is np else torch.arange(len(best), device=best.device)
    return thetas[best, samples]


def descend(
    logits: Array,
    rest_lse: Array,
    rest_square: Array | None,
    theta: Array,
    bases: tuple[Array, Array],
    bias_scale: float,
    steps: int,
    step_size: float,
    objective: Objective,
) -> tuple[Array, Array]:
    """Return losses [steps,n] and weights [steps,n,T,r_y,r_x] of `steps` weights, each a gradient step after the last.

    For n = B*H rows: logits [n,T,M], rest_lse and rest_square [n,M], theta [n,T,r_y,r_x], all numpy or all torch.
    """
    xp = namespace(logits)
    rows, targets, _ = logits.shape
    basis_y, basis_x = bases
    basis_y_t = basis_y.swapaxes(0, 1)
    terms = Terms(logits, objective)

    edited = joined(logits, rest_lse)
    columns = edited[:, :targets]
    probabilities, gradient = xp.empty_like(edited), xp.empty_like(edited)
    attention = probabilities[:, :targets]
    maps_gradient = gradient[:, :targets].reshape(rows, targets, len(basis_y), len(basis_x))
    distance = None
    if rest_square is not None:
        distance = Distance.of(softmax(edited, xp.empty_like(edited)), rest_square)
    thetas, high, mean, distances = [terms.only_real(theta)], [], [], []
    # A step on penalty * mean theta^2 only shrinks theta.
    shrink = None
    if objective.name == "official":
        centres = theta.shape[2] * theta.shape[3]
        shrink = (1 - (2 * step_size * objective.penalty / centres) * terms.share)[..., None, None]

    for step in range(steps):
        xp.add(logits, _span(thetas[-1], basis_y, basis_x, bias_scale).reshape(logits.shape), out=columns)
        softmax(edited, probabilities)
        measured = terms.measure(attention)
        high.append(measured.high)
        mean.append(measured.mean)
        if distance is not None:
            distances.append(distance.value(probabilities))
        if step + 1 == steps:
            break
        terms.gradient(measured, gradient)
        if distance is not None:
            gradient += objective.penalty * distance.gradient(probabilities, distances[-1])
        softmax_backward_(gradient, probabilities)
        descent = xp.matmul(xp.matmul(basis_y_t, maps_gradient), basis_x)
        shrunk = thetas[-1] if shrink is None else thetas[-1] * shrink
        thetas.append(shrunk - (step_size * bias_scale) * descent)

    history = xp.stack(thetas)
    losses = terms.loss(xp.stack(high), xp.stack(mean))
    if distance is not None:
        losses = losses + objective.penalty * xp.stack(distances)
    if objective.name == "official":
        losses = losses + objective.penalty * (terms.share * (history**2).mean((-1, -2))).sum(-1)
    return losses, history


_Results = tuple[Tensor, Tensor, Tensor]


def _at_strength(
    solve: Callable[[float], _Results],
    strength: float | Tensor,
    logits: Tensor,
    theta: Tensor,
    previous: Tensor | None,
    steps: int,
) -> _Results:
    """Return the result of `solve`.

    At a tensor of zero there is no descent: no bias, the weights as they were, losses of zero.

    On an accelerator, which is never waited for, the descent is made all the same, and then left out.
    """
    if not isinstance(strength, Tensor):
        return solve(strength)
    on_cpu = logits.device.type == "cpu"
    if on_cpu and strength != 0:
        return solve(strength.item())
    padded = (logits == -torch.inf).all(-1)[..., None, None]
    start = torch.where(padded, 0.0, theta if previous is None else previous).contiguous()
    if on_cpu:
        contiguous = torch.contiguous_format
        return torch.zeros_like(logits, memory_format=contiguous), start, logits.new_zeros(steps, *logits.shape[:2])
    bias, kept, losses = solve(1.0)
    off = strength == 0
    return torch.where(off, 0.0, strength * bias), torch.where(off, start, kept), losses.masked_fill(off, 0.0)


def _eager(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    previous: Tensor | None,
    strength_tensor: Tensor | None,
    grid: Sequence[int],
    sigma: Sequence[float],
    centres: str,
    bias_scale: float,
    ema: float,
    strength: float,
    steps: int,
    step_size: float,
    select: str,
    *aim: Any,
) -> _Results:
    objective = Objective(*aim)
    axis_y, axis_x, _, _ = basis_axes((grid[0], grid[1]), (sigma[0], sigma[1]), centres)
    bases = (
        kept_axis_basis(grid[0], tuple(axis_y), sigma[0], logits.dtype, logits.device),
        kept_axis_basis(grid[1], tuple(axis_x), sigma[1], logits.dtype, logits.device),
    )
    given = (logits, rest_lse, rest_square, theta, previous)
    # The descent works in place on views of what is laid out like its maps.
    flat = [x if x is None else x.flatten(0, 1).contiguous() for x in given]

    def solve(strength: float) -> _Results:
        with np.errstate(all="ignore"):
            maps, rest, square, initial, before = arrays(*flat)
            axes = basis_y, basis_x = tuple(arrays(*bases))
            losses, thetas = descend(maps, rest, square, initial, axes, bias_scale, steps, step_size, objective)
            losses = losses.reshape(steps, *logits.shape[:2])
            kept = keep_best(losses, thetas.reshape(steps, *theta.shape), select)
            average = kept.reshape(initial.shape)
            if ema > 0:
                before = thetas[0] if before is None else Terms(maps, objective).only_real(before)
                average = average + ema * (before - average)
            bias = _span(average, basis_y, basis_x, strength * bias_scale).reshape(maps.shape)
        return tensor(bias).view(logits.shape), tensor(kept), tensor(losses)

    factor = strength if strength_tensor is None else strength_tensor
    return _at_strength(solve, factor, logits, theta, previous, steps)


def _reference(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    previous: Tensor | None,
    strength_tensor: Tensor | None,
    grid: Sequence[int],
    sigma: Sequence[float],
    centres: str,
    bias_scale: float,
    ema: float,
    strength: float,
    steps: int,
    step_size: float,
    select: str,
    objective: str,
    *terms: Any,
) -> _Results:
    basis = full_basis((grid[0], grid[1]), (sigma[0], sigma[1]), centres, logits)
    tensors = (logits, rest_lse, rest_square, theta, previous)

    def solve(strength: float) -> _Results:
        settings = (bias_scale, ema, strength, objective, steps, step_size, select, *terms)
        return reference.regulate(*tensors, basis, *settings)

    given = strength if strength_tensor is None else strength_tensor
    return _at_strength(solve, given, logits, theta, previous, steps)


def _fake(logits: Tensor, rest_lse: Tensor, rest_square: Tensor | None, theta: Tensor, *rest: Any) -> _Results:
    steps = rest[-9]
    return logits.new_empty(logits.shape), theta.new_empty(theta.shape), logits.new_empty(steps, *logits.shape[:2])


_SCHEMA = (
    "(Tensor logits, Tensor rest_lse, Tensor? rest_square, Tensor theta, Tensor? previous, Tensor? strength_tensor, "
    "int[] grid, {}, float bias_scale, float ema, float strength, int steps, float step_size, str select, "
    "str objective, float quantile, float level, float? mass, float mass_weight, float penalty) "
    "-> (Tensor, Tensor, Tensor)"
)
_eager_op = opaque("regulate" + _SCHEMA.format("float[] sigma, str centres"), _eager, _fake)
_reference_op = opaque("regulate_reference" + _SCHEMA.format("float[] sigma, str centres"), _reference, _fake)
_triton_op = opaque("regulate_triton" + _SCHEMA.format("float[] axes"), launcher("regulate", "regulate"), _fake)


def _check_kernel_limits(logits: Tensor, grid: tuple[int, int], centres: tuple[int, ...]) -> None:
    """Raise ValueError where the Triton kernels cannot run."""
    check_kernel_maps(logits)
    if max(grid) > KERNEL_SIDE:
        raise ValueError(
            f"the Triton kernels regulate grids of at most {KERNEL_SIDE} cells along an axis, not {grid}; use "
            "impl='eager'"
        )
    if max(centres) > KERNEL_CENTRES:
        raise ValueError(
            f"the Triton kernels take at most {KERNEL_CENTRES} centres along an axis, not {max(centres)}; pass a "
            "larger sigma, or use impl='eager'"
        )


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
    previous: Tensor | None = None,
    ema: float = 0.0,
    strength: float | Tensor = 1.0,
    select: str = "sample",
    quantile: float = 0.9,
    level: float = 0.9,
    mass: float | None = None,
    mass_weight: float | None = None,
    penalty: float | None = None,
    impl: str | None = None,
) -> Regulation:
    """Find the bias that makes the targets' attention meet the objective (arXiv 2403.06381, Eq. 9-15).

    Evaluates `steps` weights theta, each a gradient step of `step_size` after the last on the loss of its batch and
    head, and keeps those with the lowest loss. Costs O(M T r) per step for r centres along an axis, touches neither q,
    k and v nor a full attention map, and never waits for the device. Not differentiable. NaN in the statistics gives
    NaN losses.

    Args:
        stats: from `target_statistics` (`with_square=True` for the paper's objective).
        grid: (height, width), height*width == M.
        theta: initial weights `[B,H,T,r_y,r_x]` (see `basis_shape`) in the logits' dtype; None draws them uniformly
            from [0, 1), as the released code does. A padded target's are ignored and come back as zero.
        generator: for that draw; on the device of the statistics. Under `torch.compile` pass theta instead.
        steps: how many weights are evaluated, the initial one included (released code: 20).
        step_size: of the descent, per head (the released code's 100 * B * H on the mean over batch and heads).
        sigma: width of the Gaussians in cells, as for `gaussian_bias`.
        centres: where they lie, as for `gaussian_bias`.
        bias_scale: factor of S before it is added to the scaled logits: 1 in the released code; the paper adds S before
            scaling, which is bias_scale = scale.
        previous: weights of the sampling step before, as `Regulation.theta` gave them, shaped and typed like theta;
            None for the initial ones. A padded target's are ignored.
        ema: weight of their bias in the bias returned, from 0 to 1 (the released code: 0.25).
        strength: factor of the bias returned (the released code: 0.99 to the power of the sampling step). As a 0-d
            tensor on the device of the statistics, one compiled graph serves every strength, and at zero nothing is
            descended: the bias and the losses are zero, and theta is `previous`, or without one the initial theta.
        select: whose loss decides which step is kept: `"sample"` (mean over the heads of each sample, so that a
            sample's result does not depend on its batch) or `"batch"` (over all, the released code's for several
            images). The paper does not say.
        objective: `"official"` or `"paper"`, as for `regulation_loss`.
        quantile: which quantile of the edited maps is aimed at.
        level: its aim.
        mass: aim of each target's mean attention, as for `regulation_loss`.
        mass_weight: weight of that aim, as for `regulation_loss`.
        penalty: weight of the penalty, as for `regulation_loss`.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        `Regulation(bias, theta, losses)`; `bias` goes to `merge_targets` and is zero for padded targets.

    Raises:
        ValueError: a grid that does not match M or holds no centre, theta or previous that does not fit, sigma not
            positive, ema outside of [0, 1], a strength that is not finite (a tensor's value is trusted), or steps < 1.
    """
    logits = stats.logits
    check_statistics(stats)
    grid = check_grid(grid, logits.shape[3])
    axis_y, axis_x, sigma_y, sigma_x = basis_axes(grid, sigma, centres)
    aim = Objective.checked(objective, quantile, level, mass, mass_weight, penalty, stats.rest_square)
    if isinstance(steps, float) or steps < 1:
        raise ValueError(f"steps is {steps}; it must be an int of at least 1")
    factor = strength if isinstance(strength, Tensor) else None
    if factor is not None:
        if factor.ndim or not factor.dtype.is_floating_point:
            raise ValueError(
                f"strength is {factor.dtype} of shape {tuple(factor.shape)}; it must be a float or a 0-d float tensor"
            )
        if factor.device != logits.device:
            raise ValueError(f"strength is on {factor.device} but the statistics are on {logits.device}; move it there")
        strength = 1.0
    for name, number in (("step_size", step_size), ("strength", strength)):
        if not math.isfinite(number):
            raise ValueError(f"{name} is {number}; it must be finite")
    if not 0 <= ema <= 1:
        raise ValueError(f"ema is {ema}; it must lie in [0, 1]")
    if select not in SELECTIONS:
        raise ValueError(f"select is {select!r}; it must be one of {', '.join(map(repr, SELECTIONS))}")
    shape = (*logits.shape[:3], len(axis_y), len(axis_x))
    if theta is None:
        theta = torch.rand(shape, generator=generator, device=logits.device, dtype=logits.dtype)
    for name, given in (("theta", theta), ("previous", previous)):
        if given is None:
            continue
        check_theta(given, shape[:3], shape[3:], name)
        if given.dtype != logits.dtype or given.device != logits.device:
            raise ValueError(
                f"{name} is {given.dtype} on {given.device}, but the statistics are {logits.dtype} on "
                f"{logits.device}; cast it"
            )
    impl = resolve(impl, logits.device)
    square = stats.rest_square if objective == "paper" else None
    tensors = (logits, stats.rest_lse, square, theta, previous, factor)
    detached = [x if x is None else x.detach() for x in tensors]
    numbers = (float(bias_scale), float(ema), float(strength), int(steps), float(step_size))
    settings = (*numbers, select, aim.name, *aim.terms)
    if impl == "triton":
        _check_kernel_limits(logits, grid, shape[3:])
        return Regulation(*_triton_op(*detached, list(grid), kernel_axes(grid, sigma, centres), *settings))
    run = _reference_op if impl == "reference" else _eager_op
    return Regulation(*run(*detached, list(grid), [sigma_y, sigma_x], centres, *settings))
