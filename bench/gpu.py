"""The kernels on the GPU at hand: right, then timed against their rivals, then tuned.

    python bench/gpu.py --one-shot       all of it within --seconds (530), what matters most first
    python bench/gpu.py                  comparisons alone
    python bench/gpu.py --only NAME      of the operations whose name contains NAME, with or without --one-shot
    TRITON_INTERPRET=1 python bench/gpu.py --one-shot --dry-run --results FILE
                                         the same on tiny shapes on a CPU, to see that all of it runs

A bare checkout with torch and triton will do. Compiling takes the first minutes, unless --cache names the folder that
bench/precompile.py filled before. Every row is in bench/results/<gpu>.jsonl as soon as it is measured, so a run that is
killed keeps what it has; what crashes or hangs costs its own rows only (bench/stages.py). The tuned configurations are
in kernels/configs/<gpu>.json, rewritten after every kernel. How the aims were met, and what the time did not reach,
stands at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import archive
import contest
import correctness
import precompile
import stages
import torch
import tune
from attnctl_fast.kernels import _launch
from checkout import RESULTS, git_state
from contest import Task
from correctness import Check
from plan import rivals, tasks
from registry import OPERATIONS
from rows import Log
from shapes import SMALL, TINY
from stages import Item, Row, Write
from timing import Clock, first_line
from triton.backends.compiler import GPUTarget

from attnctl_fast._report import versions


class Program:
    """What is measured, stage by stage. It must not touch the GPU itself: its children are forked."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry: bool = arguments.dry_run
        self.only: str = arguments.only
        self.cache: Path = arguments.cache
        self.results: Path | None = arguments.results
        self.commit: str | None = arguments.commit
        self.start = self.until = time.monotonic()
        self.finish = self.start + arguments.seconds
        self.log = Log(None, {})
        self.found: dict[str, list[tune.Found]] = {}
        self.about: Row = {}
        self.checks: dict[str, list[Row]] = {}
        self.unreached: list[str] = []

    def one_shot(self) -> None:
        if not self.device():
            return
        self.kernels()
        self.stage("checks", 60, self.checking("first"))
        first, rest = (self.chosen(part) for part in tasks(self.dry))
        self.stage("times", 75, self.timing(first))
        kernels = [x for x in tune.FIRST if any(map(self.asked, tune.JUDGED_BY[x]))]
        self.stage("tuning", 170, [self.tuning(kernel) for kernel in kernels[: 2 if self.dry else None]])
        if self._tuned():
            self.stage("times, tuned", 60, self.timing(first))
        self.stage("compiled rivals", 80, self.timing(self.chosen(rivals(self.dry)), 40))
        self.stage("memory", 40, [] if self.dry else [Item({"kind": "memory"}, _sanitize, 40)])
        self.stage("further", self.finish, [*self.checking("further"), *self.timing(rest)])

    def comparisons(self) -> None:
        if not self.device():
            return
        self.stage("times", self.finish, [x for part in tasks(self.dry) for x in self.timing(self.chosen(part))])

    def asked(self, operation: str) -> bool:
        return self.only in operation

    def chosen(self, planned: Sequence[Task]) -> list[Task]:
        return [task for task in planned if self.asked(task.operation)]

    def stage(self, name: str, seconds: float, items: Sequence[Item]) -> int:
        """Run items until the seconds of this stage, and what those before have left over, are used up.

        Returns:
            The number of kernels that it had to compile.
        """
        self.until = min(self.until + seconds, self.finish)
        outcome = stages.run(items, self.until, self.write, partial(_synchronise, self.dry))
        done = len(items) - len(outcome.left)
        self.write(
            {
                "kind": "stage",
                "stage": name,
                "done": done,
                "planned": len(items),
                "seconds": round(outcome.seconds, 1),
                "compiled": outcome.compiled,
            }
        )
        self.unreached += [f"{name}: {_name(item.row)}" for item in outcome.left]
        return outcome.compiled

    def write(self, row: Row) -> None:
        """Put a row into the file; from some, learn what this process may not ask the GPU."""
        kind = row["kind"]
        if kind == "plan":
            self.checks = row["checks"]
            return
        if kind == "device" and "failed" not in row:
            self._identify(row)
        if kind == "time":
            row["tuned"] = self._tuned()
        self.log.write(row)
        print(_line(row), flush=True)
        if kind == "tuned" and "failed" not in row:
            found = tune.Found(row["sizes"], row["config"], row["ratio"])
            self.found.setdefault(row["kernel"], []).append(found)
            for path in self._tables():
                tune.write_table(path, self.found, self.about)

    def _identify(self, row: Row) -> None:
        """The GPU's name is in every row, and the name of the file."""
        self.about = row.pop("about") | ({"git": self.commit} if self.commit else {})
        common = {name: row.pop(name) for name in ("gpu", "versions", "copy_gb_per_s")}
        common |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "git": self.commit or git_state()}
        if self.results is None and not self.dry:
            self.results = RESULTS / f"{_launch.device_slug(common['gpu'])}.jsonl"
        self.log = Log(self.results, common)

    def _tuned(self) -> bool:
        """Whether a configuration was found that is not the default one."""
        return any(found.ratio < 1 for results in self.found.values() for found in results)

    def _tables(self) -> list[Path]:
        """Where the tuned table goes: where the kernels look for it, and beside results that lie elsewhere."""
        name = f"{_launch.device_slug(self.about['gpu'])}.json"
        shipped = [] if self.dry else [_launch.CONFIGS / name]
        return shipped + ([self.results.parent / name] if self.results and self.results.parent != RESULTS else [])

    def device(self) -> bool:
        """Find out what there is to measure on; False if nothing."""
        self.stage("device", 20, [Item({"kind": "plan"}, partial(_plan, self.dry)), Item({"kind": "device"}, self._on)])
        return "gpu" in self.log.common

    def _on(self, write: Write) -> None:
        clock, device = _clock(self.dry), _device(self.dry)
        row: Row = {"kind": "device", "about": tune.about(device), "versions": versions()}
        row["gpu"] = row["about"]["gpu"]
        row["copy_gb_per_s"] = clock.copy_bandwidth() / 1e9
        if not self.dry:
            properties = torch.cuda.get_device_properties(device)
            row |= {"memory_gb": properties.total_memory / 1e9, "multiprocessors": properties.multi_processor_count}
            row |= {"cuda": torch.version.cuda, "target": dataclasses.astuple(_target())}
        write(row)

    def kernels(self) -> None:
        """Have every kernel in Triton's cache: from the folder, or compiled here by all cores."""
        if self.dry:
            return
        items = [Item({"kind": "cache"}, _prove, 60)]
        if self.cache.is_dir():
            items.insert(0, Item({"kind": "cache"}, partial(_install, self.cache), 60))
        compiled = self.stage("cache", 30, items)
        if compiled or not any(row.get("installed") and not row["stale"] for row in self.log.rows):
            target = next(row["target"] for row in self.log.rows if row["kind"] == "device")
            table = _launch.device_slug(self.about["gpu"])
            self.stage("compiling", 90, [Item({"kind": "cache"}, partial(_compile, target, table), 90)])

    def checking(self, part: str) -> list[Item]:
        return [Item(row, partial(_check, self.dry, part, i)) for i, row in enumerate(self.checks.get(part, []))]

    def timing(self, chosen: Sequence[Task], seconds: float = 30) -> list[Item]:
        bandwidth = 1e9 * self.log.common["copy_gb_per_s"]
        return [Item(task.row, partial(_time, self.dry, task, bandwidth), seconds) for task in chosen]

    def tuning(self, kernel: str) -> Item:
        return Item({"kind": "tuned", "kernel": kernel}, partial(_tune, self.dry, kernel), 60)

    def summary(self) -> None:
        rows = self.log.rows
        print()
        for kind, what in (("check", "checks right"), ("memory", "cases without a memory error")):
            mine = [row for row in rows if row["kind"] == kind and "skipped" not in row]
            wrong = [row for row in mine if "failed" in row]
            if mine:
                print(f"{len(mine) - len(wrong)} of {len(mine)} {what}")
            print(*(f"  {_name(row)}: {row['failed']}" for row in wrong[:20]), sep="\n", end="\n" if wrong else "")
        print(*contest.aims(rows), sep="\n")
        if self.unreached:
            print(f"{len(self.unreached)} not reached: {'; '.join(self.unreached)}"[:4000])
        print(f"{time.monotonic() - self.start:.0f} s; results: {self.results}")


# What follows runs in children.


def _device(dry: bool) -> torch.device:
    """The device to measure on.

    Raises:
        RuntimeError: there is no GPU, or the kernels are interpreted.
    """
    if dry:
        return torch.device("cpu")
    if _launch.INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError("no GPU that PyTorch sees, or TRITON_INTERPRET is set; --dry-run runs on a CPU")
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def _clock(dry: bool) -> Clock:
    return Clock(_device(dry))


def _synchronise(dry: bool) -> None:
    if not dry and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _target() -> GPUTarget:
    from triton.runtime import driver

    return driver.active.get_current_target()


@functools.cache
def _checks(dry: bool) -> dict[str, list[Check]]:
    return {"first": correctness.first_checks(dry), "further": correctness.further_checks(dry)}


def _plan(dry: bool, write: Write) -> None:
    """Planning the checks asks whether there is a GPU, which the parent must not."""
    write({"kind": "plan", "checks": {part: [check.row for check in found] for part, found in _checks(dry).items()}})


def _check(dry: bool, part: str, index: int, write: Write) -> None:
    check = _checks(dry)[part][index]
    start = time.perf_counter()
    correctness.run(check)
    write({**check.row, "seconds": time.perf_counter() - start})


@torch.no_grad()
def _time(dry: bool, task: Task, bandwidth: float, write: Write) -> None:
    for row in contest.measure(task, _clock(dry), bandwidth):
        write(row)


@torch.no_grad()
def _tune(dry: bool, kernel: str, write: Write) -> None:
    known: list[tune.Found] = []
    dtype, most = (torch.float32, 2) if dry else (torch.float16, tune.CANDIDATES)
    for layer in (TINY,) if dry else tune.FIRST[kernel]:
        row = {"kind": "tuned", "kernel": kernel, "model": layer.model, "shape": layer.sizes}
        try:
            found = tune.tune_at(_clock(dry), kernel, layer, dtype, known, most)
        except Exception as error:
            write({**row, "failed": first_line(error)})
            _synchronise(dry)
            continue
        if found is not None:
            known.append(found)
            write({**row, **found._asdict()})


def _install(folder: Path, write: Write) -> None:
    start = time.perf_counter()
    found = archive.install(folder, os.cpu_count() or 1)
    write({"kind": "cache", **found._asdict(), "seconds": time.perf_counter() - start})


@torch.no_grad()
def _prove(write: Write) -> None:
    """The first launches of the run: whether Triton finds their kernels in its cache."""
    start = time.perf_counter()
    contest.launch(Task("regulated_layer", SMALL, torch.float16), _clock(False))
    torch.cuda.synchronize()
    write({"kind": "cache", "compiled": list(stages.COMPILED), "seconds": time.perf_counter() - start})


def _compile(target: tuple[str, int | str, int], table: str, write: Write) -> None:
    """Compile everything, in a process that sees no GPU: what is recorded runs on the CPU."""
    os.environ |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    start, processes = time.perf_counter(), os.cpu_count() or 1
    rules = _launch.read_table(table) if (_launch.CONFIGS / f"{table}.json").is_file() else None
    jobs, errors = precompile.jobs(GPUTarget(*target), rules)
    errors += archive.compile_jobs(jobs, processes)
    row = {"kind": "cache", "kernels": len(jobs), "errors": errors[:10]}
    write({**row, "seconds": time.perf_counter() - start})


def _sanitize(write: Write) -> None:
    """Look for wrong memory accesses in some checks, every tensor an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        write({"kind": "memory", "skipped": "compute-sanitizer is not installed"})
        return
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, correctness.__file__]
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


def _name(row: Row) -> str:
    """A row in few words."""
    names = ("stage", "op", "kernel", "model", "shape", "dtype", "impl", "case")
    return " ".join(str(row[name]) for name in names if row.get(name)) or row["kind"]


def _line(row: Row) -> str:
    """A row as one line of text."""
    if row["kind"] == "time" and "impl" in row:
        return contest.line(row)
    if "failed" in row:
        return f"{row['kind']}: {_name(row)} failed: {row['failed']}"
    return " ".join(f"{name} {value}" for name, value in row.items() if name != "case")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, 1 if a check failed, 2 without a GPU, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-shot", action="store_true", help="check, time and tune")
    parser.add_argument("--only", default="", metavar="NAME", help="operations whose name contains NAME")
    parser.add_argument("--seconds", type=float, default=530, help="of the whole run; default: 530")
    parser.add_argument("--cache", type=Path, default=precompile.FOLDER, metavar="DIR", help=precompile.HELP)
    parser.add_argument("--results", type=Path, metavar="FILE", help="file to append to")
    parser.add_argument("--commit", help="what to write as the commit where there is no git")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.dry_run and not _launch.INTERPRETED:
        parser.error("--dry-run runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not any(arguments.only in name for name in OPERATIONS):
        parser.error(f"--only {arguments.only!r} is in the name of no operation; there are {', '.join(OPERATIONS)}")
    program, status = Program(arguments), 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        program.one_shot() if arguments.one_shot else program.comparisons()
    except KeyboardInterrupt:
        status = 130
    if "gpu" not in program.log.common:
        return status or 2
    program.summary()
    return status or int(any("failed" in row for row in program.log.rows if row["kind"] == "check"))


if __name__ == "__main__":
    sys.exit(main())
