"""The kernels against float64 on the device at hand, over the grid of shapes that the tests name, by the tests' rule.

The inputs, the plain PyTorch that errors are compared with and the rule are those of tests/kernel_cases.py and
tests/numerics.py; this only runs them in the order of their importance until the time is up.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from checkout import ROOT

IMAGE_TOKENS = (1, 63, 64, 256, 1024, 4096)
TOKENS = (1, 77, 120, 154, 333, 512)
WIDTHS = (40, 64, 80, 128, 160)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Check(NamedTuple):
    """One operation and one of `kernel_cases.Case`, with its gradients or without."""

    name: str
    case: Any
    backward: bool


class Outcome(NamedTuple):
    planned: int
    done: int
    failures: list[str]


def _cases() -> Any:
    """tests/kernel_cases.py, which lies outside of any package."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import kernel_cases  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "tests"))
    return kernel_cases


def checks(tiny: bool = False) -> list[Check]:
    """All checks, the most telling first: outputs and gradients where every pair of M and N meets, the losses and the
    merge, then outputs over the whole product of the sizes."""
    kernel_cases = _cases()
    attention, others = kernel_cases.ATTENTION, set(kernel_cases.OPERATIONS) - set(kernel_cases.ATTENTION)
    if tiny:
        return [Check(name, kernel_cases.Case(16, 9, 8, ids=((3, 5),), pinned=((0,),)), False) for name in attention]

    def case(m: int, n: int, d: int, dtype: torch.dtype) -> Any:
        edits = {"ids": ((0,),), "pinned": ((),)} if n == 1 else {}
        sigma = 0.25 if m == 1 else None
        # Half precision as projections give it, float32 with odd strides and NaN all around.
        return kernel_cases.Case(m, n, d, dtype=dtype, strided=dtype != torch.float32, sigma=sigma, **edits)

    pairs = [
        case(m, n, WIDTHS[(i + j) % len(WIDTHS)], DTYPES[(i + 2 * j) % len(DTYPES)])
        for i, m in enumerate(IMAGE_TOKENS)
        for j, n in enumerate(TOKENS)
    ]
    found = [Check(name, x, True) for x in pairs for name in attention]
    found += [Check(name, case(m, 77, 64, torch.float16), True) for m in IMAGE_TOKENS for name in sorted(others)]
    product = itertools.product(WIDTHS, DTYPES, TOKENS, IMAGE_TOKENS)
    return found + [Check(name, case(m, n, d, dtype), False) for d, dtype, n, m in product for name in attention]


def recorded_checks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What the checks launch, for compiling it: sizes that make other kernels, once each."""
    kernel_cases = _cases()
    sizes = {256: 64, 1024: 64, 4096: 64}, {333: 154, 512: 154}

    def launch(check: Check) -> None:
        tensors = check.case.tensors()
        if not check.backward:
            kernel_cases.run_triton(check.name, check.case, tensors)
            return
        outputs = kernel_cases.OPERATIONS[check.name].run(check.case, "reference", tensors)
        kernel_cases.triton_gradients(check.name, check.case, tensors, kernel_cases.upstream(outputs))

    small = (
        x._replace(case=replace(x.case, m=sizes[0].get(x.case.m, x.case.m), n=sizes[1].get(x.case.n, x.case.n)))
        if x.name in kernel_cases.ATTENTION
        else x
        for x in checks()
    )
    for check in dict.fromkeys(small):
        yield check.name, partial(launch, check)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
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


def run(planned: list[Check], until: float) -> Outcome:
    """Run the checks until `time.monotonic()` is `until`."""
    kernel_cases = _cases()
    failures, done = [], 0
    tensors: dict[Any, Any] = {}
    with _poisoned():
        for name, case, backward in planned:
            if time.monotonic() > until:
                break
            if case not in tensors:
                tensors = {case: case.tensors()}
            try:
                _check(kernel_cases, name, case, backward, tensors[case])
            except Exception as error:
                failures.append(f"{name}, {case}: {type(error).__name__}: {str(error)[:300]}")
            done += 1
    return Outcome(len(planned), done, failures)


def _check(kernel_cases: Any, name: str, case: Any, backward: bool, tensors: Any) -> None:
    with torch.no_grad():
        outputs = kernel_cases.run_triton(name, case, tensors)
    kernel_cases.assert_all_right(name, case, outputs, tensors)
    if not backward:
        return
    with torch.enable_grad():
        grads = kernel_cases.upstream(outputs)
        found = kernel_cases.triton_gradients(name, case, tensors, grads)
        kernel_cases.assert_all_right(name, case, found, tensors, grads)
