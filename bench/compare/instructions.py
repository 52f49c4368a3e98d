"""Instructions that a process executes: by the processor's own counter where Linux lets one read it, else by valgrind.

The counter costs nothing and so counts everything. Under valgrind a process starts in about a minute and runs 50 times
slower, so there only little is counted. Both count user code only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

# Of perf_event_open, by machine.
_SYSCALL = {"x86_64": 298, "aarch64": 241}
HARDWARE, INSTRUCTIONS = 0, 1
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403
_FLAGS_DISABLED, _FLAGS_USER_ONLY = 1, 0b11 << 5
_ATTRIBUTES = "=IIQQQQQIIQQQQIIQIHH"


class Counter:
    """The instructions of the calling thread (man perf_event_open)."""

    def __init__(self, kind: int = HARDWARE, event: int = INSTRUCTIONS) -> None:
        """
        Raises:
            OSError: this machine, kernel or container offers no such counter.
        """
        number = _SYSCALL.get(platform.machine())
        if platform.system() != "Linux" or number is None:
            raise OSError(f"no performance counters on {platform.system()} {platform.machine()}")
        flags = _FLAGS_DISABLED | _FLAGS_USER_ONLY
        size = struct.calcsize(_ATTRIBUTES)
        attributes = struct.pack(_ATTRIBUTES, kind, size, event, 0, 0, 0, flags, *(0,) * 12)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file: int = self._libc.syscall(number, attributes, 0, -1, -1, ctypes.c_ulong(0))
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "no counter of instructions")

    def start(self) -> None:
        for request in (_RESET, _ENABLE):
            self._libc.ioctl(self._file, request, 0)

    def stop(self) -> int:
        """What was counted since `start`."""
        self._libc.ioctl(self._file, _DISABLE, 0)
        return int(struct.unpack("=Q", os.read(self._file, 8))[0])


def has_counter() -> bool:
    """Whether the processor's counter can be read; virtual machines may have one that stands still."""
    try:
        counter = Counter()
    except OSError:
        return False
    counter.start()
    return counter.stop() > 0


def has_valgrind() -> bool:
    import torch

    commands = all(shutil.which(name) for name in ("valgrind", "callgrind_control"))
    return commands and torch._C._valgrind_supported_platform()


def valgrind(out: Path) -> list[str]:
    """The command in front of a process to be counted, which writes its counts to `out`.1 and so on. It counts nothing,
    at a tenth of the cost, until `instrument` switches that on."""
    options = ("--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={out}")
    return ["valgrind", "--quiet", "--tool=callgrind", *options]


def instrument(process: int, on: bool) -> None:
    """
    Raises:
        OSError: valgrind cannot be reached.
    """
    command = ["callgrind_control", f"--instr={'on' if on else 'off'}", str(process)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode or "OK" not in done.stdout:
        raise OSError(f"callgrind_control failed: {(done.stderr or done.stdout).strip()[-200:]}")


def counted(file: Path) -> int:
    """The total of a file that callgrind wrote.

    Raises:
        OSError: there is none.
    """
    found = re.search(r"^totals: (\d+)", file.read_text(encoding="utf-8", errors="replace"), re.M)
    if found is None:
        raise OSError(f"{file} has no total of callgrind")
    return int(found[1])
