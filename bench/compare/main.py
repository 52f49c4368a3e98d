"""`bench compare BASE`: the operations of this tree against those of another commit.

    python -m bench compare main
    python -m bench compare HEAD --only attention regulate --rounds 40

Both trees run the same cases in turns, a process each; the inputs, and what is timed, come from this tree's registry,
and the checkout is left as it is. CONTRIBUTING.md, "What a change costs", says what makes a slowdown, and what a
speedup.

The exit status is 1 for a slowdown and for a case that only BASE can run, 2 where no case could be compared.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from bench.compare.intervals import agreed, interval, verdict
from bench.compare.pair import Case, Failure, Pair
from bench.compare.suites import refusal
from bench.compare.worktree import resolve, termination_raised, worktree
from bench.harness.checkout import ROOT
from bench.harness.intervals import fewest_rounds
from bench.harness.rows import Log, Row, stamp
from bench.ops.base import row_of
from bench.ops.layers import LAYERS, TINY
from bench.ops.registry import OPERATIONS

# That an interval misses the truth, and that any of all cases looks slower by chance.
ERROR, FALSE_ALARM = 0.05, 0.05
# Sets of rounds in fresh processes that have to agree with the first. Of identical trees, one process was 7 % faster
# than the other at one operation of 24, for as long as they lived.
CONFIRMATIONS = 2
DTYPES = ("float32", "float16", "bfloat16")
SHAPES = {f"{x.model.lower().replace(' ', '').replace('.', '')}-{x.grid[0]}": x for x in LAYERS}
SHAPES["tiny"] = TINY
FAILED = {"base": "BASE cannot run it", "current": "this tree cannot run it"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("base", metavar="BASE", help="the commit, branch or tag to compare with")
    made.add_argument("--only", nargs="+", metavar="NAME", help="operations (default: all)")
    made.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(SHAPES)} (default: sd2-16 sd2-32, on CUDA sd2-16 sdxl-32)",
    )
    made.add_argument("--dtype", choices=DTYPES, help="default: float32, on CUDA float16")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch sees a GPU")
    made.add_argument("--rounds", type=int, default=24, metavar="N", help="of four samples each (default: 24)")
    made.add_argument("--threshold", type=float, default=0.05, help="the change that counts (default: 0.05)")
    made.add_argument("--no-tests", action="store_true", help="report speedups as untested ones")
    made.add_argument(
        "--instructions", action=argparse.BooleanOptionalAction, help="count them for every case, or for none"
    )
    made.add_argument("--results", type=Path, metavar="FILE", help="append the rows here (default: keep none)")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; 1 for a slowdown, or for a case that only the base can run.

    Raises:
        ValueError: no checkout, an unknown base, operation, shape or device, too few rounds, or nothing that could be
            compared.
        OSError: the worktree or the file of results cannot be made.
    """
    from tqdm import tqdm

    cases = chosen(arguments)
    if not arguments.threshold > 0:
        raise ValueError(f"--threshold is {arguments.threshold}; it must be above 0, such as 0.05")
    error = widened(len(cases))
    if arguments.rounds < fewest_rounds(error):
        raise ValueError(
            f"--rounds is {arguments.rounds}; intervals for {len(cases)} cases need {fewest_rounds(error)} or more"
        )
    commit = resolve(ROOT, arguments.base)
    count, said = counting(arguments.instructions, cases[0].device)
    log = Log(arguments.results, {**stamp(cases[0].device), "threads": 1, "base": commit})
    tests = cache(partial(refusal, ROOT))
    print(f"this tree against {arguments.base} ({commit[:12]}); {said}")
    print(f"{'operation':32} {'shape':10} {'base ms':>9} {'ratio':>6}  {'interval':17} {'instructions':>12}  verdict")
    with (
        termination_raised(),
        worktree(ROOT, commit) as tree,
        Comparison(tree, arguments, error, count) as comparison,
        tqdm(total=len(cases) * arguments.rounds, unit="round", disable=None, leave=False) as bar,
    ):
        for index, case in enumerate(cases):
            bar.set_description(case.operation)
            row = comparison.row(case, bar.update)
            if row.get("verdict") == "faster" and arguments.no_tests:
                row["verdict"] = "faster, untested"
            elif row.get("verdict") == "faster":
                bar.set_description(f"tests of {case.operation}")
                if why := tests(case.operation):
                    row |= {"verdict": "refused", "why": why}
            log.write(row)
            bar.n = (index + 1) * arguments.rounds
            tqdm.write(line(row))
    return summary(log.rows)


def widened(cases: int) -> float:
    """The probability that an interval may miss the truth. To look slower by chance, a case has to miss it on that side
    in all sets of rounds."""
    return min(ERROR, 2 * (FALSE_ALARM / cases) ** (1 / (1 + CONFIRMATIONS)))


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the options name.

    Raises:
        ValueError: a name that there is not, or no GPU.
    """
    on_gpu = torch.cuda.is_available()
    device = arguments.device or ("cuda" if on_gpu else "cpu")
    if device == "cuda" and not on_gpu:
        raise ValueError("--device is cuda, but PyTorch sees no GPU; leave it out to compare on the CPU")
    dtype = arguments.dtype or ("float16" if device == "cuda" else "float32")
    shapes = arguments.shapes or (["sd2-16", "sdxl-32"] if device == "cuda" else ["sd2-16", "sd2-32"])
    operations = arguments.only or list(OPERATIONS)
    for option, names, known in (("--only", operations, OPERATIONS), ("--shapes", shapes, SHAPES)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option} has {name!r}; known are {', '.join(known)}")
    return [
        Case(operation, SHAPES[shape], dtype, device, "triton" if device == "cuda" else "eager")
        for shape in dict.fromkeys(shapes)
        for operation in dict.fromkeys(operations)
    ]


def counting(wanted: bool | None, device: str) -> tuple[bool, str]:
    """Whether instructions are counted, and of which cases, in words.

    Raises:
        ValueError: they are wanted, but nothing here counts them.
    """
    if wanted is False or device != "cpu":
        return False, "instructions are not counted"
    needed = ("valgrind", "callgrind_control", "callgrind_annotate")
    if torch._C._valgrind_supported_platform() and all(map(shutil.which, needed)):
        return True, f"instructions by valgrind, {'of all cases' if wanted else 'where the time changed'}"
    if wanted:
        raise ValueError("--instructions: valgrind is not installed; install it")
    return False, "instructions are not counted: valgrind is not installed"


class Comparison:
    """Compares cases in a pair of processes that it starts anew where a change has to be confirmed."""

    def __init__(self, base: Path, arguments: argparse.Namespace, error: float, count: bool) -> None:
        """`error`: that one case's interval misses the truth; `count`: as `counting` says."""
        self.base, self.arguments, self.error, self.count = base, arguments, error, count
        self.pair = Pair(base, ROOT)

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self.pair.__exit__()

    def row(self, case: Case, tick: Callable[[], Any] = lambda: None) -> Row:
        """What was measured of a case, or why it could not be."""
        row = row_of(case.operation, case.layer, case.dtype) | {"impl": case.impl}
        try:
            return row | (self._built(case) or self._measured(case, tick))
        except Failure as failure:
            return row | {"failed": {failure.side: str(failure)}}

    def _built(self, case: Case) -> Row:
        failed = self.pair.build(case)
        return {"failed": failed} if failed else {}

    def _measured(self, case: Case, tick: Callable[[], Any]) -> Row:
        calls, threshold = self.pair.calls(), self.arguments.threshold
        sets = [self.pair.times(calls, self.arguments.rounds, tick)]
        found, waits = ([interval(x, self.error)] for x in (sets[0].ratios, sets[0].waits))
        while len(sets) <= CONFIRMATIONS and (agreed(found, threshold) or agreed(waits, threshold) == 1):
            self.pair.__exit__()
            self.pair = Pair(self.base, ROOT)
            if failed := self._built(case):
                return failed
            sets.append(self.pair.times(calls, self.arguments.rounds))
            found.append(interval(sets[-1].ratios, self.error))
            waits.append(interval(sets[-1].waits, self.error))
        counts = uncounted = None
        if self.count and (self.arguments.instructions or agreed(found, threshold)):
            try:
                counts = self.pair.counts(case, calls)
            except Failure as failure:
                uncounted = f"under valgrind: {failure}"
        ratio = counts["current"] / counts["base"] if counts else None
        return {
            "calls": calls,
            "base_ms": [1e3 * statistics.median(times.base) for times in sets],
            "current_ms": [1e3 * statistics.median(times.current) for times in sets],
            "ratio": [x._asdict() for x in found],
            "wall_ratio": [statistics.median(times.walls) for times in sets],
            "wait_ratio": [x._asdict() for x in waits],
            "instructions": counts,
            "uncounted": uncounted,
            "verdict": verdict(found, waits, ratio, threshold),
        }


def line(row: Row) -> str:
    """A row as a line of the table: the last set of rounds counts."""
    shape = f"{row['model'].replace(' ', '')} {row['shape'].split()[2]}"
    where = f"{row['op']:32} {shape:10}"
    if "failed" in row:
        return f"{where} " + "; ".join(f"{FAILED[name]}: {why}" for name, why in row["failed"].items())
    if row["verdict"] == "refused":
        return f"{where} speedup refused: {row['why']}"
    ratio, counts = row["wait_ratio" if row["verdict"] == "slower by waiting" else "ratio"][-1], row["instructions"]
    counted = f"{counts['current'] / counts['base']:.4f}" if counts else "-"
    said = row["verdict"].replace("slower", "SLOWER")
    note = f" ({row['uncounted']})" if row["uncounted"] else ""
    span = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
    return f"{where} {row['base_ms'][-1]:9.3f} {ratio['middle']:6.3f}  {span:17} {counted:>12}  {said}{note}"


def broken(row: Row) -> bool:
    """Whether only the base can run it."""
    return "current" in row.get("failed", {}) and "base" not in row["failed"]


def summary(rows: Sequence[Row]) -> int:
    """Print how many cases went which way, and return the exit status.

    Raises:
        ValueError: none of them could be compared, and not for this tree alone.
    """
    tally = Counter(row.get("verdict", "failed") for row in rows)
    print(", ".join(f"{count} {name}" for name, count in sorted(tally.items())))
    if tally["unclear"]:
        print("unclear: the interval reaches past the threshold; --rounds or a quieter machine narrows it")
    if any(map(broken, rows)):
        return 1
    if tally["failed"] == len(rows):
        ((name, why), *_) = rows[0]["failed"].items()
        raise ValueError(f"nothing could be compared: {FAILED[name]}: {why}; choose another BASE or other operations")
    return int(any(name.startswith("slower") for name in tally))
