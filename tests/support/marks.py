"""What runs by default, and what is left to `pytest -m full`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from allpairspy import AllPairs

FULL = pytest.mark.full


def full(*values: Any) -> Any:
    """One set of parameters that is left to `-m full`."""
    return pytest.param(*values, marks=FULL)


def _parameters(axes: Sequence[Sequence[Any]], places: Sequence[int], marks: Any) -> Any:
    chosen = [axis[place] for axis, place in zip(axes, places, strict=True)]
    values = [x for value in chosen for x in (value if isinstance(value, tuple) else (value,))]
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def _meeting(axes: Sequence[Sequence[Any]]) -> list[tuple[int, ...]]:
    """So few combinations, as places along the axes, that any two values meet."""
    return [tuple(places) for places in AllPairs([list(range(len(axis))) for axis in axes])]


def pairs(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of the axes' values, tuples among which are several parameters. Of three axes or more only so
    many run by default that any two values meet."""
    kept = set(_meeting(axes))
    every = itertools.product(*(range(len(axis)) for axis in axes))
    return [_parameters(axes, places, () if places in kept else FULL) for places in every]


def full_pairs(*axes: Sequence[Any]) -> list[Any]:
    """For axes so long that `-m full` as well has only so many combinations that any two values meet."""
    return [_parameters(axes, places, FULL) for places in _meeting(axes)]
