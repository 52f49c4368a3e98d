"""What the child processes of `bench gpu` do: all that touches the GPU, or a CPU, at tiny shapes, where kernels are
interpreted."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from attnctl_fast.kernels import _launch
from triton.backends.compiler import GPUTarget

from attnctl_fast.cli.report import versions
from bench.compile import archive, precompile, tune
from bench.gpu import contest, correctness, stages
from bench.gpu.contest import Task
from bench.gpu.correctness import Check
from bench.gpu.stages import Row, Write
from bench.harness.timing import Clock, first_line
from bench.ops.layers import SMALL, TINY
from bench.ops.registry import launch


@functools.cache
def _clock() -> Clock:
    """Return the clock of the device to measure on.

    Raises:
        RuntimeError: there is no GPU.
    """
    if _launch.INTERPRETED:
        return Clock(torch.device("cpu"))
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU that PyTorch sees; --dry-run runs on a CPU")
    return Clock(torch.device("cuda", torch.cuda.current_device()))


def synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _target() -> GPUTarget:
    from triton.runtime import driver

    return driver.active.get_current_target()


def describe(write: Write) -> None:
    """Write which GPU there is, and how fast it copies."""
    clock = _clock()
    device = clock.device
    row: Row = {"kind": "device", "about": tune.about(device), "versions": versions()}
    row["gpu"] = row["about"]["gpu"]
    row["copy_gb_per_s"] = clock.copy_bandwidth() / 1e9
    if clock.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        row |= {"memory_gb": properties.total_memory / 1e9, "multiprocessors": properties.multi_processor_count}
        row |= {"cuda": torch.version.cuda, "target": dataclasses.astuple(_target())}
    write(row)


def check(this: Check, write: Write) -> None:
    start = time.perf_counter()
    correctness.run(this)
    write({**this.row, "seconds": time.perf_counter() - start})


@torch.no_grad()
def measure(task: Task, bandwidth: float, write: Write) -> None:
    for row in contest.measure(task, _clock(), bandwidth):
        write(row)


@torch.no_grad()
def tune_kernel(kernel: str, write: Write) -> None:
    known: list[tune.Found] = []
    clock = _clock()
    dtype, most = (torch.float16, tune.CANDIDATES) if clock.on_gpu else (torch.float32, 2)
    for layer in tune.FIRST[kernel] if clock.on_gpu else (TINY,):
        row = {"kind": "tuned", "kernel": kernel, "model": layer.model, "shape": layer.sizes}
        try:
            found = tune.tune_at(clock, kernel, layer, dtype, known, most)
        except Exception as error:
            write({**row, "failed": first_line(error)})
            synchronise()
            continue
        if found is not None:
            known.append(found)
            write({**row, **found._asdict()})


def install(folder: Path, write: Write) -> None:
    start = time.perf_counter()
    found = archive.install(folder, os.cpu_count() or 1)
    write({"kind": "cache", **found._asdict(), "seconds": time.perf_counter() - start})


@torch.no_grad()
def prove(write: Write) -> None:
    """Launch the first kernels of the run, and write which of them Triton had to compile."""
    start = time.perf_counter()
    launch("regulated_layer", SMALL, torch.float16, _clock().device)
    torch.cuda.synchronize()
    write({"kind": "cache", "compiled": list(stages.COMPILED), "seconds": time.perf_counter() - start})


def compile_all(target: tuple[str, int | str, int], table: str, write: Write) -> None:
    """Compile everything, in a process that sees no GPU: what is recorded runs on the CPU."""
    os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    start, processes = time.perf_counter(), os.cpu_count() or 1
    rules = _launch.read_table(table) if (_launch.CONFIGS / f"{table}.json").is_file() else None
    jobs, errors = precompile.jobs(GPUTarget(*target), rules)
    errors += archive.compile_jobs(jobs, processes)
    row = {"kind": "cache", "kernels": len(jobs), "errors": errors[:10]}
    write({**row, "seconds": time.perf_counter() - start})


def sanitize(write: Write) -> None:
    """Look for wrong memory accesses in some checks, every tensor an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        write({"kind": "memory", "skipped": "compute-sanitizer is not installed"})
        return
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-m", correctness.__name__]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    row: Row = {}
    said = ""
    for said in process.stdout or ():
        if said.startswith(correctness.CASE):
            if row:
                write(row)
            row = {"kind": "memory", "op": said.removeprefix(correctness.CASE).strip()}
        elif said.startswith("=========") and re.search("Invalid|Misaligned|exception", said):
            row.setdefault("failed", said.strip("= \n"))
    if process.wait() and "failed" not in row:
        row["failed"] = f"ended with status {process.returncode}: {said.strip()}"
    write({"kind": "memory", **row})
