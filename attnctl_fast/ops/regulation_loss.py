"""The objective of attention regulation, differentiable in the statistics, the bias and theta."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_dtype
from ._library import NAMESPACE, composite
from ._objective import (
    Array,
    Distance,
    Objective,
    Terms,
    arrays,
    check_kernel_maps,
    joined,
    namespace,
    reciprocal,
    softmax,
    softmax_backward_,
    tensor,
)
from ._triton.regulation_loss import regulation_loss as regulation_loss_triton
from .gaussian_bias import check_theta
from .merge_targets import check_bias
from .target_statistics import TargetStatistics, check_statistics

regulation_loss_reference = composite(
    "regulation_loss_reference(Tensor logits, Tensor rest_lse, Tensor? rest_square, Tensor bias, Tensor? theta, "
    "str objective, float quantile, float level, float? mass, float mass_weight, float penalty) -> Tensor",
    reference.regulation_loss,
)


def _flat(*tensors: Tensor | None) -> list[Array]:
    """[B,H,..] tensors as [B*H,..] arrays."""
    return arrays(*(x if x is None else x.flatten(0, 1) for x in tensors))


def _softmax(logits: Array, rest_lse: Array) -> Array:
    edited = joined(logits, rest_lse)
    return softmax(edited, edited)


@torch.library.custom_op(f"{NAMESPACE}::regulation_loss", mutates_args=())
def regulation_loss_op(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    objective: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
) -> Tensor:
    aim = Objective(objective, quantile, level, mass, mass_weight, penalty)
    maps, rest, square, added, weights = _flat(logits, rest_lse, rest_square, bias, theta)
    with np.errstate(all="ignore"):
        terms = Terms(maps, aim)
        probabilities = _softmax(maps + terms.only_real(added), rest)
        measured = terms.measure(probabilities[:, :-1])
        loss = terms.loss(measured.high, measured.mean)
        if square is not None:
            loss = loss + penalty * Distance.of(_softmax(maps, rest), square).value(probabilities)
        elif weights is not None:
            loss = loss + penalty * (terms.share * (terms.only_real(weights) ** 2).mean((-1, -2))).sum(-1)
    return tensor(loss).view(logits.shape[:2])


@regulation_loss_op.register_fake
def _(logits, rest_lse, rest_square, bias, theta, *rest):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[:2])


@torch.library.custom_op(f"{NAMESPACE}::regulation_loss_backward", mutates_args=())
def regulation_loss_backward_op(
    grad: Tensor,
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    objective: str,
    quantile: float,
    level: float,
    mass: float | None,
    mass_weight: float,
    penalty: float,
    of_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of logits, rest_lse, rest_square (or empty), bias and theta (or empty). Without `of_statistics` the
    first three leave out what only they need."""
    aim = Objective(objective, quantile, level, mass, mass_weight, penalty)
    maps, rest, square, added, weights = _flat(logits, rest_lse, rest_square, bias, theta)
    (outer,) = arrays(grad.flatten()[:, None, None])
    grad_square, grad_theta = logits.new_empty(0), logits.new_empty(0)
    with np.errstate(all="ignore"):
        terms = Terms(maps, aim)
        probabilities = _softmax(maps + terms.only_real(added), rest)
        gradient = terms.gradient(terms.measure(probabilities[:, :-1]), namespace(maps).empty_like(probabilities))
        of_plain: Array = 0.0
        if square is not None:
            plain = _softmax(maps, rest)
            distance = Distance.of(plain, square)
            value = distance.value(probabilities)
            of_edited = distance.gradient(probabilities, value)
            gradient += penalty * of_edited
        if square is not None and of_statistics:
            # kappa = rest_square / P^2 depends on the plain rest's probability P as well.
            change = (probabilities[:, -1] - plain[:, -1]) * reciprocal(plain[:, -1])
            slope = (penalty * reciprocal(value))[:, None] * change**2
            of_plain = -penalty * of_edited
            of_plain[:, -1] -= slope * plain[:, -1] * distance.kappa
            of_plain = softmax_backward_(of_plain, plain) * outer
            grad_square = tensor(0.5 * slope * outer[:, 0]).view(rest_square.shape)  # type: ignore[union-attr]
        if square is None and weights is not None:
            scale = (2 * penalty / (weights.shape[2] * weights.shape[3])) * terms.share
            grad_theta = tensor(outer[..., None] * scale[..., None, None] * terms.only_real(weights)).view(theta.shape)  # type: ignore[union-attr]
        of_bias = softmax_backward_(gradient, probabilities) * outer
        of_logits = of_bias + of_plain
    of_bias, of_logits = tensor(of_bias), tensor(of_logits)
    return (
        of_logits[:, :-1].clone().view(logits.shape),
        of_logits[:, -1].clone().view(rest_lse.shape),
        grad_square,
        of_bias[:, :-1].clone().view(logits.shape),
        grad_theta,
    )


@regulation_loss_backward_op.register_fake
def _(grad, logits, rest_lse, rest_square, bias, theta, objective, *rest):  # type: ignore[no-untyped-def]
    paper = objective == "paper"
    return (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        torch.empty_like(rest_lse, memory_format=torch.contiguous_format),
        rest_square.new_empty(rest_square.shape) if paper and rest[-1] else logits.new_empty(0),
        logits.new_empty(logits.shape),
        theta.new_empty(theta.shape) if theta is not None and not paper else logits.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])
    ctx.terms = inputs[5:]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    of_statistics = any(ctx.needs_input_grad[:3])
    gradients = regulation_loss_backward_op(grad, *ctx.saved_tensors, *ctx.terms, of_statistics)
    paper = ctx.terms[0] == "paper"
    exists = (True, True, paper, True, not paper)
    kept = (
        x if needed and real else None for x, needed, real in zip(gradients, ctx.needs_input_grad, exists, strict=False)
    )
    return *kept, *[None] * len(ctx.terms)


regulation_loss_op.register_autograd(_backward, setup_context=_save)


def regulation_loss(
    stats: TargetStatistics,
    bias: Tensor,
    *,
    objective: str = "official",
    theta: Tensor | None = None,
    quantile: float = 0.9,
    level: float = 0.9,
    mass: float | None = None,
    mass_weight: float | None = None,
    penalty: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """The objective of attention regulation per batch and head (arXiv 2403.06381, Eq. 11-15, and its released code).

    With A' the edited attention of the targets, means over the sample's real targets:
    `mean (quantile(A') - level)^2 + mass_weight * mean (mean_m A' - mass)^2`, plus `penalty * mean theta^2`
    (official) or `penalty * ||A' - A||` over all columns (paper). Differentiable in the statistics, bias and theta; at
    the quantile the gradient goes to the two order statistics that it interpolates.

    Args:
        stats: from `target_statistics` (`with_square=True` for the paper's objective).
        bias: what is added to the scaled logits, `[B,H,T,M]`.
        objective: `"official"` or `"paper"`.
        theta: weights of the Gaussians, for the official penalty; None leaves that term out.
        quantile, level: which quantile of A', and its aim.
        mass: aim of each target's mean attention; None takes min(1, 0.2 T)/T.
        mass_weight: 80 by default. The paper writes the mass term with sums: its alpha is mass_weight / M^2, its mu is
            mass; it states neither number.
        penalty: 0.09 (official) or 0.1 (paper) by default.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        loss `[B,H]` in the statistics' dtype.

    Raises:
        ValueError: an unknown objective, a bias that does not fit, a quantile outside [0, 1], or the paper's objective
            without rest_square.
    """
    check_statistics(stats)
    bias = check_bias(bias, tuple(stats.logits.shape), stats.logits.device, stats.logits.dtype)
    if theta is not None:
        check_theta(theta, tuple(stats.logits.shape[:3]), tuple(theta.shape[3:]))
        theta = check_dtype("theta", theta, stats.logits.dtype)
    aim = Objective.checked(objective, quantile, level, mass, mass_weight, penalty, stats.rest_square)
    impl = resolve(impl, stats.logits.device)
    square = stats.rest_square if objective == "paper" else None
    if impl == "triton":
        check_kernel_maps(stats.logits)
        theta = theta if objective == "official" else None
        return regulation_loss_triton(stats.logits, stats.rest_lse, square, bias, theta, aim.name, *aim.terms)
    run = regulation_loss_reference if impl == "reference" else regulation_loss_op
    return run(stats.logits, stats.rest_lse, square, bias, theta, aim.name, *aim.terms)
