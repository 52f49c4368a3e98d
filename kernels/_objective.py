"""The objective of attention regulation on tiles [CELLS, T]: image tokens by targets."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._quantile import order_statistics
from ._tiles import finite_or_zero


@triton.jit
def add_columns(top, total, z):
    """A running maximum and sum of exponentials [CELLS] with the columns `z` [CELLS, T] added."""
    highest = tl.maximum(top, tl.max(z, 1))
    safe = finite_or_zero(highest)
    total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), 1)
    return highest, total


@triton.jit
def reciprocal(x):
    """1/x, and 0 where x is 0."""
    return tl.where(x > 0, 1.0 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def load_maps(ptr, first, T, M, places, inside, other, GROUP: tl.constexpr):
    """The maps first.. of [T, M] as a tile [CELLS, GROUP]; `other` where there is none."""
    t = first + tl.arange(0, GROUP)[None, :]
    return tl.load(ptr + t * M + places[:, None], mask=inside[:, None] & (t < T), other=other)


@triton.jit
def store_maps(ptr, maps, first, T, M, places, inside, GROUP: tl.constexpr):
    t = first + tl.arange(0, GROUP)[None, :]
    tl.store(ptr + t * M + places[:, None], maps, mask=inside[:, None] & (t < T))


@triton.jit
def survey(logits_ptr, rest, T, M, places, inside, PAPER: tl.constexpr, GROUP: tl.constexpr):
    """Which targets are real, one bit each, and how many, at least 1; for the paper's objective also what makes the
    unedited probabilities: `probabilities(logits, top, scale)`.

    A target is padded, and takes no part, where all of its logits are -inf.
    """
    reals = tl.zeros([], tl.int64)
    top, total = rest, tl.full([rest.shape[0]], 1.0, tl.float32)
    for first in range(0, T, GROUP):
        logits = load_maps(logits_ptr, first, T, M, places, inside, float("-inf"), GROUP)
        real = tl.max(tl.where(logits == logits, logits, 0.0), 0) != float("-inf")
        reals |= tl.sum(real.to(tl.int64) << (first + tl.arange(0, GROUP)).to(tl.int64), 0)
        if PAPER:
            top, total = add_columns(top, total, logits)
    count = tl.sum(((reals >> tl.arange(0, 64).to(tl.int64)) & 1).to(tl.float32), 0)
    return reals, tl.maximum(count, 1.0), finite_or_zero(top), 1.0 / total


@triton.jit
def shares(reals, first, count, GROUP: tl.constexpr):
    """A group's weights in the mean over targets, [GROUP]: 0 for those that are not real."""
    t = (first + tl.arange(0, GROUP)).to(tl.int64)
    return ((reals >> t) & 1).to(tl.float32) / count


@triton.jit
def goal(mass, count, GIVEN_MASS: tl.constexpr):
    """What a target's mean attention shall be."""
    if not GIVEN_MASS:
        mass = tl.minimum(0.2 * count, 1.0) / count
    return mass


@triton.jit
def load_plain_rest(square_ptr, rest, top, scale, places, inside):
    """The rest's unedited probability P, and the sum of squares of the softmax within the rest, rest_square / P^2."""
    plain = tl.exp(rest - top) * scale
    square = tl.load(square_ptr + places, mask=inside, other=0.0)
    return plain, square * reciprocal(plain) * reciprocal(plain)


@triton.jit
def probabilities(logits, top, scale):
    """exp(logits - top) * scale: [CELLS, T]."""
    return tl.exp(logits - top[:, None]) * scale[:, None]


@triton.jit
def distance(squares, rest_map, plain_rest, kappa, penalty):
    """The paper's ||A' - A|| from the targets' (A' - A)^2 summed per row [CELLS]; penalty over it, 0 where it is 0; and
    the gradient by the rest's probability."""
    rest_change = rest_map - plain_rest
    length = tl.sqrt(tl.sum(squares + rest_change * rest_change * kappa, 0))
    pull = penalty * reciprocal(length)
    return length, pull, pull * rest_change * kappa


@triton.jit
def measure(maps, share, size, aim, CUTS: tl.constexpr):
    """The quantile and mass terms of `maps` [CELLS, T], and their gradient by the maps, [CELLS, T].

    share [T] is a real target's weight in the mean over targets, 0 for others. Rows beyond the `size` real ones are
    zero: they only shift the ranks, and should one of them take a gradient, A' = 0 leaves nothing of it.
    """
    rank, fraction, level, mass, mass_weight = aim
    # In the maps' own layout: after a reshape, every value of the step would lie in several lanes.
    mean = tl.sum(maps, 0) / size
    lower, upper, lower_at, upper_at = order_statistics(maps, share > 0, rank + maps.shape[0] - size, CUTS)
    above = lower + fraction * (upper - lower) - level
    excess = mean - mass
    loss = tl.sum(share * (above * above + mass_weight * excess * excess), 0)
    cells = tl.arange(0, maps.shape[0])[:, None]
    slope = 2.0 * share * above
    gradient = ((2.0 * mass_weight / size) * share * excess)[None, :]
    gradient += tl.where(cells == lower_at[None, :], ((1.0 - fraction) * slope)[None, :], 0.0)
    gradient += tl.where(cells == upper_at[None, :], (fraction * slope)[None, :], 0.0)
    return loss, gradient


class Aim(NamedTuple):
    """The objective's settings as kernels take them. The quantile lies `fraction` of the way between the elements of
    `rank` and `rank + 1`, counted from 0."""

    numbers: tuple[int, float, float, float, float, float]
    constants: dict[str, bool]

    @classmethod
    def of(
        cls,
        size: int,
        objective: str,
        quantile: float,
        level: float,
        mass: float | None,
        mass_weight: float,
        penalty: float,
    ) -> Aim:
        position = quantile * (size - 1)
        rank = int(position)
        return cls(
            (rank, position - rank, level, 0.0 if mass is None else mass, mass_weight, penalty),
            {"PAPER": objective == "paper", "GIVEN_MASS": mass is not None},
        )
