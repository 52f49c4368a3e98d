"""95 % intervals of what is counted and measured over pictures, where pictures of one prompt may be alike.

The spread is that between prompts (the linearised variance of a ratio over clusters), so that more seeds of the same
few prompts do not make a figure look surer than it is.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import TypeAlias

Interval: TypeAlias = tuple[float, float]
_NORMAL = NormalDist().inv_cdf(0.975)
# With fewer prompts the spread between them is a guess.
FEWEST = 4


def of_ratio(over: Sequence[float], under: Sequence[float], prompts: Sequence[Hashable]) -> Interval | None:
    """Return the interval of sum(over) / sum(under), such as a mean where `under` is ones; None of too few prompts."""
    variance = _variance(over, under, prompts)
    if variance is None:
        return None
    ratio, half = sum(over) / sum(under), _student(len(set(prompts)) - 1) * math.sqrt(variance)
    return ratio - half, ratio + half


def of_share(hits: Sequence[bool], prompts: Sequence[Hashable]) -> Interval:
    """Return the interval of the share of `True`, Wilson's, for as many pictures as tell as much if all were apart."""
    share, count = sum(hits) / len(hits), float(len(hits))
    variance = _variance(hits, [1.0] * len(hits), prompts)
    if share in (0, 1) or variance is None:
        count = float(len(set(prompts)))
    elif variance > 0:
        count = min(count, share * (1 - share) / variance)
    square = _NORMAL**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _NORMAL / (1 + square) * math.sqrt(share * (1 - share) / count + square / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def _variance(over: Sequence[float], under: Sequence[float], prompts: Sequence[Hashable]) -> float | None:
    count = len(set(prompts))
    if count < FEWEST:
        return None
    ratio, rests = sum(over) / sum(under), dict.fromkeys(prompts, 0.0)
    for prompt, one, other in zip(prompts, over, under, strict=True):
        rests[prompt] += one - ratio * other
    return count / (count - 1) * sum(rest**2 for rest in rests.values()) / sum(under) ** 2


def _student(freedom: int) -> float:
    """Return Student's t at 97.5 %, by its expansion around the normal one: to 1 % from three degrees of freedom on."""
    z, n = _NORMAL, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))
