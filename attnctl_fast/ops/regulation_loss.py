"""The objective of attention regulation, differentiable in the statistics, the bias and theta."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_device, check_dtype
from ._library import composite, differentiable, launcher
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
from .gaussian_bias import check_theta
from .merge_targets import check_bias
from .target_statistics import TargetStatistics, check_statistics

_SCHEMA = (
    "(Tensor logits, Tensor rest_lse, Tensor? rest_square, Tensor bias, Tensor? theta, "
    "str objective, float quantile, float level, float? mass, float mass_weight, float penalty) -> Tensor"
)
regulation_loss_reference = composite(f"regulation_loss_reference{_SCHEMA}", reference.regulation_loss)


def _flat(*tensors: Tensor | None) -> list[Array]:
    """Return [B,H,..] tensors as [B*H,..] arrays; contiguous, for the gradient is made in place on views."""
    return arrays(*(x if x is None else x.flatten(0, 1).contiguous() for x in tensors))


def _softmax(logits: Array, rest_lse: Array) -> Array:
    edited = joined(logits, rest_lse)
    return softmax(edited, edited)


def _forward(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    *settings: Any,
) -> Tensor:
    aim = Objective(*settings)
    maps, rest, square, added, weights = _flat(logits, rest_lse, rest_square, bias, theta)
    with np.errstate(all="ignore"):
        terms = Terms(maps, aim)
        probabilities = _softmax(maps + terms.only_real(added), rest)
        measured = terms.measure(probabilities[:, :-1])
        loss = terms.loss(measured.high, measured.mean)
        if square is not None:
            loss = loss + aim.penalty * Distance.of(_softmax(maps, rest), square).value(probabilities)
        elif weights is not None:
            loss = loss + aim.penalty * (terms.share * (terms.only_real(weights) ** 2).mean((-1, -2))).sum(-1)
    return tensor(loss).view(logits.shape[:2])


def _backward(
    grad: Tensor,
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    *settings: Any,
) -> list[Tensor | None]:
    aim, needed = Objective(*settings[:-1]), settings[-1]
    maps, rest, square, added, weights = _flat(logits, rest_lse, rest_square, bias, theta)
    (outer,) = arrays(grad.flatten()[:, None, None])
    grad_square = grad_theta = None
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
            gradient += aim.penalty * of_edited
        if square is not None and any(needed[:3]):
            # kappa = rest_square / P^2 depends on the plain rest's probability P as well.
            change = (probabilities[:, -1] - plain[:, -1]) * reciprocal(plain[:, -1])
            slope = (aim.penalty * reciprocal(value))[:, None] * change**2
            of_plain = -aim.penalty * of_edited
            of_plain[:, -1] -= slope * plain[:, -1] * distance.kappa
            of_plain = softmax_backward_(of_plain, plain) * outer
            grad_square = tensor(0.5 * slope * outer[:, 0])
        if needed[4]:
            scale = (2 * aim.penalty / (weights.shape[2] * weights.shape[3])) * terms.share
            grad_theta = tensor(outer[..., None] * scale[..., None, None] * terms.only_real(weights))
        of_bias = softmax_backward_(gradient, probabilities) * outer
        of_logits = tensor(of_bias + of_plain)
    found = (of_logits[:, :-1], of_logits[:, -1], grad_square, tensor(of_bias)[:, :-1], grad_theta)
    given = (logits, rest_lse, rest_square, bias, theta)
    return [
        x.contiguous().view(like.shape) if wanted and x is not None and like is not None else None
        for x, like, wanted in zip(found, given, needed, strict=True)
    ]


_eager = differentiable(
    f"regulation_loss{_SCHEMA}",
    _forward,
    lambda logits, *_: logits.new_empty(logits.shape[:2]),
    _backward,
    leaves=5,
)
_triton = differentiable(
    f"regulation_loss_triton{_SCHEMA}",
    launcher("regulation_loss", "regulation_loss"),
    lambda logits, *_: logits.new_empty(logits.shape[:2]),
    launcher("regulation_loss", "regulation_loss_backward"),
    leaves=5,
)


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
    """Compute the objective of attention regulation per batch and head.

    It is Eq. 11-15 of arXiv 2403.06381, or that of the released code.

    With A' the edited attention of the targets, means over the sample's real targets:
    `mean (quantile(A') - level)^2 + mass_weight * mean (mean_m A' - mass)^2`, plus `penalty * mean theta^2`
    (official) or `penalty * ||A' - A||` over all columns (paper). Differentiable in the statistics, bias and theta; at
    the quantile the gradient goes to the two order statistics that it interpolates.

    Args:
        stats: from `target_statistics` (`with_square=True` for the paper's objective).
        bias: what is added to the scaled logits, `[B,H,T,M]`.
        objective: `"official"` or `"paper"`.
        theta: weights of the Gaussians, for the official penalty; None leaves that term out.
        quantile: which quantile of A' is aimed at.
        level: the aim of that quantile.
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
        check_device("theta", theta, "the bias", bias.device)
        theta = check_dtype("theta", theta, stats.logits.dtype)
    aim = Objective.checked(objective, quantile, level, mass, mass_weight, penalty, stats.rest_square)
    impl = resolve(impl, stats.logits.device)
    square, theta = (stats.rest_square, None) if objective == "paper" else (None, theta)
    if impl == "triton":
        check_kernel_maps(stats.logits)
        return _triton(stats.logits, stats.rest_lse, square, bias, theta, aim.name, *aim.terms)
    run = regulation_loss_reference if impl == "reference" else _eager
    return run(stats.logits, stats.rest_lse, square, bias, theta, aim.name, *aim.terms)
