"""The inner loop of attention regulation: every step of the descent in one launch, the choice of the best in a second.

One program runs the steps of one batch and head. A grid of HEIGHT x WIDTH cells (powers of two) is a tile
[CELLS, GROUP], the targets of a group innermost; S = G_y theta G_x^T and its transpose are four small matrix products.
Where all targets fit one group, everything stays in registers. Otherwise the groups take turns, and what one leaves for
its next turn goes through 4 T M + 3 M floats of global memory, which stay in the cache. So do the axes of the basis.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gaussian import axis_weight, bias_tile
from ._launch import ceil_div, config, launch, power_of_2
from ._objective import (
    Aim,
    add_columns,
    distance,
    goal,
    load_maps,
    load_plain_rest,
    measure,
    probabilities,
    shares,
    survey,
)
from ._tiles import finite_or_zero, rest_of

_SIZES = ["stride_scratch", "T", "height", "width", "ry", "rx", "steps", "rank"]


@triton.jit
def _axis(cell, centre, side, count, start, step, rest):
    """G of one axis at `cell` and `centre`, which are broadcast; zero outside of the grid and of the centres."""
    return tl.where((cell < side) & (centre < count), axis_weight(cell, centre, start, step, rest), 0.0)


@triton.jit
def _depth(RY: tl.constexpr):
    """The centres along y as the columns of G_y in a product, which must be 16 or more: between 8 centres stand columns
    without one, 2^30, where G_y is zero."""
    centre = tl.arange(0, 2 * RY if RY == 8 else RY)
    if RY == 8:
        centre = tl.where(centre % 2 == 0, centre // 2, 1 << 30)
    return centre


@triton.jit
def _bases(
    height,
    width,
    ry,
    rx,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
):
    y, x, q = tl.arange(0, HEIGHT), tl.arange(0, WIDTH), tl.arange(0, RX)
    basis_y = _axis(y[:, None], _depth(RY)[None, :], height, ry, start_y, step_y, rest_y)
    basis_y_t = _axis(y[None, :], tl.arange(0, RY)[:, None], height, ry, start_y, step_y, rest_y)
    basis_x = _axis(x[:, None], q[None, :], width, rx, start_x, step_x, rest_x)
    basis_x_t = _axis(x[None, :], q[:, None], width, rx, start_x, step_x, rest_x)
    return basis_y, basis_y_t, basis_x, basis_x_t


@triton.jit
def _span(theta, basis_y, basis_x_t, GROUP: tl.constexpr):
    """S [CELLS, GROUP] of theta [RY * GROUP, RX]; the columns of `basis_y` are those of `_depth`."""
    HEIGHT: tl.constexpr = basis_y.shape[0]
    RY: tl.constexpr = theta.shape[0] // GROUP
    WIDTH: tl.constexpr = basis_x_t.shape[1]
    rows = tl.dot(theta, basis_x_t, input_precision="ieee")  # [RY * GROUP, WIDTH]
    rows = tl.permute(tl.reshape(rows, [RY, GROUP, WIDTH]), [0, 2, 1])
    if RY == 8:
        rows = tl.permute(tl.join(rows, tl.zeros_like(rows)), [0, 3, 1, 2])  # [RY, 2, WIDTH, GROUP]
    rows = tl.reshape(rows, [basis_y.shape[1], WIDTH * GROUP])
    span = tl.dot(basis_y, rows, input_precision="ieee")  # [HEIGHT, WIDTH * GROUP]
    return tl.reshape(span, [HEIGHT * WIDTH, GROUP])


@triton.jit
def _contract(maps, basis_y_t, basis_x, GROUP: tl.constexpr):
    """The transpose: what `maps` [CELLS, GROUP], a gradient by S, gives theta, [RY * GROUP, RX]."""
    HEIGHT: tl.constexpr = basis_y_t.shape[1]
    RY: tl.constexpr = basis_y_t.shape[0]
    WIDTH: tl.constexpr = basis_x.shape[0]
    rows = tl.dot(basis_y_t, tl.reshape(maps, [HEIGHT, WIDTH * GROUP]), input_precision="ieee")  # [RY, WIDTH * GROUP]
    rows = tl.permute(tl.reshape(rows, [RY, WIDTH, GROUP]), [0, 2, 1])
    return tl.dot(tl.reshape(rows, [RY * GROUP, WIDTH]), basis_x, input_precision="ieee")


@triton.jit
def _centres(first, T, ry, rx, RY: tl.constexpr, RX: tl.constexpr, GROUP: tl.constexpr):
    """Offsets into theta [T, ry, rx] of a group's tile [RY * GROUP, RX], which of them exist, and the tile's slots."""
    row, q = tl.arange(0, RY * GROUP), tl.arange(0, RX)[None, :]
    p, slot = (row // GROUP)[:, None], row % GROUP
    t = first + slot[:, None]
    return (t * ry + p) * rx + q, (t < T) & (p < ry) & (q < rx), slot


@triton.jit
def _of_slots(values, slot, GROUP: tl.constexpr):
    """values [GROUP] spread over the rows of theta's tile: [RY * GROUP, 1]."""
    return tl.sum(tl.where(slot[:, None] == tl.arange(0, GROUP)[None, :], values[None, :], 0.0), 1)[:, None]


@triton.jit
def _theta_step(theta, maps, share, slot, basis_y_t, basis_x, rate, shrink, GROUP: tl.constexpr):
    """Theta's tile after one step down the gradient; the penalty on theta^2 only shrinks it."""
    kept = 1.0 - shrink * _of_slots(share, slot, GROUP)
    return kept * theta - rate * _contract(maps, basis_y_t, basis_x, GROUP)


@triton.jit
def _add_squares(losses_ptr, thetas_ptr, steps, stride_loss, stride_theta, size, factor):
    """Add factor * sum theta^2 to the loss of every step."""
    STEPS: tl.constexpr = 16
    NUMBERS: tl.constexpr = 128
    for start in range(0, steps, STEPS):
        step = start + tl.arange(0, STEPS)
        squares = tl.zeros([STEPS, NUMBERS], tl.float32)
        for first in range(0, size, NUMBERS):
            number = first + tl.arange(0, NUMBERS)
            places = (step * stride_theta)[:, None] + number[None, :]
            mask = (step < steps)[:, None] & (number < size)[None, :]
            theta = tl.load(thetas_ptr + places, mask=mask, other=0.0)
            squares += theta * theta
        losses = tl.load(losses_ptr + step * stride_loss, mask=step < steps, other=0.0)
        tl.store(losses_ptr + step * stride_loss, losses + factor * tl.sum(squares, 1), mask=step < steps)


@triton.jit
def _tile(ptr, first, CELLS: tl.constexpr, GROUP: tl.constexpr):
    """Where a group's tile [CELLS, GROUP] lies in [.., CELLS] at `ptr`."""
    t = first + tl.arange(0, GROUP)
    return ptr + t[None, :] * CELLS + tl.arange(0, CELLS)[:, None]


@triton.jit
def _load_start(theta_ptr, offsets, exists, slot, share, GROUP: tl.constexpr):
    """A given theta of a group, zero for padded targets."""
    return tl.load(theta_ptr + offsets, mask=exists & (_of_slots(share, slot, GROUP) > 0), other=0.0)


@triton.jit
def _descend_whole(
    logits,
    rest,
    plain,
    plain_rest,
    kappa,
    share,
    theta,
    offsets,
    exists,
    slot,
    losses_ptr,
    thetas_ptr,
    bases,
    size,
    steps,
    stride_loss,
    stride_theta,
    rate,
    shrink,
    bias_scale,
    penalty,
    aim,
    PAPER: tl.constexpr,
    CUTS: tl.constexpr,
):
    """Every step, with all targets in registers."""
    basis_y, basis_y_t, basis_x, basis_x_t = bases
    CELLS: tl.constexpr = logits.shape[0]
    GROUP: tl.constexpr = logits.shape[1]
    for _ in range(steps):
        tl.store(thetas_ptr + offsets, theta, mask=exists)
        z = logits + bias_scale * _span(theta, basis_y, basis_x_t, GROUP)
        top, total = add_columns(rest, tl.full([CELLS], 1.0, tl.float32), z)
        top, scale = finite_or_zero(top), 1.0 / total
        maps = probabilities(z, top, scale)
        loss, gradient = measure(maps, share, size, aim, CUTS)
        inner = tl.zeros([CELLS], tl.float32)
        if PAPER:
            change = maps - plain
            rest_map = tl.exp(rest - top) * scale
            length, pull, gradient_rest = distance(tl.sum(change * change, 1), rest_map, plain_rest, kappa, penalty)
            loss += penalty * length
            gradient += pull * change
            inner = rest_map * gradient_rest
        tl.store(losses_ptr, loss)
        weighted = maps * gradient
        inner += tl.sum(weighted, 1)
        descent = weighted - maps * inner[:, None]
        theta = _theta_step(theta, descent, share, slot, basis_y_t, basis_x, rate, shrink, GROUP)
        losses_ptr += stride_loss
        thetas_ptr += stride_theta


@triton.jit
def _descend_groups(
    scratch_ptr,
    reals,
    count,
    losses_ptr,
    thetas_ptr,
    T,
    size,
    ry,
    rx,
    steps,
    stride_loss,
    stride_theta,
    rate,
    shrink,
    bias_scale,
    penalty,
    aim,
    PAPER: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    GROUP: tl.constexpr,
    CUTS: tl.constexpr,
):
    """Every step, group after group; theta starts and stays in memory. The barriers stand between what some threads
    store and others load."""
    CELLS: tl.constexpr = HEIGHT * WIDTH
    logits_ptr, kept_ptr, maps_ptr, plain_ptr, rest_ptr, bases_ptr = _areas(scratch_ptr, T, CELLS, GROUP)
    cells = tl.arange(0, CELLS)
    for step in range(steps):
        for first in range(0, T, GROUP):
            offsets, exists, slot = _centres(first, T, ry, rx, RY, RX, GROUP)
            theta = tl.load(thetas_ptr + offsets, mask=exists, other=0.0)
            basis_y, basis_x_t = _load_bases(bases_ptr, HEIGHT, WIDTH, RY, RX, False)
            z = tl.load(_tile(logits_ptr, first, CELLS, GROUP))
            z += bias_scale * _span(theta, basis_y, basis_x_t, GROUP)
            tl.store(_tile(kept_ptr, first, CELLS, GROUP), z)
        tl.debug_barrier()

        rest = tl.load(rest_ptr + cells)
        top, total = rest, tl.full([CELLS], 1.0, tl.float32)
        for first in range(0, T, GROUP):
            top, total = add_columns(top, total, tl.load(_tile(kept_ptr, first, CELLS, GROUP)))
        top, scale = finite_or_zero(top), 1.0 / total

        loss, pull = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
        inner, squares = tl.zeros([CELLS], tl.float32), tl.zeros([CELLS], tl.float32)
        if PAPER:
            rest_map = tl.exp(rest - top) * scale
        for first in range(0, T, GROUP):
            maps = probabilities(tl.load(_tile(kept_ptr, first, CELLS, GROUP)), top, scale)
            tl.store(_tile(maps_ptr, first, CELLS, GROUP), maps)
            if PAPER:
                change = maps - tl.load(_tile(plain_ptr, first, CELLS, GROUP))
                squares += tl.sum(change * change, 1)
        if PAPER:
            plain_rest, kappa = tl.load(rest_ptr + CELLS + cells), tl.load(rest_ptr + 2 * CELLS + cells)
            length, pull, gradient_rest = distance(squares, rest_map, plain_rest, kappa, penalty)
            loss += penalty * length
            inner = rest_map * gradient_rest
        tl.debug_barrier()

        for first in range(0, T, GROUP):
            maps = tl.load(_tile(maps_ptr, first, CELLS, GROUP))
            term, gradient = measure(maps, shares(reals, first, count, GROUP), size, aim, CUTS)
            loss += term
            if PAPER:
                gradient += pull * (maps - tl.load(_tile(plain_ptr, first, CELLS, GROUP)))
            weighted = maps * gradient
            inner += tl.sum(weighted, 1)
            tl.store(_tile(kept_ptr, first, CELLS, GROUP), weighted)
        tl.store(losses_ptr, loss)
        tl.debug_barrier()

        if step + 1 < steps:
            for first in range(0, T, GROUP):
                offsets, exists, slot = _centres(first, T, ry, rx, RY, RX, GROUP)
                theta = tl.load(thetas_ptr + offsets, mask=exists, other=0.0)
                maps = tl.load(_tile(maps_ptr, first, CELLS, GROUP))
                descent = tl.load(_tile(kept_ptr, first, CELLS, GROUP)) - maps * inner[:, None]
                share = shares(reals, first, count, GROUP)
                basis_y_t, basis_x = _load_bases(bases_ptr, HEIGHT, WIDTH, RY, RX, True)
                theta = _theta_step(theta, descent, share, slot, basis_y_t, basis_x, rate, shrink, GROUP)
                tl.store(thetas_ptr + stride_theta + offsets, theta, mask=exists)
            tl.debug_barrier()
        losses_ptr += stride_loss
        thetas_ptr += stride_theta


@triton.jit
def _areas(scratch_ptr, T, CELLS: tl.constexpr, GROUP: tl.constexpr):
    """Logits, edited logits and then maps times gradient, maps, unedited maps: [T, CELLS] each, T rounded up to groups.
    Then rest, its unedited probability, kappa: [CELLS] each. Then G_y [HEIGHT, RY] and G_x [WIDTH, RX]."""
    size = tl.cdiv(T, GROUP) * GROUP * CELLS
    rest_ptr = scratch_ptr + 4 * size
    return (
        scratch_ptr,
        scratch_ptr + size,
        scratch_ptr + 2 * size,
        scratch_ptr + 3 * size,
        rest_ptr,
        rest_ptr + 3 * CELLS,
    )


@triton.jit
def _load_bases(
    ptr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """G_y and G_x^T, or G_y^T and G_x, from where `_areas` keeps them. Loaded whenever they are used: as operands of
    products they would otherwise stay in registers, replicated, all the time."""
    y, p = tl.arange(0, HEIGHT), tl.arange(0, RY)
    x, q = tl.arange(0, WIDTH), tl.arange(0, RX)
    x_ptr = ptr + HEIGHT * RY
    if TRANSPOSED:
        basis_y = tl.load(ptr + y[None, :] * RY + p[:, None])
        basis_x = tl.load(x_ptr + x[:, None] * RX + q[None, :])
    else:
        centre = _depth(RY)[None, :]
        basis_y = tl.load(ptr + y[:, None] * RY + centre, mask=centre < RY, other=0.0)
        basis_x = tl.load(x_ptr + x[None, :] * RX + q[:, None])
    return basis_y, basis_x


@triton.jit(do_not_specialize=_SIZES)
def _regulate_fwd_kernel(
    logits_ptr,
    rest_ptr,
    square_ptr,
    theta_ptr,
    previous_ptr,
    strength_ptr,
    losses_ptr,
    thetas_ptr,
    scratch_ptr,
    stride_scratch,
    T,
    height,
    width,
    ry,
    rx,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    steps,
    rank,
    fraction,
    level,
    mass,
    mass_weight,
    penalty,
    bias_scale,
    step_size,
    PAPER: tl.constexpr,
    GIVEN_MASS: tl.constexpr,
    WHOLE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    RY: tl.constexpr,
    RX: tl.constexpr,
    GROUP: tl.constexpr,
    CUTS: tl.constexpr,
):
    CELLS: tl.constexpr = HEIGHT * WIDTH
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    M, centres = height * width, ry * rx
    stride_theta = rows.to(tl.int64) * T * centres
    cells = tl.arange(0, CELLS)
    y, x = cells // WIDTH, cells % WIDTH
    inside, places = (y < height) & (x < width), y * width + x
    logits_ptr += row * T * M
    theta_ptr += row * T * centres
    thetas_ptr += row * T * centres
    if previous_ptr is not None:
        # Padded targets left out, it follows the last step's.
        previous_ptr += row * T * centres
        kept_previous_ptr = thetas_ptr + steps * stride_theta
    losses_ptr += row
    rate, shrink = step_size * bias_scale, 0.0 * penalty
    if not PAPER:
        shrink = 2.0 * step_size * penalty / centres

    rest = rest_of(tl.load(rest_ptr + row * M + places, mask=inside, other=0.0))  # [CELLS]
    reals, count, plain_top, plain_scale = survey(logits_ptr, rest, T, M, places, inside, PAPER, GROUP)
    if strength_ptr is not None:  # noqa: SIM102 - the first is for the compiler, the second for the device
        if tl.load(strength_ptr).to(tl.float32) == 0:
            start_ptr = theta_ptr
            if previous_ptr is not None:
                start_ptr = previous_ptr
            for first in range(0, T, GROUP):
                offsets, exists, slot = _centres(first, T, ry, rx, RY, RX, GROUP)
                theta = _load_start(start_ptr, offsets, exists, slot, shares(reals, first, count, GROUP), GROUP)
                tl.store(thetas_ptr + offsets, theta, mask=exists)
            for step in range(steps):
                tl.store(losses_ptr + step * rows, 0.0)
            return
    aim = (rank, fraction, level, goal(mass, count, GIVEN_MASS), mass_weight)
    plain_rest, kappa = rest, rest
    if PAPER:
        plain_rest, kappa = load_plain_rest(square_ptr + row * M, rest, plain_top, plain_scale, places, inside)

    if WHOLE:
        logits = load_maps(logits_ptr, 0, T, M, places, inside, float("-inf"), GROUP)
        plain = logits
        if PAPER:
            plain = probabilities(logits, plain_top, plain_scale)
        share = shares(reals, 0, count, GROUP)
        offsets, exists, slot = _centres(0, T, ry, rx, RY, RX, GROUP)
        theta = _load_start(theta_ptr, offsets, exists, slot, share, GROUP)
        if previous_ptr is not None:
            previous = _load_start(previous_ptr, offsets, exists, slot, share, GROUP)
            tl.store(kept_previous_ptr + offsets, previous, mask=exists)
        bases = _bases(height, width, ry, rx, start_y, step_y, rest_y, start_x, step_x, rest_x, HEIGHT, WIDTH, RY, RX)
        _descend_whole(
            logits,
            rest,
            plain,
            plain_rest,
            kappa,
            share,
            theta,
            offsets,
            exists,
            slot,
            losses_ptr,
            thetas_ptr,
            bases,
            M,
            steps,
            rows,
            stride_theta,
            rate,
            shrink,
            bias_scale,
            penalty,
            aim,
            PAPER,
            CUTS,
        )
    else:
        scratch_ptr += row * stride_scratch
        kept_logits_ptr, _, _, plain_ptr, kept_rest_ptr, bases_ptr = _areas(scratch_ptr, T, CELLS, GROUP)
        cell, centre = tl.arange(0, HEIGHT)[:, None], tl.arange(0, RY)[None, :]
        tl.store(bases_ptr + cell * RY + centre, _axis(cell, centre, height, ry, start_y, step_y, rest_y))
        bases_ptr += HEIGHT * RY
        cell, centre = tl.arange(0, WIDTH)[:, None], tl.arange(0, RX)[None, :]
        tl.store(bases_ptr + cell * RX + centre, _axis(cell, centre, width, rx, start_x, step_x, rest_x))
        tl.store(kept_rest_ptr + cells, rest)
        tl.store(kept_rest_ptr + CELLS + cells, plain_rest)
        tl.store(kept_rest_ptr + 2 * CELLS + cells, kappa)
        for first in range(0, T, GROUP):
            logits = load_maps(logits_ptr, first, T, M, places, inside, float("-inf"), GROUP)
            tl.store(_tile(kept_logits_ptr, first, CELLS, GROUP), logits)
            if PAPER:
                tl.store(_tile(plain_ptr, first, CELLS, GROUP), probabilities(logits, plain_top, plain_scale))
            offsets, exists, slot = _centres(first, T, ry, rx, RY, RX, GROUP)
            share = shares(reals, first, count, GROUP)
            theta = _load_start(theta_ptr, offsets, exists, slot, share, GROUP)
            tl.store(thetas_ptr + offsets, theta, mask=exists)
            if previous_ptr is not None:
                previous = _load_start(previous_ptr, offsets, exists, slot, share, GROUP)
                tl.store(kept_previous_ptr + offsets, previous, mask=exists)
        tl.debug_barrier()
        _descend_groups(
            scratch_ptr,
            reals,
            count,
            losses_ptr,
            thetas_ptr,
            T,
            M,
            ry,
            rx,
            steps,
            rows,
            stride_theta,
            rate,
            shrink,
            bias_scale,
            penalty,
            aim,
            PAPER,
            HEIGHT,
            WIDTH,
            RY,
            RX,
            GROUP,
            CUTS,
        )
    if not PAPER:
        # The penalty of all steps at once: a sum over theta in every step would cost more than all of them here.
        tl.debug_barrier()
        _add_squares(losses_ptr, thetas_ptr, steps, rows, stride_theta, T * centres, penalty / (centres * count))


@triton.jit(do_not_specialize=[*_SIZES, "previous"])
def _select_fwd_kernel(
    losses_ptr,
    thetas_ptr,
    strength_ptr,
    bias_ptr,
    kept_ptr,
    H,
    T,
    height,
    width,
    ry,
    rx,
    start_y,
    step_y,
    rest_y,
    start_x,
    step_x,
    rest_x,
    steps,
    previous,
    factor,
    ema,
    BATCH: tl.constexpr,
    AVERAGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    T_BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    HEADS: tl.constexpr,
):
    row, rows = tl.program_id(1), tl.num_programs(1)
    first, number = (row // H) * H, H
    if BATCH:
        first, number = row * 0, rows
    lowest = tl.full([], float("inf"), tl.float32)
    best = tl.zeros([], tl.int32)
    for start in range(0, steps, STEPS):
        step = start + tl.arange(0, STEPS)
        sums = tl.zeros([STEPS], tl.float32)
        for start_h in range(0, number, HEADS):
            h = start_h + tl.arange(0, HEADS)
            mask = (step < steps)[:, None] & (h < number)[None, :]
            sums += tl.sum(tl.load(losses_ptr + step[:, None] * rows + first + h[None, :], mask=mask, other=0.0), 1)
        # NaN never wins, and of equal losses the first does.
        sums = tl.where((step < steps) & (sums == sums), sums, float("inf"))
        low = tl.min(sums, 0)
        at = tl.min(tl.where(sums == low, step, steps), 0)
        best = tl.where(low < lowest, at, best)
        lowest = tl.minimum(low, lowest)

    M = height * width
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    size = T * ry * rx
    best_ptr = thetas_ptr + (best.to(tl.int64) * rows + row) * size
    bias = bias_tile(
        best_ptr, places, width, T, ry, rx, start_y, step_y, rest_y, start_x, step_x, rest_x, T_BLOCK
    )  # [T_BLOCK, BLOCK_M]
    if AVERAGED:
        previous_ptr = thetas_ptr + (previous.to(tl.int64) * rows + row) * size
        before = bias_tile(
            previous_ptr, places, width, T, ry, rx, start_y, step_y, rest_y, start_x, step_x, rest_x, T_BLOCK
        )
        bias += ema * (before - bias)
    bias *= factor
    if strength_ptr is not None:
        # At zero, `before` is memory that nothing was written to.
        strength = tl.load(strength_ptr).to(tl.float32)
        bias = tl.where(strength == 0, 0.0, strength * bias)
    t = tl.arange(0, T_BLOCK)[:, None]
    bias_ptr += row.to(tl.int64) * T * M
    tl.store(bias_ptr + t * M + places[None, :], bias, mask=(t < T) & (places < M)[None, :])
    kept_ptr += row.to(tl.int64) * size
    if tl.program_id(0) == 0:
        for start in range(0, size, BLOCK_M):
            at = start + tl.arange(0, BLOCK_M)
            theta = tl.load(best_ptr + at, mask=at < size, other=0.0)
            tl.store(kept_ptr + at, theta, mask=at < size)


@functools.cache
def _tile_sides(height: int, width: int, ry: int, rx: int) -> dict[str, int]:
    """The sides of a grid's tile and of theta's; do not change what is returned."""
    sides = {"HEIGHT": max(power_of_2(height), 16), "WIDTH": max(power_of_2(width), 16)}
    # Where every thread has sixteen cells, the rows between the eight would spill.
    rows = 8 if sides["HEIGHT"] * sides["WIDTH"] <= 1024 else 16
    return {**sides, "RY": max(power_of_2(ry), rows), "RX": max(power_of_2(rx), 16)}


def regulate(
    logits: Tensor,
    rest_lse: Tensor,
    rest_square: Tensor | None,
    theta: Tensor,
    previous: Tensor | None,
    strength_tensor: Tensor | None,
    grid: Sequence[int],
    axes: Sequence[float],
    bias_scale: float,
    ema: float,
    strength: float,
    steps: int,
    step_size: float,
    select: str,
    *aim: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(bias [B,H,T,M], theta, losses [steps,B,H]), all float32.

    `axes`: see `_gaussian`, along y and then x. `aim`: see `Aim.of`. The bias is multiplied by `strength` and by
    `strength_tensor`, if that is given; where it is zero, both kernels see so on the device, and nothing is descended.
    """
    settings = Aim.of(logits.shape[3], *aim)
    batch, heads, targets, tokens = logits.shape
    ry, rx = theta.shape[3:]
    block = _tile_sides(*grid, ry, rx)
    cells = block["HEIGHT"] * block["WIDTH"]
    use = dict(config("regulate_fwd", logits.device, cells=cells, targets=targets))
    group = use["GROUP"] = min(use["GROUP"], power_of_2(targets))
    whole = use["WHOLE"] = bool(use["WHOLE"]) and group >= targets
    scratch = 0
    if not whole:
        bases = block["HEIGHT"] * block["RY"] + block["WIDTH"] * block["RX"]
        scratch = (4 * ceil_div(targets, group) * group + 3) * cells + bases
    losses = logits.new_empty(steps, batch, heads)
    thetas = logits.new_empty(steps if previous is None else steps + 1, *theta.shape)
    launch(
        _regulate_fwd_kernel,
        (batch * heads,),
        logits.device,
        use,
        logits.contiguous(),
        rest_lse.contiguous(),
        None if rest_square is None else rest_square.contiguous(),
        theta.contiguous(),
        None if previous is None else previous.contiguous(),
        strength_tensor,
        losses,
        thetas,
        logits.new_empty(batch * heads, scratch) if scratch else losses,
        scratch,
        targets,
        *grid,
        ry,
        rx,
        *axes,
        steps,
        *settings.numbers,
        bias_scale,
        step_size,
        **settings.constants,
        **block,
    )
    bias, kept = torch.empty_like(logits, memory_format=torch.contiguous_format), thetas.new_empty(theta.shape)
    use = config("select_fwd", logits.device)
    launch(
        _select_fwd_kernel,
        (ceil_div(tokens, use["BLOCK_M"]), batch * heads),
        logits.device,
        use,
        losses,
        thetas,
        strength_tensor,
        bias,
        kept,
        heads,
        targets,
        *grid,
        ry,
        rx,
        *axes,
        steps,
        0 if previous is None else steps,
        strength * bias_scale,
        ema,
        BATCH=select == "batch",
        AVERAGED=ema > 0,
        T_BLOCK=power_of_2(targets),
    )
    return bias, kept, losses
