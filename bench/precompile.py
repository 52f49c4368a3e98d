"""Compiles in parallel, into Triton's cache, what bench/gpu.py will launch; it starts this in a process without a GPU.

    python bench/precompile.py BACKEND ARCHITECTURE WARP_SIZE TABLE PROCESSES

Its own kernels would be compiled one after the other, each when it is first launched.
"""

from __future__ import annotations

import sys

import torch
from attnctl_fast.kernels import _launch
from compiled import Cases, Job, in_parallel, recorded
from correctness import recorded_checks
from shapes import LAYERS, REGULATED, attention_cases, solver_cases
from triton.backends.compiler import GPUTarget


def cases() -> Cases:
    """What is timed first, then what is checked."""
    found = [case for layer in REGULATED for case in solver_cases(layer).items()]
    for dtype in (torch.float16, torch.bfloat16):
        found += [case for layer in LAYERS for case in attention_cases(layer, dtype).items()]
    return [*found, *recorded_checks()]


def main() -> None:
    backend, architecture, warp_size, table, processes = sys.argv[1:]
    gpu = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp_size))
    errors: list[str] = []
    rules = _launch.read_table(table) if (_launch.CONFIGS / f"{table}.json").is_file() else None
    jobs: dict[str, Job] = {}
    for _, launch in recorded(cases(), rules, errors):
        job = Job(launch, gpu)
        jobs.setdefault(job.key, job)
    for _, error in in_parallel([job.compile_only for job in jobs.values()], int(processes)):
        errors += [error] if error else []
    print(f"{len(jobs)} kernels compiled", *errors, sep="\n")


if __name__ == "__main__":
    main()
