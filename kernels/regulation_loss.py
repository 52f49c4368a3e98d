"""The objective of attention regulation, forward and backward: one program per batch and head, no map is kept.

Targets are taken GROUP at a time as tiles [CELLS, GROUP], CELLS being M rounded up to a power of two, 16 at least. The
backward pass leaves A' times its gradient in the bias's gradient, where its second turn finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import config, launch, power_of_2
from ._objective import (
    Aim,
    add_columns,
    distance,
    goal,
    load_maps,
    load_plain_rest,
    measure,
    probabilities,
    reciprocal,
    shares,
    store_maps,
    survey,
)
from ._tiles import finite_or_zero, rest_of

_SIZES = ["T", "M", "centres", "rank"]


@triton.jit
def _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP: tl.constexpr):
    """A group's logits, and those with the bias, [CELLS, GROUP]; a padded target's bias is not looked at."""
    logits = load_maps(logits_ptr, first, T, M, places, inside, float("-inf"), GROUP)
    bias = load_maps(bias_ptr, first, T, M, places, inside, 0.0, GROUP)
    return logits, logits + tl.where((share > 0)[None, :], bias, 0.0)


@triton.jit
def _edited_softmax(
    logits_ptr,
    bias_ptr,
    rest,
    reals,
    count,
    plain_top,
    plain_scale,
    T,
    M,
    places,
    inside,
    PAPER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What makes A', exp(z - top) * scale, and the targets' (A' - A)^2 summed per row, all [CELLS]."""
    top, total = rest, tl.full([rest.shape[0]], 1.0, tl.float32)
    for first in range(0, T, GROUP):
        share = shares(reals, first, count, GROUP)
        _, z = _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP)
        top, total = add_columns(top, total, z)
    top, scale = finite_or_zero(top), 1.0 / total
    squares = tl.zeros([rest.shape[0]], tl.float32)
    if PAPER:
        for first in range(0, T, GROUP):
            share = shares(reals, first, count, GROUP)
            logits, z = _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP)
            moved = probabilities(z, top, scale) - probabilities(logits, plain_top, plain_scale)
            squares += tl.sum(moved * moved, 1)
    return top, scale, squares


@triton.jit
def _real_numbers(first, reals, T, centres, NUMBERS: tl.constexpr):
    """Offsets first.. into theta [T, centres], which of them exist, and which belong to real targets."""
    number = first + tl.arange(0, NUMBERS)
    exists = number < T * centres
    return number, exists, exists & (((reals >> (number // centres).to(tl.int64)) & 1) != 0)


@triton.jit(do_not_specialize=_SIZES)
def _regulation_loss_fwd_kernel(
    logits_ptr,
    rest_ptr,
    square_ptr,
    bias_ptr,
    theta_ptr,
    loss_ptr,
    T,
    M,
    centres,
    rank,
    fraction,
    level,
    mass,
    mass_weight,
    penalty,
    PAPER: tl.constexpr,
    GIVEN_MASS: tl.constexpr,
    CELLS: tl.constexpr,
    GROUP: tl.constexpr,
    CUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CELLS)
    inside = places < M
    logits_ptr += row * T * M
    bias_ptr += row * T * M
    rest = rest_of(tl.load(rest_ptr + row * M + places, mask=inside, other=0.0))  # [CELLS]
    reals, count, plain_top, plain_scale = survey(logits_ptr, rest, T, M, places, inside, PAPER, GROUP)
    aim = (rank, fraction, level, goal(mass, count, GIVEN_MASS), mass_weight)
    top, scale, squares = _edited_softmax(
        logits_ptr, bias_ptr, rest, reals, count, plain_top, plain_scale, T, M, places, inside, PAPER, GROUP
    )
    loss = tl.zeros([], tl.float32)
    for first in range(0, T, GROUP):
        share = shares(reals, first, count, GROUP)
        _, z = _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP)
        maps = probabilities(z, top, scale)
        term, _ = measure(maps, share, M, aim, CUTS)
        loss += term
    if PAPER:
        rest_map = tl.exp(rest - top) * scale
        plain_rest, kappa = load_plain_rest(square_ptr + row * M, rest, plain_top, plain_scale, places, inside)
        length, _, _ = distance(squares, rest_map, plain_rest, kappa, penalty)
        loss += penalty * length
    elif theta_ptr is not None:
        theta_ptr += row * T * centres
        total = tl.zeros([CELLS], tl.float32)
        for first in range(0, T * centres, CELLS):
            number, _, real = _real_numbers(first, reals, T, centres, CELLS)
            theta = tl.load(theta_ptr + number, mask=real, other=0.0)
            total += theta * theta
        loss += penalty / (centres * count) * tl.sum(total, 0)
    tl.store(loss_ptr + row, loss)


@triton.jit(do_not_specialize=_SIZES)
def _regulation_loss_bwd_kernel(
    grad_ptr,
    logits_ptr,
    rest_ptr,
    square_ptr,
    bias_ptr,
    theta_ptr,
    grad_logits_ptr,
    grad_rest_ptr,
    grad_square_ptr,
    grad_bias_ptr,
    grad_theta_ptr,
    T,
    M,
    centres,
    rank,
    fraction,
    level,
    mass,
    mass_weight,
    penalty,
    PAPER: tl.constexpr,
    GIVEN_MASS: tl.constexpr,
    CELLS: tl.constexpr,
    GROUP: tl.constexpr,
    CUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, CELLS)
    inside = places < M
    logits_ptr += row * T * M
    bias_ptr += row * T * M
    grad_bias_ptr += row * T * M
    outer = tl.load(grad_ptr + row)
    rest = rest_of(tl.load(rest_ptr + row * M + places, mask=inside, other=0.0))  # [CELLS]
    reals, count, plain_top, plain_scale = survey(logits_ptr, rest, T, M, places, inside, PAPER, GROUP)
    aim = (rank, fraction, level, goal(mass, count, GIVEN_MASS), mass_weight)
    top, scale, squares = _edited_softmax(
        logits_ptr, bias_ptr, rest, reals, count, plain_top, plain_scale, T, M, places, inside, PAPER, GROUP
    )
    rest_map = tl.exp(rest - top) * scale
    gradient_rest = tl.zeros([CELLS], tl.float32)
    plain_rest, kappa, pull = gradient_rest, gradient_rest, 0.0 * penalty
    if PAPER:
        plain_rest, kappa = load_plain_rest(square_ptr + row * M, rest, plain_top, plain_scale, places, inside)
        _, pull, gradient_rest = distance(squares, rest_map, plain_rest, kappa, penalty)

    # sum_u g_u A_u of both softmaxes, the edited and the unedited, on which only the distance depends.
    inner = rest_map * gradient_rest
    slope = tl.zeros([CELLS], tl.float32)
    if PAPER:
        # rest_square / P^2 depends on the unedited rest's probability P as well.
        ratio = (rest_map - plain_rest) * reciprocal(plain_rest)
        slope = pull * ratio * ratio
    gradient_plain_rest = -gradient_rest - slope * plain_rest * kappa
    inner_plain = plain_rest * gradient_plain_rest
    for first in range(0, T, GROUP):
        share = shares(reals, first, count, GROUP)
        logits, z = _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP)
        maps = probabilities(z, top, scale)
        _, gradient = measure(maps, share, M, aim, CUTS)
        if PAPER:
            plain = probabilities(logits, plain_top, plain_scale)
            moved = pull * (maps - plain)
            gradient += moved
            inner_plain -= tl.sum(plain * moved, 1)
        inner += tl.sum(maps * gradient, 1)
        store_maps(grad_bias_ptr, maps * gradient, first, T, M, places, inside, GROUP)
    tl.debug_barrier()
    for first in range(0, T, GROUP):
        share = shares(reals, first, count, GROUP)
        logits, z = _load_edited(logits_ptr, bias_ptr, share, first, T, M, places, inside, GROUP)
        maps = probabilities(z, top, scale)
        weighted = load_maps(grad_bias_ptr, first, T, M, places, inside, 0.0, GROUP)
        descent = outer * (weighted - maps * inner[:, None])
        tl.debug_barrier()
        store_maps(grad_bias_ptr, descent, first, T, M, places, inside, GROUP)
        if grad_logits_ptr is not None:
            if PAPER:
                plain = probabilities(logits, plain_top, plain_scale)
                descent -= outer * (plain * (pull * (maps - plain) + inner_plain[:, None]))
            store_maps(grad_logits_ptr + row * T * M, descent, first, T, M, places, inside, GROUP)
    if grad_rest_ptr is not None:
        descent_rest = rest_map * (gradient_rest - inner)
        if PAPER:
            descent_rest += plain_rest * (gradient_plain_rest - inner_plain)
        tl.store(grad_rest_ptr + row * M + places, outer * descent_rest, mask=inside)
    if grad_square_ptr is not None:
        tl.store(grad_square_ptr + row * M + places, 0.5 * outer * slope, mask=inside)
    if grad_theta_ptr is not None:
        theta_ptr += row * T * centres
        grad_theta_ptr += row * T * centres
        factor = outer * 2.0 * penalty / (centres * count)
        for first in range(0, T * centres, CELLS):
            number, exists, real = _real_numbers(first, reals, T, centres, CELLS)
            theta = tl.load(theta_ptr + number, mask=real, other=0.0)
            tl.store(grad_theta_ptr + number, factor * theta, mask=exists)


def _run(
    kernel: Any,
    operation: str,
    inputs: list[Tensor | None],
    before: list[Tensor],
    after: list[Tensor | None],
    aim: tuple[Any, ...],
) -> None:
    logits, _, _, _, theta = inputs
    assert logits is not None
    batch, heads, targets, tokens = logits.shape
    cells = max(power_of_2(tokens), 16)
    settings = Aim.of(tokens, *aim)
    use = dict(config(operation, logits.device, cells=cells, targets=targets))
    use["GROUP"] = min(use["GROUP"], power_of_2(targets))
    launch(
        kernel,
        (batch * heads,),
        logits.device,
        use,
        *before,
        *inputs,
        *after,
        targets,
        tokens,
        1 if theta is None else theta.shape[3] * theta.shape[4],
        *settings.numbers,
        **settings.constants,
        CELLS=cells,
    )


def _contiguous(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in inputs]


def regulation_loss(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    *aim: Any,
) -> Tensor:
    """loss [B,H], of float32 inputs. `aim`: see `Aim.of`."""
    loss = rest_lse.new_empty(rest_lse.shape[:2])
    inputs = _contiguous((logits, rest_lse, rest_square, bias, theta))
    _run(_regulation_loss_fwd_kernel, "regulation_loss_fwd", inputs, [], [loss], aim)
    return loss


def regulation_loss_backward(
    grad: Tensor,
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    bias: Tensor,
    theta: Tensor | None,
    *settings: Any,
) -> list[Tensor | None]:
    """Gradients by those inputs that are needed, as the last of `settings` says; None for the others."""
    *aim, needed = settings
    tensors = _contiguous((logits, rest_lse, rest_square, bias, theta))
    made = [needed[0], needed[1], needed[2], True, needed[4]]  # the bias's also holds what one turn leaves for the next
    gradients = [torch.empty_like(x) if wanted else None for x, wanted in zip(tensors, made, strict=True)]
    _run(_regulation_loss_bwd_kernel, "regulation_loss_bwd", tensors, [grad.contiguous()], gradients, aim)
    return [x if wanted else None for x, wanted in zip(gradients, needed, strict=True)]
