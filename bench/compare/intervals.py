"""Ratios of two programs' times that were taken in turns, and what they say.

A round is A B B A or B A A B, so that a steady drift of the machine cancels within it. Its log ratio is one sample of
`by_ranks`: what a neighbour on the machine does to some rounds moves the interval no further than those rounds' number,
however slow they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from bench.harness.intervals import Interval, by_ranks

# Counts of instructions that differ by less come from the same work: with the same code they differ by up to 0.12 %, as
# addresses decide which of the interpreter's dictionary entries collide.
SAME_COUNT = 2e-3


def turns(rounds: int) -> Iterator[tuple[str, str, str, str]]:
    """Whose turn it is, "base" or "current", round by round."""
    for index in range(rounds):
        first, second = ("base", "current") if index % 2 == 0 else ("current", "base")
        yield first, second, second, first


def interval(ratios: Sequence[float], error: float) -> Interval:
    """The interval of the ratio that misses it with a probability of at most `error`.

    Raises:
        ValueError: fewer than `fewest_rounds(error)` ratios.
    """
    return Interval(*map(math.exp, by_ranks([math.log(x) for x in ratios], error)))


def side(found: Interval, threshold: float) -> int:
    """1: the whole interval is beyond 1 + threshold; -1: it is below 1 / (1 + threshold); else 0."""
    return (found.low > 1 + threshold) - (found.high < 1 / (1 + threshold))


def agreed(found: Sequence[Interval], threshold: float) -> int:
    """The `side` that all are on, 0 where they differ."""
    sides = {side(x, threshold) for x in found}
    return sides.pop() if len(sides) == 1 else 0


def waiting(base: Mapping[str, float], current: Mapping[str, float]) -> float:
    """How much longer `current` takes than `base` as far as waiting explains it: the ratio of their times without what
    `current` works more. Both: "seconds" of work and those "waited"."""
    work = min(base["seconds"], current["seconds"])
    return (work + current["waited"]) / (base["seconds"] + base["waited"])


def verdict(times: Sequence[Interval], waits: Sequence[Interval], counts: float | None, threshold: float) -> str:
    """ "slower", "faster", "same", or "unclear" where the noise allows more than one of them. "slower by waiting", and
    "slower, same instructions", are slower too.

    Args:
        times: the interval of every independent set of rounds; all have to agree on a change.
        waits: those of `waiting`.
        counts: the ratio of the instructions, None where they were not counted. Equal ones are the same work, which a
            process's place in memory can slow a little: then the clock has to show twice the threshold. More of them is
            slower unless the clock shows the opposite.
        threshold: the relative change that counts, such as 0.05.
    """
    if agreed(waits, threshold) == 1:
        return "slower by waiting"
    if counts is not None and abs(counts - 1) <= SAME_COUNT:
        return "slower, same instructions" if agreed(times, 2 * threshold) == 1 else "same"
    if changed := agreed(times, threshold):
        return "slower" if changed == 1 else "faster"
    if counts is not None and counts > 1 + threshold:
        return "slower"
    within = any(x.low >= 1 / (1 + threshold) and x.high <= 1 + threshold for x in times)
    return "same" if within else "unclear"
