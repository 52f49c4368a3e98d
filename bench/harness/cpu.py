"""Times of functions that take turns on a CPU, by pytest-benchmark."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import pytest_benchmark  # noqa: F401  its lack is then an ImportError, not a test without a fixture
import torch

from bench.harness.timing import Run

THREADS = (1, 2)
# Calls of a function in a turn.
LEAST, MOST = 3, 1000


class Effort(NamedTuple):
    """How often every function has its turn, on one thread and on two, and the seconds that it then fills."""

    turns: int
    seconds: float


class Times(NamedTuple):
    """Median and quartiles in milliseconds over all turns, at the better number of threads."""

    threads: int
    median: float
    q1: float
    q3: float
    samples: int


class Turns:
    """A pytest plugin that makes a test of every turn and collects the times."""

    def __init__(self, runs: Mapping[str, Run], effort: Effort) -> None:
        self.runs, self.effort = runs, effort
        self.milliseconds: dict[str, dict[int, list[float]]] = {name: {x: [] for x in THREADS} for name in runs}
        self.failed: dict[str, Exception] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        turns = [
            pytest.param(self, name, threads, id=f"{name} {threads} {turn}")
            for turn in range(self.effort.turns)
            for threads in THREADS
            for name in self.runs
        ]
        metafunc.parametrize(("turns", "name", "threads"), turns)

    def take(self, benchmark: Any, name: str, threads: int) -> None:
        """One function's turn, unless it failed before; its first call only says how many fill the time."""
        if name in self.failed:
            return
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            start = time.perf_counter()
            self.runs[name]()
            once = time.perf_counter() - start
            rounds = min(max(int(self.effort.seconds / once), LEAST), MOST)
            benchmark.pedantic(self.runs[name], rounds=rounds)
            self.milliseconds[name][threads] += [1e3 * x for x in benchmark.stats.stats.data]
        except Exception as error:
            self.failed[name] = error
        finally:
            torch.set_num_threads(before)

    def times(self, name: str) -> Times:
        found = []
        for threads, values in self.milliseconds[name].items():
            q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
            found.append(Times(threads, median, q1, q3, len(values)))
        return min(found, key=lambda x: x.median)


def test_turn(benchmark: Any, turns: Turns, name: str, threads: int) -> None:
    turns.take(benchmark, name, threads)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """pytest without what the user's environment adds to it: options, plugins, and being a worker of pytest-xdist,
    where pytest-benchmark measures nothing."""
    with mock.patch.dict(os.environ, {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}):
        for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_XDIST_WORKER"):
            os.environ.pop(name, None)
        yield


def compare(runs: Mapping[str, Run], effort: Effort) -> dict[str, Times | Exception]:
    """The times of every function, or what it raised.

    Raises:
        KeyboardInterrupt: interrupted.
        RuntimeError: pytest did not run the turns.
    """
    turns, said = Turns(runs, effort), io.StringIO()
    # The project's and the user's settings of pytest are not for these.
    folder = Path(__file__).parent
    options = ["-q", "-s", "-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}"]
    options += ["-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    if runs:
        with _alone(), contextlib.redirect_stdout(said):
            code = pytest.main([__file__, *options], plugins=[turns])
        if code == pytest.ExitCode.INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise RuntimeError(f"pytest ended with {code}: {said.getvalue()[-2000:]}")
    return {name: turns.failed.get(name) or turns.times(name) for name in runs}
