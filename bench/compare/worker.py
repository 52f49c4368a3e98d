"""What `compare` runs in a process per tree: builds a case, times it and counts its instructions, as it is told.

Orders come as lines of JSON on the standard input and are answered by one each. PYTHONPATH says which tree
`attnctl_fast` comes from; this file, the cases and their inputs come from the current one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from bench.harness.timing import Clock, Run, first_line

Answer = dict[str, Any]
WARM_UP = 2


class Worker:
    """One tree's side of a comparison."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.run: Run | None = None
        self.clock: Clock | None = None

    def build(self, operation: str, layer: list[Any], dtype: str, device: str, impl: str) -> Answer:
        """Make a case, check its result against the truth, and warm up."""
        self.run = None
        # A base may lack what these import, and then lacks the case; the process goes on.
        from bench.ops.layers import Layer
        from bench.ops.registry import comparison

        model, heads, grid, *rest = layer
        where = torch.device(device)
        this = comparison(operation, Layer(model, heads, tuple(grid), *rest), getattr(torch, dtype), where)
        if impl not in this.contenders:
            raise ValueError(f"{operation} has no form {impl!r}")
        answer: Answer = {}
        run = this.right(impl, answer)
        self._check_origin()
        if where.type == "cuda" and self.clock is None:
            self.clock = Clock(where)
        for _ in range(WARM_UP):
            run()
        gc.collect()
        self.run = run
        return answer

    def _built(self) -> Run:
        if self.run is None:
            raise RuntimeError("this process has built nothing to run")
        return self.run

    def _check_origin(self) -> None:
        """
        Raises:
            ImportError: the package or a part of it comes from elsewhere, such as an editable install of another tree.
        """
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name.partition(".")[0] == "attnctl_fast" and file and self.tree not in Path(file).resolve().parents:
                raise ImportError(f"{name} comes from {file}, not from {self.tree}")

    def time(self, calls: int) -> Answer:
        """Seconds of so many calls: by the events of a GPU, or this process's own on a CPU; on the wall; and on a CPU
        those that the process waited for something other than a core."""
        run = self._built()
        queued, wall, used = queueing(), time.perf_counter(), time.process_time()
        if self.clock is not None:
            used = calls * self.clock.elapsed(run, calls)
            return {"seconds": used, "wall": time.perf_counter() - wall, "waited": 0.0}
        for _ in range(calls):
            run()
        used, wall, queued = time.process_time() - used, time.perf_counter() - wall, queueing() - queued
        return {"seconds": used, "wall": wall, "waited": max(wall - used - queued, 0.0)}

    def count(self, calls: int, **case: Any) -> Answer:
        """Instructions of a call of a case, by valgrind, in a process of PyTorch's that builds it anew."""
        setup = f"import bench.compare.worker as worker; run = worker.built({str(self.tree)!r}, {case!r})"
        found = Timer("run()", setup).collect_callgrind(
            calls, repeats=None, collect_baseline=False, retain_out_file=False
        )
        return {"instructions": found.counts() // calls}


def built(tree: str, case: dict[str, Any]) -> Run:
    """What runs a case of `tree`, which is where the package is to come from."""
    torch.set_grad_enabled(False)
    worker = Worker(Path(tree))
    worker.build(**case)
    return worker._built()


def queueing() -> float:
    """Seconds that this thread was ready but other processes had the core (Linux: sched-stats.rst), 0 where the system
    does not say."""
    try:
        return 1e-9 * int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0


def main() -> None:
    # Whatever a library prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    gc.disable()
    worker = Worker(Path(sys.argv[1]).resolve())
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("do"))(**order)
        except Exception as error:
            answer = {"failed": first_line(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
