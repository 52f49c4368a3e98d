"""What a kernel takes of a target that need not be at hand: registers, spills, shared memory, code.

A recorded launch (`kernels/_launch.py`) is specialised by the code of Triton's own just-in-time launcher, so that what
is compiled here is what that target would run.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from attnctl_fast.kernels import _launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from attnctl_fast import _impl
from bench.compile import loops

Cases = Sequence[tuple[str, Callable[[], Any]]]


class Target(NamedTuple):
    gpu: GPUTarget
    shared: int
    source: str


# Most shared memory of one program, in bytes; for CUDA from the CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability". What is compiled for 8.0 also stands for the GPUs of 8.6, 8.9 and 12.0, which have 99 KiB.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 99 * 1024, "99 KiB on 8.6, 8.9 and 12.0 (163 KiB on 8.0)"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, "227 KiB on 9.0"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, "227 KiB on 10.0"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, "64 KiB of LDS, AMD CDNA 3 instruction set, 1.2"),
}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel: registers per thread, bytes of stack per thread, bytes of shared memory, tensor-core
    instructions in the machine code, instructions in its largest loop, bytes of code."""

    registers: int
    spilled: int
    shared: int
    matrix: int
    loop: int
    code: int


class Parts(NamedTuple):
    """What a kernel is compiled of. source: signature, constants, attributes."""

    kernel: JITFunction
    source: tuple[Any, Any, Any]
    options: dict[str, Any]
    gpu: GPUTarget


def key(kernel: JITFunction, source: tuple[Any, Any, Any], options: dict[str, Any], gpu: GPUTarget) -> str:
    """Name a compiled kernel by all that it depends on; unlike Triton's own key, the same on every machine."""
    parts = (*_sources(kernel), *source, options, gpu, triton.__version__, _MEASURE)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]


class Job:
    """One kernel, specialised for one target."""

    def __init__(self, launch: Any, gpu: GPUTarget) -> None:
        config = _launch.compiled_with(launch.config, gpu.backend == "hip")
        kernel, options = launch.kernel, {**launch.constants, **config}
        backend, bind = _binder(kernel, gpu)
        bound, specialisation, _ = bind(*launch.arguments, **options)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialisation, None)
        self.gpu = gpu
        self._kernel, self._options = kernel, parsed.__dict__
        self._source = signature, constants, attributes
        self.key = key(*self.parts)

    @property
    def parts(self) -> Parts:
        # Where Triton's own libraries lie is an option too; their version is Triton's.
        options = {name: value for name, value in sorted(self._options.items()) if name != "extern_libs"}
        return Parts(self._kernel, self._source, options, self.gpu)

    def cached(self) -> Resources | None:
        path = cache_folder() / f"{self.key}.json"
        return Resources(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def compile(self) -> Any:
        signature, constants, attributes = self._source
        source = ASTSource(self._kernel, signature, constants, attributes)
        return triton.compile(source, target=self.gpu, options=self._options)

    def compile_only(self) -> None:
        """Compile into Triton's cache; a compiled kernel cannot be sent between processes."""
        self.compile()

    def measure(self) -> Resources:
        """Compile, measure, and keep the figures."""
        found = (_amd if self.gpu.backend == "hip" else _nvidia)(self.compile())
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as file:
            json.dump(asdict(found), file)
        os.replace(file.name, folder / f"{self.key}.json")
        return found


def operation(launch: Any) -> str:
    """The name of a launch in the tables of configurations."""
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return "attention_bwd_special" if launch.constants.get("SPECIAL") else name


def recorded(cases: Cases, table: _launch.Table | None, errors: list[str]) -> Iterator[tuple[str, Any]]:
    """Name and launch of everything that `cases` launch, with `table` on top of the default configurations."""
    # CPU tensors stand for a GPU's: nothing runs, so nothing has to be on a device.
    before, _impl.INTERPRETED = _impl.INTERPRETED, True
    try:
        with _launch.forced(table) if table else nullcontext():
            for case, run in cases:
                with _launch.recording() as launches:
                    try:
                        run()
                    except Exception as error:
                        errors.append(f"{case}: {type(error).__name__}: {error}")
                for launch in launches:
                    yield f"{operation(launch)}: {case}", launch
    finally:
        _impl.INTERPRETED = before


def in_parallel(functions: Sequence[Callable[[], Any]], processes: int) -> Iterator[tuple[int, Any]]:
    """Index and result, or the error as text, of every function as it comes."""
    _functions[:] = functions
    if not functions:
        return
    # Forked workers inherit the functions: a kernel and its constants cannot be sent.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(processes, len(functions)), mp_context=context) as pool:
        waiting = {pool.submit(_call, index): index for index in range(len(functions))}
        for done in as_completed(waiting):
            try:
                yield done.result()
            except BrokenProcessPool:
                yield waiting[done], "a compiler's process died; by one process, it is at the first of these"


_functions: list[Callable[[], Any]] = []


def _call(index: int) -> tuple[int, Any]:
    try:
        return index, _functions[index]()
    except Exception as error:
        return index, f"{type(error).__name__}: {error}"


@functools.cache
def _binder(kernel: JITFunction, gpu: GPUTarget) -> tuple[Any, Callable[..., Any]]:
    """Triton's backend for a GPU, and what specialises a kernel's arguments for it."""
    backend = make_backend(gpu)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@functools.cache
def _sources(kernel: JITFunction) -> list[str]:
    """The source of a kernel and, in it, of all that it calls, and the constants that they read. Unlike Triton's own
    key it holds no line numbers, so that a change elsewhere in a file changes nothing."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        found[f"{function.__module__}.{function.__name__}"] = function.src
        names = {node.id for node in ast.walk(ast.parse(function.src)) if isinstance(node, ast.Name)}
        for name in sorted(names):
            value = function.__globals__.get(name)
            if isinstance(value, JITFunction) and f"{value.__module__}.{value.__name__}" not in found:
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                found[f"{function.__module__}.{name}"] = repr(value)
    return [part for item in sorted(found.items()) for part in item]


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "attnctl-fast" / "resources"


def _nvidia(binary: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _run(knobs.nvidia.cuobjdump.path, "--dump-sass", file.name)
    counts = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions = loops.nvidia(text)
    return Resources(
        registers=counts["REG"],
        spilled=counts["STACK"] + counts["LOCAL"],
        shared=max(counts["SHARED"], binary.metadata.shared),
        matrix=sum(x.name.endswith("MMA") for x in instructions),
        loop=loops.largest(instructions),
        code=_code_size(binary.asm["cubin"]),
    )


def _amd(binary: Any) -> Resources:
    text = binary.asm["amdgcn"]
    instructions = loops.amd(text)

    def count(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    # Scalar registers that move into lanes of a vector register, and vector registers that move into accumulation
    # registers, are counted as spills there but take no memory, so only the stack tells.
    return Resources(
        registers=count("vgpr_count"),
        spilled=count("private_segment_fixed_size"),
        shared=max(count("group_segment_fixed_size"), binary.metadata.shared),
        matrix=sum(x.name.startswith(("v_mfma_", "v_smfmac_")) for x in instructions),
        loop=loops.largest(instructions),
        code=_code_size(binary.asm["hsaco"]),
    )


def _code_size(elf: bytes) -> int:
    """Bytes in the sections of instructions of a 64-bit ELF file."""
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    entry, number = struct.unpack_from("<HH", elf, 0x3A)
    executable = 0x4
    headers = (struct.unpack_from("<IIQQQQ", elf, offset + i * entry) for i in range(number))
    return sum(size for _, _, flags, _, _, size in headers if flags & executable)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


_MEASURE = [inspect.getsource(x) for x in (Resources, _nvidia, _amd, _code_size, loops)]
