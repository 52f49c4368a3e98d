"""The host's time per call of every operation, which is the whole cost where a kernel takes less.

Triton itself runs, with kernels that are compiled for sm_90, on the CPU tensors of a small layer; only NVIDIA's driver
is a stand-in that launches nothing. So a figure leaves out the driver's own time for a launch and the question which
device is current, has a CPU's allocator for a GPU's, and holds what is read and checked of CPU tensors alone. The rows
of eager and of SDPA are of tiny tensors on a CPU, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from bench.harness.checkout import RESULTS
from bench.harness.rows import Log, Row, stamp
from bench.harness.timing import Run, first_line
from bench.host.driver import launches, launching_nothing
from bench.ops.layers import TINY, Layer
from bench.ops.registry import named, timed

LAYER = Layer("small", 2, (8, 8), 40)
# Calls of a sample, and samples.
CALLS, SAMPLES = 100, 21
CPU = torch.device("cpu")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default="", metavar="NAME", help="operations whose name contains NAME")
    made.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"of {CALLS} calls, by default {SAMPLES}"
    )
    made.add_argument("--label", default="", help="a word to tell this run's rows from another's")
    made.add_argument(
        "--results", type=Path, default=RESULTS / "host.jsonl", metavar="FILE", help="default: %(default)s"
    )
    return made


def run(arguments: argparse.Namespace) -> int:
    """1 if an operation fails, else 0.

    Raises:
        ValueError: no such operation, fewer than two samples, or kernels cannot be launched into nothing here.
        OSError: the results file cannot be written, or there is no C compiler.
    """
    names = named(arguments.only)
    if arguments.samples < 2:
        raise ValueError(f"--samples is {arguments.samples}; take at least 2")
    torch.set_num_threads(1)
    log = Log(arguments.results, {**stamp(), "label": arguments.label})
    for row in _rows(names, arguments.samples):
        log.write(row)
        print(line(row), flush=True)
    return int(any("failed" in row for row in log.rows))


def _rows(names: list[str], samples: int) -> Iterator[Row]:
    if "attention" in names:
        base = {"op": "attention", "shape": TINY.sizes, "dtype": "float32"}
        form = timed("attention", TINY, torch.float32, CPU)
        q, k, v = (form.tensors[x] for x in "qkv")
        for impl, call in (
            ("SDPA", lambda: scaled_dot_product_attention(q, k, v)),
            ("eager", form.ours("eager")),
        ):
            yield {**base, "impl": impl, **microseconds(call, samples)}
    with launching_nothing():
        for name in names:
            row: Row = {"op": name, "shape": LAYER.sizes, "dtype": "float16", "impl": "triton"}
            try:
                call = timed(name, LAYER, torch.float16, CPU).ours("triton")
                call()
                before = launches()
                call()
                yield {**row, "launches": launches() - before, **microseconds(call, samples)}
            except Exception as error:
                yield {**row, "failed": first_line(error)}


def microseconds(call: Run, samples: int) -> Row:
    """Thread time per call: median and quartiles of the samples, after a first one."""
    timer = Timer("call()", globals={"call": call}, timer=time.thread_time)
    taken = [1e6 * timer.timeit(CALLS).mean for _ in range(1 + samples)][1:]
    q1, median, q3 = statistics.quantiles(taken, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "samples": samples}


def line(row: Row) -> str:
    """A row as one line of text."""
    where = f"{row['op']:31} {row['shape']:26} {row['impl']:6}"
    if "failed" in row:
        return f"{where} failed: {row['failed']}"
    launched = f", {row['launches']} launches" if "launches" in row else ""
    return f"{where} {row['median']:6.1f} us ({row['q1']:.1f} to {row['q3']:.1f}){launched}"
