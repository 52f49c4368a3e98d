"""95 % intervals of differences that were measured in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# Student's t at 97.5 % by degrees of freedom, for as few samples as ranks cannot bound.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


class Interval(NamedTuple):
    """An estimate within its confidence interval."""

    low: float
    middle: float
    high: float


def fewest_rounds(error: float) -> int:
    """The rounds below which no interval of ranks misses with a probability of at most `error`."""
    return math.ceil(1 - math.log2(error))


def by_ranks(samples: Sequence[float], error: float) -> Interval:
    """The interval of the samples' centre that misses it with a probability of at most `error`.

    From the ranks of pairwise means (Wilcoxon's signed-rank test inverted, Hodges and Lehmann 1963): exact for any
    symmetric noise, and moved by a disturbed sample no further than by another.

    Raises:
        ValueError: fewer than `fewest_rounds(error)` samples.
    """
    count = len(samples)
    if count < fewest_rounds(error):
        raise ValueError(f"{count} rounds cannot bound a ratio; use --rounds {fewest_rounds(error)} or more")
    means = sorted((x + y) / 2 for i, x in enumerate(samples) for y in samples[: i + 1])
    outside, cut = 0.0, -1
    for chance in _rank_sums(count):
        outside += chance
        if outside > error / 2:
            break
        cut += 1
    return Interval(means[cut], statistics.median(means), means[-1 - cut])


def _rank_sums(count: int) -> list[float]:
    """The probability of every sum of the ranks 1 to `count` that each count or not, as a coin falls."""
    chances = [1.0]
    for rank in range(1, count + 1):
        without = [*chances, *[0.0] * rank]
        chances = [(x + y) / 2 for x, y in zip(without, [*[0.0] * rank, *chances], strict=True)]
    return chances


def confident(samples: Sequence[float]) -> Interval:
    """The 95 % interval of two samples or more: by ranks from six on, below that Student's for the mean.

    Raises:
        ValueError: a single sample.
    """
    if len(samples) < 2:
        raise ValueError("one round has no interval; measure two or more")
    if len(samples) >= fewest_rounds(0.05):
        return by_ranks(samples, 0.05)
    mean = statistics.fmean(samples)
    half = _T[len(samples) - 1] * statistics.stdev(samples) / math.sqrt(len(samples))
    return Interval(mean - half, mean, mean + half)
