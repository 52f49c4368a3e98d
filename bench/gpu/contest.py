"""Times the contenders of one comparison on a GPU, in turns, and says which aims are met by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from attnctl_fast.kernels import _launch

from bench.harness.rows import Row
from bench.harness.timing import Clock, Run, first_line
from bench.ops import rivals
from bench.ops.base import Comparison, row_of
from bench.ops.layers import LARGE, LAYERS, SMALL, Layer
from bench.ops.registry import comparison

# The kernels, on a GPU or interpreted.
OURS = "triton"


class Task(NamedTuple):
    """One comparison to be made. compiled: the kernels against the rivals that torch.compile makes, else against all
    others."""

    operation: str
    layer: Layer
    dtype: torch.dtype
    compiled: bool = False

    @property
    def row(self) -> Row:
        return {"kind": "time", **row_of(self.operation, self.layer, self.dtype)}


def comparison_of(task: Task, clock: Clock) -> Comparison:
    compile = rivals.compiler(task.compiled and clock.on_gpu)
    return comparison(task.operation, task.layer, task.dtype, clock.device, compile)


def measure(task: Task, clock: Clock, bandwidth: float) -> list[Row]:
    """Check every contender's result, then time those that are right, in turns. bandwidth: bytes per second of a copy.

    Returns:
        A row for every contender; none where `compiled` is asked for and nothing is.
    """
    this = comparison_of(task, clock)
    contenders = {x: c for x, c in this.contenders.items() if c.compiles == task.compiled or x == OURS}
    if task.compiled and len(contenders) == 1:
        return []
    runs: dict[str, Run] = {}
    found: dict[str, Row] = {}
    for name in contenders:
        record = found[name] = {**task.row, "impl": name}
        try:
            run = this.right(name, record)
            record["peak_mb"] = clock.peak_megabytes(run)
            if name == OURS:
                record["launches"] = launches(run)
            runs[name] = run
        except Exception as error:
            record["failed"] = first_line(error)
            _still_answers(clock, name, error)
    _time(this, runs, found, clock, bandwidth)
    return list(found.values())


def _still_answers(clock: Clock, name: str, error: Exception) -> None:
    """Raise RuntimeError if no rival can be timed any more after an error."""
    try:
        clock.synchronise()
    except Exception:
        raise RuntimeError(f"{name} broke the GPU's context: {first_line(error)}") from error


def _time(this: Comparison, runs: dict[str, Run], found: dict[str, Row], clock: Clock, bandwidth: float) -> None:
    graphs, uncaptured = clock.compare_graphs(runs)
    cold = clock.compare_cold(runs)
    for name, times in clock.compare(runs).items():
        record = found[name]
        record.update(times)
        record["graph"] = graphs.get(name)
        record["not_captured"] = uncaptured.get(name)
        record["cold"] = cold.get(name)
        record["host_us"] = clock.host(runs[name])
        record["bytes"], record["flops"] = this.moved, this.flops
        once = (cold.get(name) or times)["p50"]
        record["bandwidth_share"] = this.moved / (1e-6 * once) / bandwidth


def launches(run: Run) -> list[Row]:
    """Kernel, grid and configuration of every launch."""
    with _launch.recording() as recorded:
        run()
    return [{"kernel": x.kernel.__name__, "grid": list(x.grid), "config": x.config} for x in recorded]


def line(record: Row) -> str:
    """A row of a comparison as one line of text."""
    where = (
        f"{record['op']:38} {record['model']:9} {record['shape']:33} {record['dtype']:9} {record.get('impl', ''):22}"
    )
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


def best(record: Row) -> float:
    """Microseconds, in a CUDA graph where that is faster."""
    return min(record["p50"], record["graph"]["p50"]) if record["graph"] else record["p50"]


def aims(records: Sequence[Row]) -> Iterator[str]:
    """How the aims (README: what the kernels are to reach on an H200) were met, as far as they were measured."""
    timed = [r for r in records if "p50" in r and r["dtype"] == "float16"]

    def at(op: str, layer: Layer) -> dict[str, Row]:
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
