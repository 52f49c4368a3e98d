"""Finds launch configurations for the GPU at hand and writes kernels/configs/<gpu>.json.

    python -m bench tune                    every kernel and shape that --budget-seconds (1500) allows; `bench gpu`
                                            --one-shot tunes the first of them
    python -m bench tune --only NAME        kernels whose name contains NAME; the rules of others stay as they are
    TRITON_INTERPRET=1 python -m bench tune --dry-run --output FILE
                                            two configurations on a tiny shape on a CPU, to see that all of it runs

From the default configuration of a shape, every value of `VALUES` is tried for one setting at a time; then those that
gain are put together while they gain. The results must be those of the operation in float64. A configuration gets a
rule where it is faster than the default by `MARGIN`, both timed in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from attnctl_fast.kernels import _launch

from attnctl_fast.cli.report import versions
from bench.compile.archive import compile_jobs, is_cached, jobs
from bench.gpu.contest import OURS
from bench.harness.checkout import git_state
from bench.harness.timing import Clock, Run, first_line
from bench.ops.base import Comparison
from bench.ops.layers import LARGE, LARGEST, LAYERS, SMALL, TINY, WIDEST, Layer
from bench.ops.registry import OPERATIONS, comparison

Config = dict[str, int]
Sizes = dict[str, int]
MARGIN = 0.05
VALUES = {
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3),
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128),
    "BLOCK_ALL": (32, 64, 128),
    "WIDTH": (32, 64, 128, 256),
    "ON_CHIP_N": (0, 128),
    "TILES": (1, 2, 4, 8),
    "BLOCK_Y": (8, 16, 32, 64),
    "BLOCK_X": (16, 32, 64),
    "GROUP": (1, 2, 4, 8),
    "WHOLE": (0, 1),
    "CUTS": (4, 8),
    "STEPS": (8, 16, 32),
    "HEADS": (8, 16, 32),
    "PROGRAMS": (64, 128, 256, 512),
    "maxnreg": (96, 128, 168, 255),
}
# The timings by which, together, a kernel's configuration is judged.
JUDGED_BY = {
    kernel: tuple(name for name, (_, timing) in OPERATIONS.items() if kernel in timing.kernels)
    for kernel in dict.fromkeys(kernel for _, timing in OPERATIONS.values() for kernel in timing.kernels)
}


# What `bench gpu` --one-shot tunes, and where, in this order: the solver, whose candidates for larger grids take
# minutes to compile, then what is furthest from its floor by estimate.
FIRST: dict[str, tuple[Layer, ...]] = {
    "regulate_fwd": (SMALL, LARGE),
    **dict.fromkeys(("attention_fwd", "attention_maps_fwd", "context_gradient_fwd"), (SMALL, LARGE, LARGEST)),
    **dict.fromkeys((name for name in JUDGED_BY if name.startswith("attention_bwd_")), (SMALL, LARGE, LARGEST)),
    # Whether a GPU has the shared memory for one pass over the widest heads, no default can say.
    "attention_bwd_short": (SMALL, LARGE, LARGEST, WIDEST),
}
# Configurations that are timed at each place, and the gains that are put together, where not all are.
CANDIDATES, TOGETHER = 8, 3


class Found(NamedTuple):
    """The sizes that a kernel was asked for, its configuration there, and its time over the default's."""

    sizes: Sizes
    config: Config
    ratio: float


@contextmanager
def asked(kernel: str) -> Iterator[list[Sizes]]:
    """Collects the sizes with which configurations of `kernel` are looked up."""
    found: list[Sizes] = []
    choose = _launch.choose

    def noted(table: _launch.Table, operation: str, sizes: Sizes) -> Config:
        if operation == kernel and sizes not in found:
            found.append(sizes)
        return choose(table, operation, sizes)

    with mock.patch.object(_launch, "choose", noted), _launch.forced({}):
        yield found


def within_registers(config: Config) -> Config:
    """`config`, with no more registers a thread than the 65536 of a block allow."""
    if "maxnreg" not in config:
        return config
    return {**config, "maxnreg": min(config["maxnreg"], 65536 // (32 * config["num_warps"]))}


class Tuner:
    """Looks for the configuration of one kernel at one shape."""

    def __init__(self, clock: Clock, kernel: str, layer: Layer, dtype: torch.dtype) -> None:
        self.clock, self.kernel = clock, kernel
        self._comparisons: list[tuple[Comparison, Run]] = []
        for operation in JUDGED_BY[kernel]:
            one = comparison(operation, layer, dtype, clock.device)
            self._comparisons.append((one, one.contenders[OURS].build()))
        with _launch.recording(), asked(kernel) as sizes:
            self._run()
        if len(sizes) != 1:
            raise ValueError(
                f"{kernel} is looked up with {len(sizes)} sets of sizes by {JUDGED_BY[kernel]}; name others"
            )
        self.sizes = sizes[0]
        use = _launch.choose(_launch.read_table("default"), kernel, self.sizes)
        self.default = _launch.compiled_with(use, torch.version.hip is not None)

    def _run(self) -> None:
        for _, run in self._comparisons:
            run()

    def _using(self, config: Config) -> Run:
        table = {self.kernel: [{"use": config}]}

        def run() -> None:
            with _launch.forced(table):
                self._run()

        return run

    def _right(self, config: Config) -> bool:
        """Whether a configuration compiles, fits the GPU and gives the right results."""
        try:
            with _launch.forced({self.kernel: [{"use": config}]}):
                return all(x.judge.errors(run())[1] <= x.judge.tolerance for x, run in self._comparisons)
        except Exception as error:
            print(f"  {config}: {first_line(error)}", flush=True)
            return False

    def _times(self, configs: Sequence[Config]) -> list[float]:
        """Microseconds of every configuration, infinite where it is not right."""
        runs = {str(i): self._using(x) for i, x in enumerate(configs) if self._right(x)}
        found = self.clock.compare_graphs(runs)[0] if self.clock.on_gpu else self.clock.compare(runs)
        return [found[str(i)]["p50"] if str(i) in found else float("inf") for i in range(len(configs))]

    def _compiled(self, configs: Sequence[Config]) -> list[Config]:
        """Compile in parallel what `configs` launch, and return those that compile: Triton fails at some, with its
        whole program on the terminal, and again at every attempt."""
        from triton.runtime import driver

        gpu = driver.active.get_current_target()
        launched = [jobs([("", self._using(config))], gpu, None, []) for config in configs]
        every = {named.job.key: named for kernels in launched for named in kernels}
        compile_jobs(every.values(), os.cpu_count() or 1)
        return [x for x, kernels in zip(configs, launched, strict=True) if all(is_cached(k.job) for k in kernels)]

    def candidates(self) -> list[Config]:
        """List the default, then the default with one setting changed: the nearest value of every setting first."""
        changed = []
        for name, was in self.default.items():
            if name == "maxnreg" and torch.version.hip:
                continue
            nearest = sorted((x for x in VALUES[name] if x != was), key=lambda x: abs(math.log2((x or 1) / (was or 1))))
            changed += [(rank, {**self.default, name: value}) for rank, value in enumerate(nearest)]
        ordered = [within_registers(config) for _, config in sorted(changed, key=lambda pair: pair[0])]
        return [self.default, *(config for config in ordered if config != self.default)]

    def launch(self, most: int) -> None:
        """Launch what `search(most)` times first."""
        for config in self.candidates()[:most]:
            self._using(config)()

    def search(self, most: int | None = None) -> Found:
        """Find the best configuration; with `most`, among so many candidates and few combinations of them."""
        tried = self.candidates()[:most]
        if self.clock.on_gpu:
            tried = [self.default, *(x for x in self._compiled(tried) if x != self.default)]
        times = dict(zip(range(len(tried)), self._times(tried), strict=True))
        gains = [index for index in sorted(times, key=lambda i: times[i]) if times[index] < times[0]]
        best = tried[gains[0]] if gains else self.default
        for index in gains[1 : None if most is None else TOGETHER]:
            change = {name: value for name, value in tried[index].items() if value != self.default[name]}
            together = within_registers({**best, **change})
            if self.clock.on_gpu and not self._compiled([together]):
                continue
            now, then = self._times([together, best])
            best = together if now < then else best
        if best == self.default:
            return Found(self.sizes, self.default, 1.0)
        now, then = self._times([best, self.default])
        ratio = now / then
        return Found(self.sizes, best, ratio) if ratio < 1 - MARGIN else Found(self.sizes, self.default, 1.0)


def rules(found: Sequence[Found], default: list[dict[str, Config]]) -> list[dict[str, Config]]:
    """Rules that give every size of `found` its configuration, and every other what `default` does or a larger size's;
    none that changes nothing."""
    ordered = sorted(found, key=lambda x: sorted(x.sizes.items()))
    kept = [{"when": dict(x.sizes), "use": dict(x.config)} for x in ordered]

    def right(candidate: list[dict[str, Config]]) -> bool:
        table = {"": [*candidate, *default]}
        return all(_launch.choose(table, "", x.sizes) == x.config for x in found)

    if not right(kept):
        raise ValueError("the sizes cannot be told apart by upper bounds in one order")
    for rule in list(kept):
        without = [x for x in kept if x is not rule]
        if right(without):
            kept = without
    return kept


def shapes() -> Iterator[tuple[Layer, torch.dtype]]:
    """Every layer with the batch that guidance doubles, float16 first."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for layer in LAYERS:
            yield layer._replace(batch=2), dtype


def tune_at(
    clock: Clock, kernel: str, layer: Layer, dtype: torch.dtype, known: Sequence[Found], most: int | None = None
) -> Found | None:
    """Tune a kernel at one layer; None where `known` has the sizes that it is asked for there.

    Raises:
        Exception: whatever the kernel raises at its default configuration.
    """
    tuner = Tuner(clock, kernel, layer, dtype)
    return None if any(x.sizes == tuner.sizes for x in known) else tuner.search(most)


def write_table(path: Path, found: Mapping[str, Sequence[Found]], about: Mapping[str, Any]) -> int:
    """Write the rules of what was found to a table, and keep its other kernels' rules. about: of the GPU and the run.

    Returns:
        The number of rules that differ from the default ones.
    """
    rules_of = json.loads(path.read_text(encoding="utf-8"))["rules"] if path.is_file() else {}
    default, count = _launch.read_table("default"), 0
    for kernel, results in found.items():
        new = rules(results, default[kernel])
        rules_of.pop(kernel, None)
        rules_of |= {kernel: [*new, *default[kernel]]} if new else {}
        count += len(new)
    table = {**about, "margin": MARGIN, "rules": rules_of}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return count


def about(device: torch.device) -> dict[str, Any]:
    """Describe the GPU and the run for a table. target: as `bench resources` names it, None without a GPU."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none (dry run)",
        "target": _target(device) if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"),
        "git": git_state(),
        "versions": {key: versions()[key] for key in ("torch", "triton")},
    }


def _target(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default="", metavar="NAME")
    made.add_argument("--budget-seconds", type=float, default=1500)
    made.add_argument("--output", type=Path, help="default: kernels/configs/<gpu>.json")
    made.add_argument("--dry-run", action="store_true")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Tune, and return 0.

    Raises:
        ValueError: no GPU, or `--dry-run` without what it needs.
    """
    dry = arguments.dry_run
    if dry and not (_launch.INTERPRETED and arguments.output):
        raise ValueError("--dry-run needs --output, and TRITON_INTERPRET=1 for Triton's interpreter")
    if not dry and (_launch.INTERPRETED or not torch.cuda.is_available()):
        raise ValueError("no GPU that PyTorch sees, or TRITON_INTERPRET is set; --dry-run runs on a CPU")

    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    this, clock = about(device), Clock(device)
    path = arguments.output or _launch.CONFIGS / f"{_launch.device_slug(this['gpu'])}.json"
    kernels = [name for name in JUDGED_BY if arguments.only in name]
    places = [(TINY, torch.float32)] if dry else list(shapes())
    end, count = time.monotonic() + arguments.budget_seconds, 0
    found: dict[str, list[Found]] = {}
    skipped = []
    with torch.no_grad():
        for (layer, dtype), kernel in itertools.product(places, kernels):
            where = f"{kernel} {layer.model} {layer.sizes} {str(dtype).removeprefix('torch.')}"
            if time.monotonic() > end:
                skipped.append(where)
                continue
            try:
                result = tune_at(clock, kernel, layer, dtype, found.get(kernel, ()), 2 if dry else None)
            except Exception as error:
                skipped.append(f"{where}: {first_line(error)}")
                continue
            if result is not None:
                found.setdefault(kernel, []).append(result)
                count = write_table(path, found, this)
                print(f"{where}: {result.config}, {100 * (result.ratio - 1):+.1f} %", flush=True)
    if skipped:
        print(f"failed, or not reached within {arguments.budget_seconds:.0f} s:", *skipped, sep="\n  ")
    print(f"{count} rules written to {path}")
    return 0
