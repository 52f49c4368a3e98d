"""`regulate` by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._library import opaque


def _forward(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    previous: Tensor | None,
    grid: Sequence[int],
    axes: Sequence[float],
    bias_scale: float,
    ema: float,
    strength: float,
    strength_tensor: Tensor | None,
    steps: int,
    step_size: float,
    select: str,
    *aim: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from ...kernels import regulate as kernels

    statistics = logits, rest_lse, rest_square
    return kernels.regulate(
        statistics,
        theta,
        previous,
        grid,
        axes,
        bias_scale,
        ema,
        strength,
        strength_tensor,
        steps,
        step_size,
        select == "batch",
        *aim,
    )


def _fake(  # type: ignore[no-untyped-def]
    logits, rest_lse, rest_square, theta, previous, grid, axes, bias_scale, ema, strength, strength_tensor, steps, *rest
):
    return (
        logits.new_empty(logits.shape),
        theta.new_empty(theta.shape),
        logits.new_empty(steps, *logits.shape[:2]),
    )


regulate = opaque(
    "regulate_triton(Tensor logits, Tensor rest_lse, Tensor? rest_square, Tensor theta, Tensor? previous, int[] grid, "
    "float[] axes, float bias_scale, float ema, float strength, Tensor? strength_tensor, int steps, float step_size, "
    "str select, str objective, float quantile, float level, float? mass, float mass_weight, float penalty) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
