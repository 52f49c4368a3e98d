"""The arguments of one UNet call, and what is done to their rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

# One entry per IP-Adapter, not per row.
_OF_ADAPTERS = ("ip_adapter_masks",)


def arguments(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `unet(*args, **kwargs)` by name."""
    bound = inspect.signature(type(unet).forward).bind(unet, *args, **kwargs).arguments
    return {name: value for name, value in bound.items() if name != "self"}


def replaced(
    unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`args` and `kwargs` with the values `given` by name, each where it stood: torch.compile would take another place
    for another call."""
    names = list(inspect.signature(type(unet).forward).parameters)[1 : 1 + len(args)]
    return tuple(given[name] for name in names), {name: given[name] for name in kwargs}


def with_rows(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` made to every tensor of so many rows within. Lists are copied: the UNet empties some."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: item if key in _OF_ADAPTERS else with_rows(item, rows, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(item, rows, change) for item in value)
    return value
