"""Compiled kernels in a folder that travels: packed on one machine, found by Triton in its own cache on another.

Triton's key of a kernel covers Triton's installed files, which differ between Python versions. Here a file is named by
`compiled.key`, which is the same everywhere; on arrival Triton's own functions say under which key it would look.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import lzma
import os
import pickle
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from attnctl_fast.kernels._launch import Table
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager

from bench.compile.compiler import Cases, Job, Parts, in_parallel, key, recorded
from bench.harness.timing import first_line

SUFFIX = ".kernel"
# Seconds from which on a compilation is worth a line.
SLOW = 20.0


class Installed(NamedTuple):
    """Kernels that Triton will find; files that are of other sources or another Triton; launchers built for them."""

    installed: int
    stale: int
    launchers: int


class Named(NamedTuple):
    """What launched a kernel first, and the kernel."""

    name: str
    job: Job


def jobs(cases: Cases, gpu: GPUTarget, table: Table | None, errors: list[str]) -> list[Named]:
    """Return what `cases` launch on a GPU, each kernel once; `table` and `errors` as for `compiled.recorded`."""
    found: dict[str, Named] = {}
    for name, launch in recorded(cases, table, errors):
        job = Job(launch, gpu)
        found.setdefault(job.key, Named(f"{name} {launch.config}", job))
    return list(found.values())


def compile_jobs(jobs: Iterable[Named], processes: int) -> list[str]:
    """Compile into Triton's cache, in parallel, what is not there, and its launchers. Returns the errors."""
    missing = [named for named in jobs if not is_cached(named.job)]
    done = in_parallel([named.job.compile_only for named in missing], processes)
    errors = [f"{missing[i].name}: {error}" for i, error in done if error]
    build_launchers([named.job.compile() for named in missing if is_cached(named.job)], processes)
    return errors


def path(folder: Path, job: Job) -> Path:
    return folder / f"{job.key}{SUFFIX}"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


def pack(named: Named, folder: Path) -> str | None:
    """Compile a kernel and put what a launch needs of it into `folder`, compressed. Returns the error, if any."""
    start = time.monotonic()
    try:
        compiled = named.job.compile()
    except Exception as error:
        return f"{named.name}: {first_line(error)}"
    kernel, source, options, gpu = named.job.parts
    (metadata,) = (Path(x) for name, x in compiled.metadata_group.items() if name.endswith(".json"))
    content = {
        "kernel": (kernel.__module__, kernel.__name__),
        "source": source,
        "options": options,
        "gpu": gpu,
        "metadata": json.loads(metadata.read_text(encoding="utf-8")),
        "binary": compiled.kernel,
    }
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(lzma.compress(pickle.dumps(content)))
    os.replace(file.name, path(folder, named.job))
    if time.monotonic() - start > SLOW:
        print(f"{named.name} took {time.monotonic() - start:.0f} s", flush=True)
    return None


def install(folder: Path, processes: int) -> Installed:
    """Put the kernels of `folder` into Triton's cache of this machine, and build their launchers there."""
    kernels, stale = [], 0
    for file in files(folder):
        content = pickle.loads(lzma.decompress(file.read_bytes()))
        module, name = content["kernel"]
        kernel = getattr(importlib.import_module(module), name, None)
        parts = Parts(kernel, content["source"], content["options"], content["gpu"])
        if kernel is None or key(*parts) != file.stem:
            stale += 1
            continue
        kernels.append(_put(parts, content["metadata"], content["binary"]))
    return Installed(len(kernels), stale, build_launchers(kernels, processes))


class _Place(NamedTuple):
    """Where Triton keeps one kernel: under which key, in which folder, as files of which name."""

    source: ASTSource
    key: str
    cache: Any
    name: str


def _place(parts: Parts) -> _Place:
    source = ASTSource(parts.kernel, *parts.source)
    backend = make_backend(parts.gpu)
    options = backend.parse_options(dict(parts.options))
    text = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    found = hashlib.sha256(text.encode()).hexdigest()
    return _Place(source, found, get_cache_manager(found), source.name[:150])


def is_cached(job: Job) -> bool:
    """Return whether Triton has compiled a kernel, now or before."""
    place = _place(job.parts)
    return bool(place.cache.get_group(f"{place.name}.json"))


def _put(parts: Parts, metadata: dict[str, Any], binary: bytes) -> CompiledKernel:
    """Write one kernel where `triton.compile` looks for it."""
    source, found, cache, name = _place(parts)
    extension = make_backend(parts.gpu).binary_ext
    contents = {f"{name}.{extension}": binary, f"{name}.json": json.dumps(metadata | {"hash": found})}
    group = {file: cache.put(content, file) for file, content in contents.items()}
    cache.put_group(f"{name}.json", group)
    return CompiledKernel(source, group, found)


def build_launchers(kernels: list[CompiledKernel], processes: int) -> int:
    """Build, in parallel, the C launchers that Triton before 3.7 builds at the first launch of every signature."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return 0
    needed = {_launcher(kernel): kernel for kernel in kernels if kernel.metadata.target.backend == "cuda"}
    with ThreadPoolExecutor(processes) as pool:
        return len(list(pool.map(lambda kernel: driver.CudaLauncher(kernel.src, kernel.metadata), needed.values())))


def _launcher(kernel: CompiledKernel) -> tuple[str, ...]:
    """Return what tells launchers apart: the types of the arguments, whatever their pointers point to."""

    def flat(types: Any) -> Iterator[str]:
        for each in types:
            if isinstance(each, tuple):
                yield from ("(", *flat(each), ")")
            else:
                yield "*" if each[0] == "*" else each

    return tuple(flat(kernel.src.signature.values()))
