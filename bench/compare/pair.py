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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

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
    """A tree cannot do what was asked of it. `side`: which one, "base" or "current"."""

    def __init__(self, side: str, what: str) -> None:
        super().__init__(what)
        self.side = side


class Process:
    """`bench/compare/worker.py` with the package of `tree`, which is `side` of a pair."""

    def __init__(self, side: str, tree: Path) -> None:
        self.side, self.tree = side, tree
        self._start()

    def _start(self) -> None:
        paths = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        # PyTorch counts instructions with the `python` that it finds.
        found = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        env |= {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths), "PATH": found}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # In a session of its own a Ctrl-C does not reach it; it ends with its standard input.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.compare.worker", str(self.tree)],
            cwd=self.tree,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def ask(self, do: str, **how: Any) -> Answer:
        """Its answer. If it has died, it is started anew to build a case; for all else it would have nothing to run.

        Raises:
            Failure: what went wrong there, in one line.
        """
        if do == "build" and self.process.poll() is not None:
            self.close()
            self._start()
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **how}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failure(self.side, self._ending())
        answer = json.loads(line)
        if "failed" in answer:
            raise Failure(self.side, answer["failed"])
        return answer

    def _ending(self) -> str:
        self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return f"it ended with status {self.process.returncode}: {said[-1][:200] if said else 'silently'}"

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

    def __init__(self, base: Path, current: Path) -> None:
        self.sides = {"base": Process("base", base), "current": Process("current", current)}

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.sides.values():
            process.close()

    def build(self, case: Case) -> dict[str, str]:
        """Make `case` in both; which of them cannot, and why."""
        failed = {}
        for side, process in self.sides.items():
            try:
                process.ask("build", **case._asdict())
            except Failure as failure:
                failed[side] = str(failure)
        return failed

    def calls(self) -> int:
        """How many calls fill a sample on the base."""
        samples = [self.sides["base"].ask("time", calls=1) for _ in range(3)]
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
                answer = self.sides[side].ask("time", calls=calls)
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

    def counts(self, case: Case, calls: int) -> dict[str, int]:
        """The instructions of a call in either tree, counted by both at once. `calls`: how many fill a sample of time.

        Raises:
            Failure: one of them cannot run it under valgrind.
        """
        how = {"calls": min(calls, COUNTED_CALLS), **case._asdict()}
        with ThreadPoolExecutor() as pool:
            answers = pool.map(lambda process: process.ask("count", **how), self.sides.values())
            return {side: answer["instructions"] for side, answer in zip(self.sides, answers, strict=True)}
