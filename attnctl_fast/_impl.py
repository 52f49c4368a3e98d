"""Which implementation runs: `reference`, `eager` or `triton`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

IMPLEMENTATIONS = ("reference", "eager", "triton")
AVAILABLE = ("reference", "eager")


def _checked(impl: str, where: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{where} is {impl!r}; it must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl not in AVAILABLE:
        raise ValueError(f"{where} is {impl!r}, and this version carries no Triton kernels yet; use 'eager' instead")
    return impl


_default = os.environ.get("ATTNCTL_IMPL") or "eager"
_source = "the environment variable ATTNCTL_IMPL"


def resolve(impl: str | None) -> str:
    """The implementation to run: `impl` if given, else that of the innermost `use`, else ATTNCTL_IMPL, else `eager`."""
    return _checked(_default, _source) if impl is None else _checked(impl, "impl")


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Make `impl` the default of every operation inside the `with` block, in the whole process.

    Args:
        impl: `"eager"` (closed forms in PyTorch, the default) or `"reference"` (the textbook, slow, any float dtype).

    Raises:
        ValueError: an unknown implementation, or one that this version does not carry.
    """
    global _default, _source
    before = _default, _source
    _default, _source = _checked(impl, "impl"), "impl"
    try:
        yield
    finally:
        _default, _source = before
