"""Compiles, without a GPU, what `bench gpu` --one-shot launches, into a folder that can travel to one.

    python -m bench precompile [--cache DIR] [--target sm_90] [--processes N]
    python -m bench precompile --install [--cache DIR]    on the GPU's machine: hand them to Triton, for other commands

What the folder has already stays; what is of other sources or of another Triton goes. Use the Triton that the GPU's
machine has; its Python may be another.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from attnctl_fast.kernels import _launch
from triton.backends.compiler import GPUTarget

from bench.compile import archive
from bench.compile.compiler import TARGETS, in_parallel
from bench.gpu import plan
from bench.harness.checkout import ROOT

FOLDER = ROOT / "out" / "kernels"
HELP = "folder of compiled kernels, which `bench precompile` fills; default: out/kernels"


def jobs(gpu: GPUTarget, table: _launch.Table | None) -> tuple[list[archive.Named], list[str]]:
    """Return every kernel that the one shot launches, and the errors of what could not be recorded."""
    # On a CPU: many small operations, which threads only slow down.
    torch.set_num_threads(1)
    errors: list[str] = []
    with torch.no_grad():
        return archive.jobs(plan.cases(), gpu, table, errors), errors


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cache", type=Path, default=FOLDER, metavar="DIR", help=HELP)
    made.add_argument("--target", choices=TARGETS, default="sm_90")
    made.add_argument("--processes", type=int, default=os.cpu_count())
    made.add_argument("--install", action="store_true", help="put what the folder holds into Triton's cache here")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Return 1 where a kernel does not compile.

    Raises:
        ValueError: kernels are interpreted.
    """
    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    start = time.monotonic()
    folder: Path = arguments.cache
    if arguments.install:
        print(*archive.install(folder, arguments.processes)._asdict().items())
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    found, errors = jobs(TARGETS[arguments.target].gpu, None)
    print(f"{len(found)} kernels recorded, {time.monotonic() - start:.0f} s", flush=True)
    paths = {archive.path(folder, named.job): named for named in found}
    for stale in set(archive.files(folder)) - set(paths):
        stale.unlink()
    before = archive.files(folder)
    missing = [named for path, named in paths.items() if path not in before]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        packing = [partial(archive.pack, named, folder) for named in missing]
        for done, (_, error) in enumerate(in_parallel(packing, arguments.processes), 1):
            errors += [error] if error else []
            if done % 50 == 0:
                print(f"{done} of {len(missing)} compiled, {time.monotonic() - start:.0f} s", flush=True)
    kept = archive.files(folder)
    size = sum(path.stat().st_size for path in kept)
    print(*errors, sep="\n", end="\n" if errors else "")
    print(f"{len(kept)} kernels in {folder}, {size / 1e6:.1f} MB; {len(kept) - len(before)} compiled now")
    # Not every candidate for the tuner compiles.
    return int(any(": tuning " not in error for error in errors))
