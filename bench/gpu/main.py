"""The kernels on the GPU at hand: right, then timed against their rivals, then tuned.

    python -m bench gpu --one-shot       all of it within --seconds (530), what matters most first
    python -m bench gpu                  comparisons alone
    python -m bench gpu --only NAME      of the operations whose name contains NAME, with or without --one-shot
    TRITON_INTERPRET=1 python -m bench gpu --one-shot --dry-run --results FILE
                                         the same on tiny shapes on a CPU, to see that all of it runs

CONTRIBUTING.md, "A quarter of an hour on a GPU", says what comes in which order, where every row and configuration is
kept as soon as it is found, and what a kernel that fails, crashes or hangs costs: its own rows only (stages.py).
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from attnctl_fast.kernels import _launch

from bench.compile import precompile, tune
from bench.gpu import children, contest, correctness, stages
from bench.gpu.contest import Task
from bench.gpu.correctness import Check
from bench.gpu.plan import rivals, tasks
from bench.gpu.stages import Item, Row
from bench.harness.checkout import RESULTS, git_state
from bench.harness.rows import Log
from bench.harness.timing import first_line
from bench.ops.registry import named


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
        self.unreached: list[str] = []

    def one_shot(self) -> None:
        if not self.device():
            return
        self.kernels()
        self.stage("checks", 60, self.checking(correctness.first_checks(self.dry)))
        first, rest = (self.chosen(part) for part in tasks(self.dry))
        self.stage("times", 75, self.timing(first))
        kernels = [x for x in tune.FIRST if any(map(self.asked, tune.JUDGED_BY[x]))]
        self.stage("tuning", 170, [self.tuning(kernel) for kernel in kernels[: 2 if self.dry else None]])
        if self._tuned():
            self.stage("times, tuned", 60, self.timing(first))
        self.stage("compiled rivals", 80, self.timing(self.chosen(rivals(self.dry)), 40))
        self.stage("memory", 40, [] if self.dry else [Item({"kind": "memory"}, children.sanitize, 40)])
        self.stage("further", self.finish, [*self.checking(correctness.further_checks(self.dry)), *self.timing(rest)])

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
        outcome = stages.run(items, self.until, self.write, children.synchronise)
        done = len(items) - len(outcome.left)
        row = {"kind": "stage", "stage": name, "done": done, "planned": len(items)}
        self.write({**row, "seconds": round(outcome.seconds, 1), "compiled": outcome.compiled})
        self.unreached += [f"{name}: {_name(item.row)}" for item in outcome.left]
        return outcome.compiled

    def write(self, row: Row) -> None:
        """Put a row into the file; from some, learn what this process may not ask the GPU."""
        kind = row["kind"]
        if kind == "device" and "failed" not in row:
            self._identify(row)
        if kind == "time":
            row["tuned"] = self._tuned()
        self.log.write(row)
        print(_line(row), flush=True)
        if kind == "tuned" and "failed" not in row:
            self._keep(row["kernel"], tune.Found(row["sizes"], row["config"], row["ratio"]))

    def _keep(self, kernel: str, found: tune.Found) -> None:
        """Write the tables with another configuration, or a row that says why it cannot stand in one."""
        known = self.found.get(kernel, [])
        self.found[kernel] = [*known, found]
        try:
            for path in self._tables():
                tune.write_table(path, self.found, self.about)
        except ValueError as error:
            self.found[kernel] = known
            self.write({"kind": "tuned", "kernel": kernel, "failed": first_line(error)})

    def _identify(self, row: Row) -> None:
        """Name the GPU in every row from now on, and in the name of the file."""
        self.about = row.pop("about") | ({"git": self.commit} if self.commit else {})
        common = {name: row.pop(name) for name in ("gpu", "versions", "copy_gb_per_s")}
        common |= {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "git": self.commit or git_state()}
        if self.results is None and not self.dry:
            self.results = RESULTS / f"{_launch.device_slug(common['gpu'])}.jsonl"
        self.log = Log(self.results, common)

    def _tuned(self) -> bool:
        """Say whether a configuration was found that is not the default one."""
        return any(found.ratio < 1 for results in self.found.values() for found in results)

    def _tables(self) -> list[Path]:
        """List where the tuned table goes: where the kernels look for it, and beside results that lie elsewhere."""
        name = f"{_launch.device_slug(self.about['gpu'])}.json"
        shipped = [] if self.dry else [_launch.CONFIGS / name]
        return shipped + ([self.results.parent / name] if self.results and self.results.parent != RESULTS else [])

    def device(self) -> bool:
        """Find out what there is to measure on; False if nothing."""
        # A cold machine reads gigabytes of libraries first. Without this row there is no run, so it is waited for; what
        # it does not need of the minute is for no other stage, but for 20 s.
        self.stage("device", 60, [Item({"kind": "device"}, children.describe, 55)])
        self.until = max(self.start + 20, time.monotonic())
        return "gpu" in self.log.common

    def kernels(self) -> None:
        """Have every kernel in Triton's cache: from the folder, or compiled here by all cores."""
        if self.dry:
            return
        items = [Item({"kind": "cache"}, children.prove, 60)]
        if self.cache.is_dir():
            items.insert(0, Item({"kind": "cache"}, partial(children.install, self.cache), 60))
        compiled = self.stage("cache", 30, items)
        if compiled or not any(row.get("installed") and not row["stale"] for row in self.log.rows):
            target = next(row["target"] for row in self.log.rows if row["kind"] == "device")
            table = _launch.device_slug(self.about["gpu"])
            self.stage("compiling", 90, [Item({"kind": "cache"}, partial(children.compile_all, target, table), 90)])

    def checking(self, checks: Sequence[Check]) -> list[Item]:
        return [Item(check.row, partial(children.check, check)) for check in checks]

    def timing(self, chosen: Sequence[Task], seconds: float = 30) -> list[Item]:
        bandwidth = 1e9 * self.log.common["copy_gb_per_s"]
        return [Item(task.row, partial(children.measure, task, bandwidth), seconds) for task in chosen]

    def tuning(self, kernel: str) -> Item:
        return Item({"kind": "tuned", "kernel": kernel}, partial(children.tune_kernel, kernel), 60)

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


def _name(row: Row) -> str:
    """Name a row in few words."""
    names = ("stage", "op", "kernel", "model", "shape", "dtype", "impl", "case")
    return " ".join(str(row[name]) for name in names if row.get(name)) or row["kind"]


def _line(row: Row) -> str:
    """Write a row as one line of text."""
    if row["kind"] == "time" and "impl" in row:
        return contest.line(row)
    said = f"{_name(row)} failed: {row['failed']}" if "failed" in row else _figures(row)
    return f"{row['kind']}: {said}"


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("kind", "case", "sizes"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--one-shot", action="store_true", help="check, time and tune")
    made.add_argument("--only", default="", metavar="NAME", help="operations whose name contains NAME")
    made.add_argument("--seconds", type=float, default=530, help="of the whole run; default: 530")
    made.add_argument("--cache", type=Path, default=precompile.FOLDER, metavar="DIR", help=precompile.HELP)
    made.add_argument("--results", type=Path, metavar="FILE", help="file to append to")
    made.add_argument("--commit", help="what to write as the commit where there is no git")
    made.add_argument("--dry-run", action="store_true")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Return 0, 1 if a check failed, 2 without a GPU, 130 when interrupted.

    Raises:
        ValueError: no such operation, or `--dry-run` without the interpreter, or the other way round.
    """
    if arguments.dry_run != _launch.INTERPRETED:
        raise ValueError("--dry-run runs the kernels in Triton's interpreter: TRITON_INTERPRET=1 goes with it alone")
    named(arguments.only)
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
