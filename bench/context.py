"""Time of the operations of energy-based cross attention on a CPU.

    python bench/context.py            append the figures to bench/results/cpu_context.jsonl and print them as a table
    python -m pytest bench/context.py  the same measurements in pytest-benchmark's own table

The forms take turns in one process, at one and at two threads; a form's time is the better of its two. `sdpa` is
PyTorch's scaled_dot_product_attention: twice for the context gradient, once per context for the composition.
`published` has the logits in memory, and a transposed copy of them. Inputs are float32 views of [B,M,H*d], as in a
UNet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cpu import measure, quartiles, record
from peers import published_context_gradient, sdpa_each
from tables import context_table
from torch import Tensor

from attnctl_fast import ops


class Case(NamedTuple):
    operation: str
    model: str
    heads: int
    image_tokens: int
    head_width: int


GRADIENT, COMPOSITION = "attention_with_context_gradient", "composed_attention"
LAYERS = [
    *(("SD 1.5", 8, *sizes) for sizes in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    *(("SD 2", *sizes, 64) for sizes in ((5, 4096), (10, 1024), (20, 256), (20, 64))),
    *(("SDXL", *sizes, 64) for sizes in ((10, 4096), (20, 1024))),
]
CASES = [Case(GRADIENT, *layer) for layer in LAYERS] + [Case(COMPOSITION, *layer) for layer in LAYERS[:3]]
FORMS = {GRADIENT: ("sdpa", "published", "eager"), COMPOSITION: ("sdpa", "eager")}
BATCH, TOKENS, WEIGHTS = 2, 77, (1.0, 0.5)
TURNS = 4
ROUNDS = {4096: 5, 1024: 15, 256: 30, 64: 60}


def inputs(case: Case) -> list[Tensor]:
    """q, and keys and values of two contexts."""
    generator = torch.Generator().manual_seed(0)
    flat = (
        torch.randn(BATCH, n, case.heads * case.head_width, generator=generator)
        for n in (case.image_tokens, *[TOKENS] * 4)
    )
    return [x.unflatten(-1, (case.heads, -1)).transpose(1, 2) for x in flat]


@functools.cache
def forms(case: Case) -> dict[str, Callable[[], Any]]:
    """The case's forms, which agree with float64."""
    q, k, v, other_k, other_v = inputs(case)
    attend = F.scaled_dot_product_attention
    made: dict[str, Callable[[], Any]]
    if case.operation == GRADIENT:
        made = {
            "sdpa": lambda: (attend(q, k, v), attend(k, q, q)),
            "published": lambda: published_context_gradient(q, k, v),
            "eager": lambda: ops.attention_with_context_gradient(q, k, v, impl="eager"),
        }
        truth: Any = published_context_gradient(q.double(), k.double(), v.double())
    else:
        ks, vs = [k, other_k], [v, other_v]
        made = {
            "sdpa": lambda: sdpa_each("flash", q, ks, vs, WEIGHTS),
            "eager": lambda: ops.composed_attention(q, ks, vs, WEIGHTS, impl="eager"),
        }
        wide_ks, wide_vs = ([x.double() for x in group] for group in (ks, vs))
        truth = ops.composed_attention(q.double(), wide_ks, wide_vs, WEIGHTS, impl="reference")
    for form in made.values():
        torch.testing.assert_close(form(), truth, atol=1e-5, rtol=1e-5, check_dtype=False)
    return made


RUNS = [
    (case, turn, threads, form)
    for case in CASES
    for turn in range(TURNS)
    for threads in (1, 2)
    for form in FORMS[case.operation]
]


@pytest.mark.parametrize(
    ("case", "turn", "threads", "form"), RUNS, ids=lambda x: " ".join(map(str, x)) if isinstance(x, Case) else str(x)
)
def test_context_operation(benchmark: Any, case: Case, turn: int, threads: int, form: str) -> None:
    rounds = ROUNDS[case.image_tokens]
    measure(benchmark, forms(case)[form], case=case, form=form, threads=threads, rounds=rounds)


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = quartiles(report, {case: FORMS[case.operation] for case in CASES})
    return [case._asdict() | row for case, row in found]


if __name__ == "__main__":
    record(__file__, "cpu_context.jsonl", summary, context_table)
