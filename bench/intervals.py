"""Ratios of two programs' times that were taken in turns, and what they say.

A round is A B B A or B A A B, so that a steady drift of the machine cancels within it. Its ratio is one sample. The
interval of their median comes from their order (the inverted sign test): exact for any distribution, and a neighbour
that takes the processor in some rounds moves no more than those.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Counts of instructions that differ by less come from the same work.
SAME_COUNT = 1e-3


class Interval(NamedTuple):
    """The median ratio and its confidence interval."""

    low: float
    middle: float
    high: float


def turns(rounds: int) -> Iterator[tuple[str, str, str, str]]:
    """Whose turn it is, "base" or "current", round by round."""
    for index in range(rounds):
        first, second = ("base", "current") if index % 2 == 0 else ("current", "base")
        yield first, second, second, first


def fewest_rounds(error: float) -> int:
    """The rounds below which no interval misses with a probability of at most `error`."""
    return math.ceil(1 - math.log2(error))


def interval(ratios: Sequence[float], error: float) -> Interval:
    """The interval that misses the true median with a probability of at most `error`.

    Raises:
        ValueError: fewer than `fewest_rounds(error)` ratios.
    """
    count, ordered = len(ratios), sorted(ratios)
    if count < fewest_rounds(error):
        raise ValueError(f"{count} rounds cannot bound a ratio; use --rounds {fewest_rounds(error)} or more")
    outside, cut = 0.0, -1
    # Each side misses with the probability of at most `cut` heads in `count` throws of a coin.
    while (outside := outside + math.comb(count, cut + 1) * 0.5**count) <= error / 2:
        cut += 1
    return Interval(ordered[cut], statistics.median(ordered), ordered[count - 1 - cut])


def side(found: Interval, threshold: float) -> int:
    """1: the whole interval is beyond 1 + threshold; -1: it is below 1 / (1 + threshold); else 0."""
    return (found.low > 1 + threshold) - (found.high < 1 / (1 + threshold))


def verdict(times: Sequence[Interval], counts: float | None, threshold: float) -> str:
    """ "slower", "faster", "same", or "unclear" where the noise allows more than one of them.

    Args:
        times: the interval of every independent set of rounds; all have to agree on a change.
        counts: the ratio of the instructions, None where they were not counted. Equal ones are the same work, whatever
            the clock says. More of them is slower unless the clock shows the opposite.
        threshold: the relative change that counts, such as 0.05.
    """
    if counts is not None and abs(counts - 1) <= SAME_COUNT:
        return "same"
    sides = {side(x, threshold) for x in times}
    if sides == {1}:
        return "slower"
    if sides == {-1}:
        return "faster"
    if counts is not None and counts > 1 + threshold:
        return "slower"
    within = any(x.low >= 1 / (1 + threshold) and x.high <= 1 + threshold for x in times)
    return "same" if within else "unclear"
