"""The kernels on the GPU at hand: right over the whole grid of shapes, then timed against their rivals in the same run.

    python bench/gpu.py                       everything, within --budget-seconds (440); a bare checkout with torch and
                                              triton will do
    python bench/gpu.py --quick               fewer shapes, no rival that torch.compile makes
    python bench/gpu.py --only NAME           operations whose name contains NAME; no correctness
    python bench/gpu.py --dtype TYPE --model NAME
                                              comparisons of one dtype, or of layers whose model contains NAME
    TRITON_INTERPRET=1 python bench/gpu.py --dry-run --results FILE
                                              the same on tiny shapes on a CPU, to see that all of it runs

Every measurement is appended to bench/results/<gpu>.jsonl when it is made, so a run that is killed keeps what it has.
How the aims were met, and what the budget did not reach, stands at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import correctness
import peers
import torch
from attnctl_fast.kernels import _launch
from checkout import RESULTS, git_state
from registry import OPERATIONS, Comparison, comparison
from shapes import LARGE, LAYERS, REGULATED, SMALL, TINY, Layer
from timing import Clock, Run, first_line

from attnctl_fast._report import versions

Record = dict[str, Any]
# The kernels, on a GPU or interpreted.
OURS = "triton"
DTYPES = ("float16", "bfloat16")
FORWARD = ("attention", "target_statistics", "merge_targets", "biased_attention", "regulated_attention")


class Task(NamedTuple):
    """One comparison to be made; `compiled`: with the rivals that torch.compile makes."""

    operation: str
    layer: Layer
    dtype: torch.dtype
    compiled: bool = False


def tasks(quick: bool) -> list[Task]:
    """All comparisons, the most important first: the aims; every operation at two shapes; all shapes in float16 for
    one image, then four; bfloat16. Classifier-free guidance doubles the batch of plain attention; regulation runs on
    the conditional half."""
    half, bfloat = torch.float16, torch.bfloat16

    def batched(operation: str, layer: Layer, images: int) -> Layer:
        return layer._replace(batch=images * (2 if operation == "attention" else 1))

    found = [Task("regulate", layer, half, True) for layer in (SMALL, LARGE)]
    found += [Task("regulated_layer", layer, half, layer == SMALL) for layer in (SMALL, LARGE)]
    found += [Task("attention", batched("attention", layer, 1), half) for layer in LAYERS]
    for layer in (SMALL, LARGE):
        found += [Task(x, batched(x, layer, 1), half, layer == SMALL) for x in OPERATIONS]
    if not quick:
        every = [(x, layer) for layer in LAYERS for x in FORWARD]
        every += [(x, layer) for layer in REGULATED for x in ("regulate", "regulated_layer")]
        found += [Task(x, batched(x, layer, images), half) for images in (1, 4) for x, layer in every]
        found += [Task(x, batched(x, layer, images), bfloat) for images in (1, 4) for x, layer in every if x in FORWARD]
    order = dict.fromkeys(t._replace(compiled=False) for t in found)
    compiled = {t._replace(compiled=False) for t in found if t.compiled and not quick}
    return [t._replace(compiled=t in compiled) for t in order]


class Bench:
    """Measures comparisons and writes what it measures."""

    def __init__(self, device: torch.device, results: Path | None) -> None:
        self.clock = Clock(device)
        self.results = results
        self.records: list[Record] = []
        self.bandwidth = self.clock.copy_bandwidth()
        self.settings = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (dry run)",
            "git": git_state(),
            "versions": versions(),
            "copy_gb_per_s": self.bandwidth / 1e9,
        }

    def write(self, record: Record) -> None:
        self.records.append(record)
        if self.results is not None:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**self.settings, **record}) + "\n")

    def first_call(self, operation: str, layer: Layer) -> None:
        """Time the first call of the kernels, while no cache knows them."""
        this = self._comparison(Task(operation, layer, torch.float16))
        seconds = self.clock.first_call(this.contenders[OURS].build())
        self.write({"op": this.op, "shape": layer.sizes, "dtype": "float16", "impl": OURS, "first_call_s": seconds})
        print(f"first call of {this.op}: {seconds:.1f} s", flush=True)

    def _comparison(self, task: Task) -> Comparison:
        torch.compiler.reset()
        compile = partial(torch.compile, dynamic=False) if self.clock.on_gpu else peers.uncompiled
        return comparison(task.operation, task.layer, task.dtype, self.clock.device, compile)

    def measure(self, task: Task) -> None:
        """Check every contender's result, then time those that are right, in turns."""
        this = self._comparison(task)
        base = {
            "op": this.op,
            "model": task.layer.model,
            "shape": task.layer.sizes,
            "dtype": str(task.dtype).removeprefix("torch."),
        }
        runs: dict[str, Run] = {}
        found: dict[str, Record] = {}
        for name, contender in this.contenders.items():
            if contender.compiles and not task.compiled:
                continue
            record: Record = {**base, "impl": name}
            try:
                run = contender.build()
                if contender.checked:
                    self._check(this, run(), record)
                record["peak_mb"] = self.clock.peak_megabytes(run)
                if name == OURS:
                    record["launches"] = launches(run)
                runs[name] = run
            except Exception as error:
                record["failed"] = first_line(error)
            found[name] = record
        self._time(this, runs, found)
        for record in found.values():
            self.write(record)
            print(line(record), flush=True)

    def _check(self, this: Comparison, result: Any, record: Record) -> None:
        record["max_error"], record["relative_error"] = this.errors(result)
        this.judge(record["relative_error"])

    def _time(self, this: Comparison, runs: dict[str, Run], found: dict[str, Record]) -> None:
        graphs, uncaptured = self.clock.compare_graphs(runs)
        cold = self.clock.compare_cold(runs)
        for name, times in self.clock.compare(runs).items():
            record = found[name]
            record.update(times)
            record["graph"] = graphs.get(name)
            record["not_captured"] = uncaptured.get(name)
            record["cold"] = cold.get(name)
            record["host_us"] = self.clock.host(runs[name])
            record["bytes"], record["flops"] = this.moved, this.flops
            once = (cold.get(name) or times)["p50"]
            record["bandwidth_share"] = this.moved / (1e-6 * once) / self.bandwidth


def launches(run: Run) -> list[Record]:
    """Kernel, grid and configuration of every launch."""
    with _launch.recording() as recorded:
        run()
    return [{"kernel": x.kernel.__name__, "grid": list(x.grid), "config": x.config} for x in recorded]


def line(record: Record) -> str:
    """A record as one line of text."""
    where = f"{record['op']:38} {record['model']:9} {record['shape']:33} {record['dtype']:9} {record['impl']:22}"
    if "failed" in record:
        return f"{where} failed: {record['failed']}"
    graph = f"{record['graph']['p50']:9.1f}" if record["graph"] else f"{'-':>9}"
    host = "" if record["host_us"] is None else f" host {record['host_us']:7.1f}"
    peak = "" if record["peak_mb"] is None else f" peak {record['peak_mb']:7.1f} MB"
    error = f" error {record['relative_error']:.1e}" if "relative_error" in record else ""
    return (
        f"{where} {record['p50']:9.1f} us ({record['p20']:.1f} to {record['p80']:.1f}), graph {graph},{host}"
        f" bandwidth {100 * record['bandwidth_share']:5.1f} %{peak}{error}"
    )


def best(record: Record) -> float:
    """Microseconds, in a CUDA graph where that is faster."""
    return min(record["p50"], record["graph"]["p50"]) if record["graph"] else record["p50"]


def aims(records: Sequence[Record]) -> Iterator[str]:
    """How the aims (README: what the kernels are to reach on an H200) were met, as far as they were measured."""
    timed = [r for r in records if "p50" in r and r["dtype"] == "float16"]

    def at(op: str, layer: Layer) -> dict[str, Record]:
        return {r["impl"]: r for r in timed if (r["op"], r["model"], r["shape"]) == (op, layer.model, layer.sizes)}

    def verdict(met: bool) -> str:
        return "met" if met else "MISSED"

    for layer in LAYERS:
        found = at("attention", layer._replace(batch=2))
        rivals = {name: best(r) for name, r in found.items() if name.startswith("SDPA")}
        if OURS in found and rivals:
            name = min(rivals, key=lambda x: rivals[x])
            text = f"{best(found[OURS]):.1f} us, {name} {rivals[name]:.1f} us"
            yield f"{verdict(best(found[OURS]) <= rivals[name])}: attention {layer.model} {layer.sizes}: {text}"
    for layer, most in ((SMALL, 60), (LARGE, 200)):
        found = at("regulate", layer)
        if OURS in found:
            took = best(found[OURS])
            yield f"{verdict(took < most)}: solver at {layer.sizes}: {took:.1f} us, aim {most} us"
    found = at("regulated_layer", SMALL)
    if OURS in found:
        ours = found[OURS]
        if "plain layer" in found:
            plain = found["plain layer"]
            for how, extra in (("launched", ours["p50"] - plain["p50"]), ("in a CUDA graph", best(ours) - best(plain))):
                yield f"{verdict(extra < 100)}: regulated layer, {how}: {extra:.1f} us over a plain one, aim 100 us"
        if "published" in found:
            times = found["published"]["p50"] / ours["p50"]
            yield f"{verdict(times >= 100)}: regulated layer: {times:.0f} times faster than as published, aim 100"
        stock = {name: best(found[name]) for name in ("eager", "torch.compile") if name in found}
        if stock:
            name = min(stock, key=lambda x: stock[x])
            times = stock[name] / best(ours)
            yield f"{verdict(times >= 5)}: regulated layer: {times:.1f} times faster than stock PyTorch ({name}), aim 5"


def precompile(device: torch.device, seconds: float) -> str:
    """Compile in a process without a GPU what the rest of the run launches; what it said last."""
    from triton.runtime import driver

    target = driver.active.get_current_target()
    table = _launch.device_slug(torch.cuda.get_device_name(device))
    script = Path(__file__).with_name("precompile.py")
    given = [target.backend, target.arch, target.warp_size, table, os.cpu_count() or 1]
    hidden = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "")
    command = [sys.executable, str(script), *map(str, given)]
    try:
        done = subprocess.run(command, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s; the rest compiles when it is launched"
    return (done.stdout if done.returncode == 0 else done.stderr)[-2000:].strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", metavar="NAME")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--model", default="", metavar="NAME")
    parser.add_argument("--budget-seconds", type=float, default=440)
    parser.add_argument("--results", type=Path, help="file to append to")
    parser.add_argument("--commit", help="what to write as the commit where there is no git")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args(argv)
    dry = arguments.dry_run
    if dry and not _launch.INTERPRETED:
        parser.error("--dry-run runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    if not dry and (_launch.INTERPRETED or not torch.cuda.is_available()):
        parser.error("no GPU that PyTorch sees, or TRITON_INTERPRET is set; --dry-run runs on a CPU")

    start = time.monotonic()
    end = start + arguments.budget_seconds
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    results = arguments.results
    if results is None and not dry:
        results = RESULTS / f"{_launch.device_slug(torch.cuda.get_device_name(device))}.jsonl"
    planned = [Task(name, TINY, torch.float32, True) for name in OPERATIONS] if dry else tasks(arguments.quick)
    planned = [
        task
        for task in planned
        if arguments.only in task.operation
        and arguments.model.lower() in task.layer.model.lower()
        and str(task.dtype).endswith(f".{arguments.dtype}" if arguments.dtype else "")
    ]
    if not planned:
        parser.error("nothing is planned that --only, --model and --dtype all allow; --help says what they choose")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # A cache of its own, so that first calls compile.
        os.environ["TRITON_CACHE_DIR"] = folder
        bench = Bench(device, results)
        if arguments.commit:
            bench.settings["git"] = arguments.commit
        print(f"{bench.settings['gpu']}, copy {bench.bandwidth / 1e9:.0f} GB/s", flush=True)
        if not arguments.only:
            for name in () if dry else ("attention", "regulate", "regulated_layer", "biased_attention"):
                bench.first_call(name, SMALL)
            if not dry:
                print(precompile(device, arguments.budget_seconds / 3), f"{time.monotonic() - start:.0f} s", flush=True)
            outcome = correctness.run(correctness.checks(tiny=dry), start + 0.6 * arguments.budget_seconds)
            wrong = len(outcome.failures)
            bench.write({"op": "correctness", **outcome._asdict()})
            print(f"correctness: {outcome.done} of {outcome.planned} checks, {wrong} failed", flush=True)
            print(*outcome.failures[:20], sep="\n", flush=True)
        left = list(planned)
        while left and time.monotonic() < end:
            try:
                bench.measure(left[0])
            except Exception as error:
                bench.write({"op": left[0].operation, "shape": left[0].layer.sizes, "failed": first_line(error)})
                print(f"{left[0].operation} {left[0].layer.sizes} failed: {first_line(error)}", flush=True)
            left.pop(0)
    print(*aims(bench.records), sep="\n")
    if left:
        names = ", ".join(f"{t.operation} {t.layer.sizes} {str(t.dtype).removeprefix('torch.')}" for t in left)
        print(f"not reached within {arguments.budget_seconds:.0f} s: {len(left)} of {len(planned)}: {names}")
    print(f"{time.monotonic() - start:.0f} s; results: {results}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
