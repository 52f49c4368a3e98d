"""Triton's own way to a launch without a GPU: binder, cache key, compiled kernels and their launchers are Triton's, and
only the driver below them is a stand-in (`libcuda.c`), which takes CPU tensors for a GPU's and launches nothing."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver

from attnctl_fast import _impl


class _Driver(nvidia.CudaDriver):
    """One device of compute capability 9.0 with one stream."""

    def __init__(self) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = nvidia.CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _StandIn:
    """The stand-in, compiled and loaded where all that asks for libcuda finds it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = self._folder.name
        library, headers = Path(self.folder, "libcuda.so.1"), Path(nvidia.__file__).parent / "include"
        compiler = str(sysconfig.get_config_var("CC")).split()[0]
        options = ["-shared", "-fPIC", "-O2", f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
        subprocess.run([compiler, *options, str(Path(__file__).with_name("libcuda.c"))], check=True)
        self.launches = ctypes.c_int.in_dll(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL), "launches")


_stand_in = functools.cache(_StandIn)


def launches() -> int:
    """How many launches have come to the stand-in."""
    return _stand_in().launches.value


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Let operations on CPU tensors with impl="triton" take the way of a GPU's.

    Raises:
        ValueError: there is a GPU, or Triton's interpreter is on.
        OSError: there is no C compiler, which Triton itself needs too.
    """
    if torch.cuda.is_available():
        raise ValueError("there is a GPU, whose driver cannot be replaced; hide it: CUDA_VISIBLE_DEVICES=")
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, so that no kernel is launched; unset it")
    before, _impl.INTERPRETED = _impl.INTERPRETED, True
    try:
        with knobs.nvidia.scope():
            knobs.nvidia.libcuda_path = _stand_in().folder
            driver.set_active(_Driver())
            yield
    finally:
        _impl.INTERPRETED = before
