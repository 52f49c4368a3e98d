"""The two processes that a comparison runs in, and their turns.

Each tree has one long-lived process with one thread. On a CPU a sample is the processor time that the process used:
what other processes take from the core does not count, which the wall clock cannot tell apart. (What they do to the
caches and the clock rate remains, and comes in turns to both.) What a process waits for other than a core, such as a
lock or a sleep, is kept apart from that. On a GPU a sample is the time between device events.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.compare.instructions import counted, instrument, valgrind
from bench.compare.intervals import turns, waiting
from bench.ops.layers import Layer

SAMPLE_SECONDS = 20e-3
MOST_CALLS = 1000
# Of short calls it takes several, as the interpreter's own work differs a little from call to call.
COUNTED_CALLS = 10
# Hashes decide how often dictionaries collide, which the counts of instructions would show.
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1"
)
Answer = dict[str, Any]


class Case(NamedTuple):
    """One operation of the registry at one shape."""

    operation: str
    layer: Layer
    dtype: str
    device: str
    impl: str


class Failure(Exception):
    """A tree cannot do what was asked of it. `side`: which one, "base" or "current", where that is known."""

    side: str | None = None


class Process:
    """`bench/compare/worker.py` with the package of `tree`."""

    def __init__(self, tree: Path, under: Sequence[str] = ()) -> None:
        """`under`: the command in front of it."""
        self.tree, self.under = tree, under
        self._start()

    def _start(self) -> None:
        paths = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        env |= {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # In a session of its own a Ctrl-C does not reach it; it ends with its standard input.
        self.process = subprocess.Popen(
            [*self.under, sys.executable, "-m", "bench.compare.worker", str(self.tree)],
            cwd=self.tree,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._greeting: Answer | None = None

    def greeting(self) -> Answer:
        """What it says when it has started.

        Raises:
            ValueError: it cannot start, or `tree` has no package.
        """
        if self._greeting is None:
            try:
                self._greeting = self._read()
            except Failure as failure:
                raise ValueError(f"{self.tree}: the process for this tree does not start: {failure}") from failure
            package = Path(self._greeting["package"])
            if self.tree.resolve() not in package.resolve().parents:
                raise ValueError(f"{self.tree} has no package attnctl_fast of its own: {package} was imported")
        return self._greeting

    def ask(self, do: str, **how: Any) -> Answer:
        """Its answer. If it has died, it is started anew to build a case; for all else it would have nothing to run.

        Raises:
            Failure: what went wrong there, in one line.
        """
        if self.process.poll() is not None:
            if do != "build":
                raise self._ended()
            self.close()
            self._start()
        self.greeting()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._read()
        if "failed" in answer:
            raise Failure(answer["failed"])
        return answer

    def _read(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        raise self._ended()

    def _ended(self) -> Failure:
        self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return Failure(f"it ended with status {self.process.returncode}: {said[-1][:200] if said else 'silently'}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            # An order that it did not live to read.
            with suppress(BrokenPipeError):
                stream.close()
        self._errors.close()


class Times(NamedTuple):
    """Of every round: seconds of a call in either tree, and the ratios of the trees' times by the steady clock, on the
    wall, and as far as `waiting` tells."""

    base: list[float]
    current: list[float]
    ratios: list[float]
    walls: list[float]
    waits: list[float]


class Pair:
    """Both trees' processes."""

    def __init__(self, base: Path, current: Path, under: Callable[[str], Sequence[str]] = lambda side: ()) -> None:
        self.sides = {"base": Process(base, under("base")), "current": Process(current, under("current"))}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.sides.values():
            process.close()

    def build(self, case: Case) -> dict[str, str]:
        """Make `case` in both; which of them cannot, and why."""
        failed = {}
        for side in self.sides:
            try:
                self._ask(side, "build", **case._asdict())
            except Failure as failure:
                failed[side] = str(failure)
        return failed

    def _ask(self, side: str, do: str, **how: Any) -> Answer:
        try:
            return self.sides[side].ask(do, **how)
        except Failure as failure:
            failure.side = side
            raise

    def calls(self) -> int:
        """How many calls fill a sample on the base."""
        samples = [self._ask("base", "time", calls=1) for _ in range(3)]
        once = min(sample["seconds"] + sample["waited"] for sample in samples)
        return min(max(math.ceil(SAMPLE_SECONDS / max(once, 1e-9)), 1), MOST_CALLS)

    def times(self, calls: int, rounds: int, tick: Callable[[], Any] = lambda: None) -> Times:
        """Samples of `calls` calls in turns; `tick` after each round.

        Raises:
            Failure: one of the trees cannot go on.
        """
        found = Times([], [], [], [], [])
        for order in turns(rounds):
            sums = {side: dict.fromkeys(("seconds", "wall", "waited"), 0.0) for side in self.sides}
            for side in order:
                answer = self._ask(side, "time", calls=calls)
                for name in sums[side]:
                    sums[side][name] += answer[name]
            base, current = sums["base"], sums["current"]
            found.base.append(base["seconds"] / (2 * calls))
            found.current.append(current["seconds"] / (2 * calls))
            found.ratios.append(current["seconds"] / base["seconds"])
            found.walls.append(current["wall"] / base["wall"])
            found.waits.append(waiting(base, current))
            tick()
        return found

    def counts(self, calls: int) -> dict[str, int] | None:
        """The instructions of a call of what was built by the processor's counter, None where it has none. `calls`: how
        many fill a sample of time."""
        calls = min(calls, COUNTED_CALLS)
        found = {side: self._ask(side, "count", calls=calls) for side in self.sides}
        if any(answer["instructions"] is None for answer in found.values()):
            return None
        return {side: answer["instructions"] // calls for side, answer in found.items()}


class Counts:
    """Both trees under valgrind, started when the first case is to be counted."""

    def __init__(self, base: Path, current: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="attnctl-callgrind-")
        self._trees = base, current
        self._pair: Pair | None = None
        self._dumps = 0

    def __enter__(self) -> Counts:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        if self._pair is not None:
            self._pair.__exit__()
        self._pair, self._dumps = None, 0

    def count(self, case: Case, calls: int) -> dict[str, int]:
        """The instructions of a call in either tree. `calls`: how many fill a sample of time.

        Raises:
            Failure: one of them cannot run it under valgrind.
        """
        try:
            return self._count(case, min(calls, COUNTED_CALLS))
        except (Failure, ValueError, OSError, subprocess.TimeoutExpired) as error:
            # The numbers of the files that come next are those of a fresh pair.
            self._stop()
            raise Failure(f"under valgrind: {error}") from error

    def _count(self, case: Case, calls: int) -> dict[str, int]:
        folder = Path(self._folder.name)
        if self._pair is None:
            self._pair = Pair(*self._trees, lambda side: valgrind(folder / side))
        failed = self._pair.build(case)
        if failed:
            raise Failure("; ".join(failed.values()))
        self._dumps += 1
        found = {}
        for side, process in self._pair.sides.items():
            instrument(process.process.pid, True)
            process.ask("collect", calls=calls)
            instrument(process.process.pid, False)
            found[side] = counted(folder / f"{side}.{self._dumps}") // calls
        return found
