"""Runs the numerical tests as other processors would: by their instructions, with one thread and two, on other inputs.

    python tests/processors.py             every processor, and fifty seeds of the row rule: an hour or two
    python tests/processors.py --sample    a minute or two: what CI runs

PyTorch, oneDNN and MKL are told which instructions to use, so what this processor lacks is left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

TESTS = Path(__file__).resolve().parent
# Instructions as PyTorch, oneDNN and MKL call them, the least first.
INSTRUCTIONS = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
THREADS = (1, 2)
SEEDS = 50
# The row rule, and what of pipelines is compared number by number.
ROWS = tuple(f"ops/test_{x}.py" for x in ("attention", "context_update", "maps", "region_attention", "similarity"))
NUMERICAL = (
    *ROWS,
    *("support/test_numerics.py", "ops/test_regulation.py", "kernels/test_operations.py", "kernels/test_properties.py"),
    *("attach/test_guidance.py", "attach/test_contexts.py", "attach/test_kinds.py"),
    *(f"methods/test_{x}.py" for x in ("guidance_methods", "dense_diffusion", "attend_and_excite", "tsam")),
)
# Where five tests failed on the first processor that was not the one they were written on.
SAMPLE = (
    "ops/test_context_update.py::test_attention_with_context_gradient",
    "ops/test_attention.py::test_attention_gradients",
    "ops/test_similarity.py::test_eager_is_as_exact_as_plain_pytorch",
    "methods/test_guidance_methods.py::test_a_batch_equals_each_alone",
    "attach/test_guidance.py::test_half_precision",
)
# Without Triton's interpreter, which takes minutes.
BRIEF = ("-k", "not triton")
EAGER = ("-k", "eager")


class Run(NamedTuple):
    """One pytest: instructions, threads, seed of the inputs, arguments."""

    instructions: str
    threads: int
    seed: int
    arguments: Sequence[str]

    def __str__(self) -> str:
        return f"{self.instructions:8} {self.threads} thread{'s' * (self.threads > 1):1} seed {self.seed:2}"


def available() -> list[str]:
    """Return the instructions of `INSTRUCTIONS` that this processor has, the most first."""
    names = list(INSTRUCTIONS)
    own = torch.backends.cpu.get_cpu_capability().lower()
    return names[names.index(own) :: -1] if own in names else names[:1]


def runs(sample: bool) -> Iterator[Run]:
    processors = list(itertools.product(available(), THREADS))
    if sample:
        # One thread and the most instructions are what `make test` has run already.
        for seed, (instructions, threads) in enumerate(zip(reversed(available()), THREADS, strict=False), 1):
            yield Run(instructions, threads, seed, (*SAMPLE, *BRIEF))
        return
    for seed, (instructions, threads) in enumerate(processors):
        yield Run(instructions, threads, seed, NUMERICAL)
    for seed, (instructions, threads) in zip(range(1, SEEDS + 1), itertools.cycle(processors), strict=False):
        yield Run(instructions, threads, seed, (*ROWS, *EAGER))


def execute(run: Run) -> tuple[Run, float, int, str]:
    """Return the run, its seconds, pytest's status and output."""
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": run.instructions,
        **INSTRUCTIONS[run.instructions],
        "ATTNCTL_TEST_SEED": str(run.seed),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(run.threads)),
    }
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--color=no", *run.arguments]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    return run, time.monotonic() - start, done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true")
    todo = list(runs(parser.parse_args().sample))
    failed = 0
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // max(THREADS))) as pool:
        for run, seconds, status, output in pool.map(execute, todo):
            print(f"{run}: {output.strip().splitlines()[-1]} ({seconds:.0f} s)", flush=True)
            if status:
                failed += 1
                print(output, flush=True)
    print(f"{len(todo) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
