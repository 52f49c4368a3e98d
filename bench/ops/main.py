"""Every operation against its rivals: the registry's comparisons, timed on a CPU by PyTorch's timer and on a GPU by
`bench gpu`, which has its own plan of shapes and dtypes.

What a form returns (forward and backward: the gradients) is checked against the textbook's operation in float64 before
it is timed: of attention regulation the lowest loss, which the bias must have, and the output, which must be that
bias's. Only what is there for scale, a plain layer, is not. The forms take turns in one process, at one and at two
threads; a form's time is the better of its two. On a CPU each case's rows are in the results file as soon as it is
measured.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from attnctl_fast import _impl
from bench.harness.checkout import RESULTS, ROOT
from bench.harness.cpu import Effort, compare
from bench.harness.rows import Log, Row, stamp
from bench.harness.timing import Clock, Run, first_line
from bench.ops import rivals
from bench.ops.base import ours, row_of
from bench.ops.layers import JOINT, LARGE, LAYERS, REGULATED, SMALL, Layer
from bench.ops.registry import OPERATIONS, comparison, named

# What a call of an operation may cost beyond a product written down: checks of its arguments, in milliseconds.
CALL = 0.02
DTYPES = ("float32", "bfloat16", "float16")
FULL, QUICK = Effort(12, 0.06), Effort(1, 0.1)


class Case(NamedTuple):
    operation: str
    layer: Layer


# What is made of joint attention only, whose columns are the image's as well.
OF_JOINT = (
    "maps_from_lse",
    "maps_from_lse_all",
    "grouped_attention",
    "grouped_attention_all",
    "joint_maps",
    "joint_edit",
)


def small() -> Iterator[Case]:
    """Every operation at one layer where it is used, losses of maps with those of twelve tokens."""
    for name in OPERATIONS:
        maps = name in ("smooth_maps", "map_similarity", "similarity_loss")
        yield Case(name, JOINT[0] if name in OF_JOINT else SMALL._replace(targets=12) if maps else SMALL)


def default() -> Iterator[Case]:
    """And the layers of the Stable Diffusions for whole methods: what the tables of docs/measurements.md show."""
    yield from small()
    at_512 = [layer for layer in LAYERS if layer.model != "SD 2 768"]
    sd15 = [layer for layer in LAYERS if layer.model == "SD 1.5"][:3]
    for layer in (sd15[-1], LARGE._replace(targets=3)):
        yield Case("regulated_layer", layer)
    for name, layers in (("attention_with_context_gradient", at_512), ("composed_attention", sd15)):
        for layer in layers:
            yield Case(name, layer._replace(batch=2))
    for layer in sd15:
        for targets in (2, 75):
            yield Case("attention_with_maps_guidance", layer._replace(targets=targets))
    yield Case("similarity_loss", SMALL._replace(targets=20))
    # A prompt's words, where stock attention takes a tenth of a second.
    yield Case("joint_maps", JOINT[1])


def joint() -> Iterator[Case]:
    """What is made of joint attention, at its layers."""
    for layer in JOINT:
        for name in ("maps_from_lse", "maps_from_lse_all", "joint_maps"):
            yield Case(name, layer)
        # An edit is one of a few words, and groups know none.
        if layer.targets <= 8:
            yield Case("joint_edit", layer)
            yield Case("grouped_attention", layer)


def every() -> Iterator[Case]:
    """Every operation at every layer of up to 4096 image tokens."""
    for layer in REGULATED:
        for name in OPERATIONS:
            yield Case(name, layer)


SHAPES: dict[str, Callable[[], Iterator[Case]]] = {"small": small, "default": default, "joint": joint, "all": every}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default="", metavar="NAME", help="operations whose name contains NAME")
    made.add_argument("--dtype", choices=DTYPES, help="on a CPU; default: float32")
    made.add_argument(
        "--shapes", metavar="CHOICE", help="on a CPU: small, default, joint, all, or layers whose model contains CHOICE"
    )
    made.add_argument("--quick", action="store_true", help="on a CPU: about a minute, small shapes, one short turn")
    made.add_argument("--compile", action="store_true", help="on a CPU, with the rivals that torch.compile makes")
    made.add_argument(
        "--results", type=Path, metavar="FILE", help="default: in bench/results, ops_cpu.jsonl or <gpu>.jsonl"
    )
    made.add_argument("--check", action="store_true", help="on a CPU: fail where the best rival is faster than ours")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    return made


def run(arguments: argparse.Namespace) -> int:
    """1 if one of our own forms is wrong or fails, or with `--check` is slower than its best rival, else 0.

    Raises:
        ValueError: nothing to measure, or not on that device.
        OSError: the results file cannot be written.
        KeyboardInterrupt: what was measured is in the file.
    """
    chosen = cases(arguments.only, arguments.shapes or ("small" if arguments.quick else "default"))
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU; use --device cpu")
        return _on_gpu(arguments)
    if _impl.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels are not worth timing; unset it")
    dtype: torch.dtype = getattr(torch, arguments.dtype or "float32")
    bandwidth = Clock(torch.device(device)).copy_bandwidth() / 1e9
    common = {**stamp(), "quick": arguments.quick, "copy_gb_per_s": bandwidth}
    log = Log(arguments.results or RESULTS / "ops_cpu.jsonl", common)
    with torch.no_grad(), tqdm(chosen, unit="case", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(case.operation)
            for row in measure(case, dtype, QUICK if arguments.quick else FULL, arguments.compile):
                log.write(row)
                tqdm.write(line(row))
    failed = [row for row in log.rows if "failed" in row]
    print(f"{len(log.rows) - len(failed)} measured, {len(failed)} failed; results: {log.path}")
    slower = behind(log.rows) if arguments.check else []
    for text in slower:
        print(text)
    return int(bool(slower) or any(row["impl"] in (None, ours(torch.device("cpu"))) for row in failed))


def cases(only: str, shapes: str) -> list[Case]:
    """What `--only` and `--shapes` choose, in the registry's order.

    Raises:
        ValueError: nothing.
    """
    if shapes in SHAPES:
        found = list(SHAPES[shapes]())
    else:
        found = [case for case in every() if shapes.lower() in case.layer.model.lower()]
    if not found:
        models = ", ".join(dict.fromkeys(layer.model for layer in REGULATED))
        raise ValueError(f"--shapes {shapes!r} is none of {', '.join(SHAPES)} and no part of a model: {models}")
    names = named(only)
    found = [case for case in found if case.operation in names]
    if not found:
        raise ValueError(f"--shapes {shapes!r} has no layer for {', '.join(names)}; leave it out, or name other shapes")
    return found


def _on_gpu(arguments: argparse.Namespace) -> int:
    """In a process of its own: `bench gpu` must be the first to touch the GPU."""
    for name in ("dtype", "shapes", "quick", "compile", "check"):
        if getattr(arguments, name):
            raise ValueError(f"--{name}: a GPU has a plan of its own; leave it out, or choose by --only")
    given = ["--only", arguments.only]
    given += ["--results", str(arguments.results)] if arguments.results else []
    return subprocess.run([sys.executable, "-m", "bench", "gpu", *given], cwd=ROOT).returncode


def measure(case: Case, dtype: torch.dtype, effort: Effort, compiled: bool = False) -> list[Row]:
    """A row for every form of a case: its times, or why there are none. `compiled`: with those of torch.compile."""
    base = row_of(case.operation, case.layer, dtype)
    try:
        this = comparison(case.operation, case.layer, dtype, torch.device("cpu"), rivals.compiler(compiled))
    except Exception as error:
        return [{**base, "impl": None, "failed": first_line(error)}]
    runs: dict[str, Run] = {}
    found: dict[str, Row] = {}
    for name, contender in this.contenders.items():
        if contender.compiles and not compiled:
            continue
        row = found[name] = {**base, "impl": name, "bytes": this.moved, "flops": this.flops}
        try:
            runs[name] = this.right(name, row)
        except Exception as error:
            row["failed"] = first_line(error)
    for name, times in compare(runs, effort).items():
        found[name] |= {"failed": first_line(times)} if isinstance(times, Exception) else times._asdict()
    return list(found.values())


def behind(rows: Iterable[Row]) -> list[str]:
    """A line for every case where a rival is faster than ours, by more than `CALL`, in three quarters of their turns.

    Rivals are those whose results were checked, of the same run. What slows the machine down slows both in a turn.
    """
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if "median" in row and "relative_error" in row:
            cases.setdefault((row["op"], row["model"], row["shape"]), {})[row["impl"]] = row
    found = []
    for (operation, _, shape), forms in cases.items():
        own = forms.pop(ours(torch.device("cpu")), None)
        faster = {}
        for name, row in forms.items():
            if own is None or name == "reference":
                continue
            turns = list(zip(row["turns"], own["turns"], strict=False))
            won = sum(theirs < mine for theirs, mine in turns)
            if won >= 0.75 * len(turns) and statistics.median(mine - theirs for theirs, mine in turns) > CALL:
                faster[name] = statistics.median(theirs / mine for theirs, mine in turns)
        if faster:
            name = min(faster, key=lambda x: faster[x])
            found.append(f"behind: {operation} at {shape}: {name} takes {faster[name]:.2f} of our time")
    return found


def line(row: Row) -> str:
    """A row as one line of text."""
    where = f"{row['op']:31} {row['model']:8} {row['shape']:30} {row['dtype']:8} {row['impl'] or '':20}"
    if "failed" in row:
        return f"{where} failed: {row['failed']}"
    error = f", error {row['relative_error']:.1e}" if "relative_error" in row else ""
    return f"{where} {row['median']:9.3f} ms ({row['q1']:.3f} to {row['q3']:.3f}), {row['threads']} threads{error}"
