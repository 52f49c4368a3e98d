"""Schedules: a method's strength over the steps of a call, as factors of its full strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ._numbers import check_number, check_steps, step_count

__all__ = ["Schedule", "ScheduleLike", "constant", "exponential", "factors", "linear", "reverse_step", "root", "step"]


@dataclass(frozen=True)
class Schedule:
    """A schedule by its name and number; made by the functions of this module."""

    name: str
    value: int | float = 1.0

    def factors(self, steps: int) -> list[float]:
        """Return the factor of every step."""
        if self.name in ("step", "reverse_step"):
            first = step_count(self.value, steps)
            return [float((i >= first) == (self.name == "step")) for i in range(steps)]
        if self.name == "exponential":
            return [float(self.value ** (i / steps)) for i in range(steps)]
        if self.name == "root":
            return [math.sqrt(1 + (self.value - 1) * i / max(steps - 1, 1)) for i in range(steps)]
        return [1 + (self.value - 1) * i / steps for i in range(steps)]


ScheduleLike: TypeAlias = Schedule | Callable[[float], float] | Sequence[float]


def constant() -> Schedule:
    """Return a schedule of full strength at every step."""
    return Schedule("constant")


def step(start: int | float) -> Schedule:
    """Return a schedule that is off before `start` and on from there.

    An int counts steps, a float is a share of them, rounded down (but any share above zero is at least one step).
    """
    check_steps("start", start)
    return Schedule("step", start)


def reverse_step(stop: int | float) -> Schedule:
    """Return a schedule that is on before `stop` (as in `step`) and off from there."""
    check_steps("stop", stop)
    return Schedule("reverse_step", stop)


def linear(last: float) -> Schedule:
    """Return a straight line from 1 at the first step to `last`, which the step after the last one would have.

    The released code's `linear` with slope r on gamma is `linear(1 + r * steps / gamma)`.
    """
    check_number("last", last, -math.inf)
    return Schedule("linear", float(last))


def exponential(last: float) -> Schedule:
    """Return equal ratios from 1 at the first step to `last`, which is above zero, and as in `linear`.

    The released code's `exp` with a ratio r per step is `exponential(r ** steps)`.
    """
    check_number("last", last, 0.0, open_low=True)
    return Schedule("exponential", float(last))


def root(last: float) -> Schedule:
    """Return the square root of a straight line from 1 at the first step to `last` at the last one.

    Attend-and-Excite's is `root(0.5)`.
    """
    check_number("last", last, 0.0)
    return Schedule("root", float(last))


def check_schedule(schedule: ScheduleLike) -> ScheduleLike:
    """Return the schedule in hashable form.

    Raises:
        ValueError: neither a schedule, nor a callable, nor finite numbers.
    """
    if isinstance(schedule, Schedule) or callable(schedule):
        return schedule
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise ValueError(
            f"schedule is {schedule!r}; pass one of attnctl_fast.schedules, such as schedules.step(0.2), a function of "
            "the share of the steps that are done, or one number per step"
        )
    return tuple(_checked(value, index) for index, value in enumerate(schedule))


def factors(schedule: ScheduleLike, steps: int) -> list[float]:
    """Return the factor of every step of a call.

    A callable gets the share of the steps that are done, 0 at the first one and (steps - 1) / steps at the last.

    Raises:
        ValueError: a sequence of another length, or a factor that is not a finite number.
    """
    if isinstance(schedule, Schedule):
        return schedule.factors(steps)
    if callable(schedule):
        return [_checked(schedule(index / steps), index) for index in range(steps)]
    if len(schedule) != steps:
        raise ValueError(
            f"schedule holds {len(schedule)} numbers, but the call has {steps} steps; pass one per step, or a function "
            "of the share of the steps that are done"
        )
    return list(schedule)


def _checked(value: float, index: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"schedule gives {value!r} at step {index}; it must give a finite number at every step")
    return number
