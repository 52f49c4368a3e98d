"""Times of functions that compete in one run: on a GPU by device events, on a CPU by its clock.

Competitors take turns, round by round, so that clocks and temperature change for all of them alike. A sample is the
mean of as many calls as fill `SAMPLE_SECONDS`. Inputs are reused and so lie in the GPU's L2 cache if they fit, as in a
model, whose projections have just written them; `compare_cold` empties the cache before every call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]
SAMPLE_SECONDS = 1e-3
ROUNDS = 15
MOST_CALLS = 64


def quantiles(samples: Iterable[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds of samples in seconds."""
    ordered = sorted(1e6 * x for x in samples)
    if len(ordered) == 1:
        return {"p20": ordered[0], "p50": ordered[0], "p80": ordered[0]}
    fifths = statistics.quantiles(ordered, n=10, method="inclusive")
    return {"p20": fifths[1], "p50": fifths[4], "p80": fifths[7]}


class Clock:
    """Times on `device`."""

    def __init__(self, device: torch.device) -> None:
        """On a CPU, kernels are interpreted: one round of single calls only shows that everything runs."""
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.rounds = ROUNDS if self.on_gpu else 1
        self._flushed = None
        if self.on_gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._flushed = torch.empty(max(4 * cache, 1 << 28), dtype=torch.int8, device=device)

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def elapsed(self, run: Run, calls: int = 1) -> float:
        """Seconds per call of `calls` calls, one after the other."""
        if not self.on_gpu:
            return self.first_call(run)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    def first_call(self, run: Run) -> float:
        """Seconds of one call, with all that it has to compile, by the host's clock."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def calls(self, run: Run) -> int:
        """How many calls fill a sample, after a warm-up."""
        if not self.on_gpu:
            return 1
        for _ in range(2):
            run()
        self.synchronise()
        once = min(self.elapsed(run) for _ in range(2))
        return min(max(int(SAMPLE_SECONDS / max(once, 1e-9)), 1), MOST_CALLS)

    def compare(self, runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
        """Microseconds per call of every function, the host's share included where the host is slower."""
        calls = {name: self.calls(run) for name, run in runs.items()}
        return self._turns(runs, lambda name, run: self.elapsed(run, calls[name]))

    def compare_cold(self, runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
        """The same for single calls that find the L2 cache full of something else; on a GPU only."""

        def sample(_: str, run: Run) -> float:
            assert self._flushed is not None
            self._flushed.zero_()
            return self.elapsed(run)

        return self._turns(runs, sample) if self.on_gpu else {}

    def _turns(self, runs: Mapping[str, Run], sample: Callable[[str, Run], float]) -> dict[str, dict[str, float]]:
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.rounds):
            for name, run in runs.items():
                samples[name].append(sample(name, run))
        return {name: quantiles(values) for name, values in samples.items()}

    def host(self, run: Run) -> float | None:
        """Microseconds that the host spends on a call, without waiting for the device; None on a CPU."""
        if not self.on_gpu:
            return None
        count = min(self.calls(run), 16)
        samples = []
        for _ in range(5):
            self.synchronise()
            start = time.perf_counter()
            for _ in range(count):
                run()
            samples.append((time.perf_counter() - start) / count)
        self.synchronise()
        return 1e6 * statistics.median(samples)

    def peak_megabytes(self, run: Run) -> float | None:
        """What a call allocates beyond what is there, at its peak; None where nobody counts."""
        if not self.on_gpu:
            return None
        self.synchronise()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronise()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def captured(self, run: Run) -> tuple[Run, int]:
        """A replay of a CUDA graph of several calls, and of how many. Graphs take the host's time out.

        Raises:
            RuntimeError: what `run` does cannot be captured.
        """
        if not self.on_gpu:
            raise RuntimeError("there are no CUDA graphs on a CPU")
        calls = self.calls(run)
        # A capture that fails half-way leaves the allocator in disorder, so what waits for the host does not start one.
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
        return graph.replay, calls

    def compare_graphs(self, runs: Mapping[str, Run]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """Microseconds per call in CUDA graphs, and why the others could not be captured."""
        replays: dict[str, tuple[Run, int]] = {}
        failed: dict[str, str] = {}
        for name, run in runs.items():
            try:
                replays[name] = self.captured(run)
            except Exception as error:
                failed[name] = first_line(error)
                self.synchronise()
        found = self.compare({name: replay for name, (replay, _) in replays.items()})
        for name, times in found.items():
            found[name] = {key: value / replays[name][1] for key, value in times.items()}
        return found, failed

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy of 1 GiB within the device (on a CPU 256 MiB)."""
        count = (1 << 30) if self.on_gpu else (1 << 28)
        source = torch.ones(count, dtype=torch.int8, device=self.device)
        copy = source.clone()
        times = self.compare({"copy": lambda: copy.copy_(source)})["copy"]
        return 2 * count / (1e-6 * times["p50"])


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
