"""The most memory that a run took beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextmanager
def peak_megabytes(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Gives a function of what was taken at most since the block began: allocated memory on a GPU, resident memory of
    the process on Linux; None where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    _trim()
    try:
        # Makes the highest resident size (VmHWM) the present one.
        _CLEAR.write_text("5", encoding="ascii")
        resident = _kilobytes("VmRSS")
    except OSError:
        yield lambda: None
        return
    yield lambda: 1.024e-3 * (_kilobytes("VmHWM") - resident)


def _trim() -> None:
    """Have the C library hand back what was freed, which a run would take without the process growing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.M)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])
