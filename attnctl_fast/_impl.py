"""The choice of implementation: `reference`, `eager` or `triton`."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("reference", "eager", "triton")

# Triton reads this when it decorates a kernel; then kernels run on the CPU, slowly.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _checked(impl: str, where: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{where} is {impl!r}; it must be one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl == "triton" and not _HAS_TRITON:
        raise ValueError(f"{where} is 'triton', but Triton is not installed: pip install triton, or use 'eager'")
    return impl


_default = os.environ.get("ATTNCTL_IMPL") or None
_source = "the environment variable ATTNCTL_IMPL"


def resolve(impl: str | None, device: torch.device) -> str:
    """Return the implementation to run on `device`.

    It is `impl` if given, else that of the innermost `use`, else ATTNCTL_IMPL, else `triton` on CUDA and ROCm and
    `eager` everywhere else.

    Raises:
        ValueError: an unknown implementation, `triton` without Triton, or on a device that it cannot run on.
    """
    if impl is not None:
        chosen = _checked(impl, "impl")
    elif _default is not None:
        chosen = _checked(_default, _source)
    elif device.type == "cuda":
        chosen = _checked("triton", "the default implementation on CUDA and ROCm")
    else:
        return "eager"
    if chosen == "triton" and device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise ValueError(
            f"the implementation is 'triton', but the tensors are on {device}; move them to a CUDA or ROCm device, use "
            "'eager', or set TRITON_INTERPRET=1 before Python starts (kernels on the CPU, slow, for tests)"
        )
    return chosen


class use:
    """Make `impl` the default of every operation in the whole process.

    It holds inside a `with` block, or, as a plain statement, from then on.

    Args:
        impl: `"triton"` (the kernels, the default on CUDA and ROCm; no float64), `"eager"` (closed forms in PyTorch,
            the default everywhere else) or `"reference"` (the textbook, slow, any float dtype).

    Raises:
        ValueError: an unknown implementation, or `triton` where Triton is not installed.
    """

    def __init__(self, impl: str) -> None:
        self._impl = _checked(impl, "impl")
        self._before = _default, _source
        self.__enter__()

    def __enter__(self) -> None:
        global _default, _source
        _default, _source = self._impl, "impl"

    def __exit__(self, *_: object) -> None:
        global _default, _source
        _default, _source = self._before
