"""Time of attention with maps on a CPU: forward, and the queries' gradient by the maps, as in a guidance pass.

    python bench/maps.py            append the figures to bench/results/cpu_maps.jsonl and print them as a table
    python -m pytest bench/maps.py  the same measurements in pytest-benchmark's own table

The forms take turns in one process, at one and at two threads; a form's time is the better of its two. `published`
keeps all probabilities for autograd, `one_hot` has the maps as columns of the values of PyTorch's
scaled_dot_product_attention. Inputs are float32 views of [B,M,H*d], as in a UNet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cpu import measure, quartiles, record
from peers import kept_maps, one_hot_maps
from tables import maps_table
from torch import Tensor

from attnctl_fast import ops


class Case(NamedTuple):
    image_tokens: int
    head_width: int
    maps: int


HEADS, TOKENS = 8, 77
CASES = [Case(m, d, maps) for m, d in ((4096, 40), (1024, 80), (256, 160)) for maps in (2, 75)]
FORMS = ("published", "one_hot", "eager")
TURNS = 4
ROUNDS = {4096: 5, 1024: 12, 256: 25}


@functools.cache
def forms(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The case's forms, which agree with float64."""
    generator = torch.Generator().manual_seed(0)
    flat = (
        torch.randn(1, n, HEADS * case.head_width, generator=generator) for n in (case.image_tokens, TOKENS, TOKENS)
    )
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in flat)
    ids = torch.arange(1, 1 + case.maps)
    one_hot = F.one_hot(ids, TOKENS).mT.float()
    grad = torch.randn(1, case.maps, case.image_tokens, generator=generator)

    def guided(
        attend: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float32
    ) -> Callable[[], Tensor]:
        leaf = q.detach().to(dtype).requires_grad_()
        fixed = k.to(dtype), v.to(dtype)
        return lambda: torch.autograd.grad(attend(leaf, *fixed)[1], leaf, grad.to(dtype))[0]

    made = {
        "published": guided(lambda q, k, v: kept_maps(q, k, v, ids)),
        "one_hot": guided(lambda q, k, v: one_hot_maps(F.scaled_dot_product_attention, q, k, v, one_hot)),
        "eager": guided(lambda q, k, v: ops.attention_with_maps(q, k, v, ids, impl="eager")),
    }
    truth = guided(lambda q, k, v: ops.attention_with_maps(q, k, v, ids, impl="reference"), torch.float64)()
    for form in made.values():
        torch.testing.assert_close(form(), truth, atol=1e-5, rtol=1e-4, check_dtype=False)
    return made


RUNS = [(case, turn, threads, form) for case in CASES for turn in range(TURNS) for threads in (1, 2) for form in FORMS]


@pytest.mark.parametrize(
    ("case", "turn", "threads", "form"), RUNS, ids=lambda x: " ".join(map(str, x)) if isinstance(x, Case) else str(x)
)
def test_guidance(benchmark: Any, case: Case, turn: int, threads: int, form: str) -> None:
    rounds = ROUNDS[case.image_tokens]
    measure(benchmark, forms(case)[form], case=case, form=form, threads=threads, rounds=rounds)


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [case._asdict() | row for case, row in quartiles(report, dict.fromkeys(CASES, FORMS))]


if __name__ == "__main__":
    record(__file__, "cpu_maps.jsonl", summary, maps_table)
