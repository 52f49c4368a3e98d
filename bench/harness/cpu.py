"""Times of functions that take turns on a CPU, by PyTorch's own timer."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

from torch.utils.benchmark import Timer

from bench.harness.timing import Run

THREADS = (1, 2)
# Samples of a function on as many threads, which it gets also where they take more than its time.
LEAST = 6


class Effort(NamedTuple):
    """How often every function has its turn, on one thread and on two, and the seconds that it then fills. One that
    takes more has fewer turns."""

    turns: int
    seconds: float


class Times(NamedTuple):
    """Median and quartiles in milliseconds over all turns, and the median of each, at the better number of threads."""

    threads: int
    median: float
    q1: float
    q3: float
    samples: int
    turns: list[float]


def compare(runs: Mapping[str, Run], effort: Effort) -> dict[str, Times | Exception]:
    """The times of every function, or what it raised. Turns are short, every other one backwards: a shared machine is
    at times half as fast for seconds, which each function must meet as often."""
    taken: dict[tuple[str, int], list[list[float]]] = {(name, threads): [] for name in runs for threads in THREADS}
    failed: dict[str, Exception] = {}
    for turn, threads in itertools.product(range(effort.turns), THREADS):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            before = [x for samples in taken[name, threads] for x in samples]
            if name in failed or (len(before) >= LEAST and sum(before) > 1e3 * effort.turns * effort.seconds):
                continue
            timer = Timer("run()", globals={"run": runs[name]}, num_threads=threads)
            try:
                times = timer.blocked_autorange(min_run_time=effort.seconds).times
                times += [timer.timeit(1).mean for _ in range(LEAST // effort.turns - len(times))]
                taken[name, threads].append([1e3 * seconds for seconds in times])
            except Exception as error:
                failed[name] = error
    return {name: failed[name] if name in failed else _best({x: taken[name, x] for x in THREADS}) for name in runs}


def _best(taken: Mapping[int, list[list[float]]]) -> Times:
    found = []
    for threads, turns in taken.items():
        values = [x for samples in turns for x in samples]
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        found.append(Times(threads, median, q1, q3, len(values), [statistics.median(x) for x in turns]))
    return min(found, key=lambda x: x.median)
