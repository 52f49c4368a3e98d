"""The kernels against float64 on the device at hand, at shapes that between them have every size, by the tests' rule.

    python -m bench.gpu.correctness    launch ten small cases and compare nothing: what compute-sanitizer is to look at

The plain PyTorch that errors are compared with and the rule are those of tests/support/kernel_cases.py. The whole
product of the sizes is the kernel tests' (`pytest -m full`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench.ops.base import trained, upstream
from bench.ops.inputs import Case, Tensors
from bench.ops.registry import ATTENTION, DECLARED, JUDGED

IMAGE_TOKENS = (1, 63, 64, 256, 1024, 4096)
TOKENS = (1, 77, 120, 333)
WIDTHS = (40, 64, 80, 160)
HALF, BFLOAT, SINGLE = DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# As many as compute-sanitizer gets through in a minute.
SANITIZED = 10
# Before the name of a case that is launched for compute-sanitizer.
CASE = "case "


class Check(NamedTuple):
    """One operation and its inputs, with its gradients or without."""

    name: str
    case: Case
    backward: bool

    @property
    def row(self) -> dict[str, Any]:
        return {"kind": "check", "op": self.name, "case": str(self.case), "backward": self.backward}


def _case(m: int, n: int = 77, d: int = 64, dtype: torch.dtype = HALF) -> Case:
    """Make inputs: half precision as projections give it, float32 with odd strides and NaN all around."""
    edits: dict[str, Any] = {"ids": ((0,),), "pinned": ((),)} if n == 1 else {}
    return Case(m, n, d, dtype=dtype, strided=dtype != SINGLE, sigma=0.25 if m == 1 else None, **edits)


@functools.cache
def first_checks(tiny: bool = False) -> list[Check]:
    """List the gradients of every operation at every grid, the smallest first; then its output in the other dtypes."""
    if tiny:
        small = Case(16, 9, 8, ids=((3, 5),), pinned=((0,),))
        return [Check(name, small, False) for name in ATTENTION]
    found = [Check(name, _case(m), True) for m in IMAGE_TOKENS for name in JUDGED]
    return found + [Check(x, _case(63, dtype=t), False) for x in JUDGED for t in (BFLOAT, SINGLE)]


@functools.cache
def further_checks(tiny: bool = False) -> list[Check]:
    """List the gradients of attention at every other length of the text, width and dtype."""
    if tiny:
        return []
    places = [_case(63, n=n) for n in TOKENS if n != 77]
    places += [_case(64, d=d) for d in WIDTHS if d != 64]
    places += [_case(63, dtype=BFLOAT), _case(63, dtype=SINGLE), _case(64, d=160, dtype=SINGLE)]
    return [Check(name, case, True) for case in places for name in ATTENTION]


@functools.lru_cache(maxsize=1)
def _tensors(case: Case) -> Tensors:
    return case.tensors()


def launch(check: Check) -> None:
    """Launch what a check launches."""
    operation, t = DECLARED[check.name], _tensors(check.case)
    if not check.backward:
        operation.run(check.case, "triton", t)
        return
    grads = upstream(operation.run(check.case, "reference", t))
    leaves = [x for x in operation.leaves if x in t]
    if leaves:
        trained(operation, t, leaves, grads, lambda t: operation.bind(check.case, t, "triton"))()


def run(check: Check) -> None:
    """Raise AssertionError unless outputs, and gradients where they are asked for, are right."""
    kernel_cases: Any = importlib.import_module("tests.support.kernel_cases")
    with _poisoned():
        kernel_cases.check(check.name, check.case, check.backward)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def sanitized() -> list[Check]:
    """List some of the first checks, of as many operations, at a grid that fills no tile."""
    found = [check for check in first_checks() if check.case.m == 63 and check.backward]
    return found[:SANITIZED]


def main() -> None:
    for check in sanitized():
        print(CASE + check.name, flush=True)
        launch(check)
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
