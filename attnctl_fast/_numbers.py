"""Checks of the numbers that methods and schedules take, and what counts of steps mean."""

from __future__ import annotations

import math


def check_number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or in (low, high] with `open_low`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        limits = f"{'above' if open_low else 'at least'} {low:g}" + (
            "" if high == math.inf else f" and at most {high:g}"
        )
        raise ValueError(f"{name} is {value!r}; it must be a number {limits}")


def check_count(name: str, value: int, low: int) -> None:
    """Raise ValueError unless `value` is an int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least {low}")


def check_smoothing(sigma: float, kernel_size: int) -> None:
    """Raise ValueError unless these can smooth a map (`ops.smooth_maps`)."""
    check_number("sigma", sigma, 0.0, open_low=True)
    check_count("kernel_size", kernel_size, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; it must be odd (1 does not smooth)")


def check_steps(name: str, value: int | float) -> None:
    """Raise ValueError unless `value` is a count (int >= 0) or a share of the schedule (float in 0..1)."""
    if isinstance(value, float):
        check_number(name, value, 0.0, 1.0)
    else:
        check_count(name, value, 0)


def step_count(value: int | float, steps: int) -> int:
    """Return `value` as a number of steps.

    A count is returned as it is, a share rounded down (but any share above zero is at least one step).
    """
    if isinstance(value, int):
        return value
    return max(math.floor(value * steps + 1e-6), int(value > 0))
