"""Time of T-SAM's loss with its gradient on a CPU.

    python bench/similarity.py            append the figures to bench/results/cpu_similarity.jsonl, print a table
    python -m pytest bench/similarity.py  the same measurements in pytest-benchmark's own table

The forms take turns in one process, at one and at two threads; a form's time is the better of its two. `published`
smooths and compares every pair of maps in a loop; `closed form` is one convolution and one product of all maps, left to
autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peers
import pytest
import torch
from cpu import measure, quartiles, record
from tables import similarity_table
from torch import Tensor

from attnctl_fast import ops

GRID = (16, 16)
TOKENS = (12, 20)
FORMS = ("published", "closed form", "eager")
TURNS = 3
ROUNDS = {"published": 3, "closed form": 60, "eager": 60}


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """Maps as attention gives them, and causal rows that sum to 1."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 77, GRID[0] * GRID[1], generator=generator).softmax(1)[:, 1 : 1 + tokens].contiguous()
    text = torch.rand(1, tokens, tokens, generator=generator).tril()
    return maps, text / text.sum(-1, keepdim=True)


def trained(function: Callable[..., Tensor], maps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    leaf = maps.detach().requires_grad_()
    loss = function(leaf, text, GRID)
    return loss, torch.autograd.grad(loss.sum(), leaf)[0]


@functools.cache
def forms(tokens: int) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """The forms, which agree with float64."""
    maps, text = inputs(tokens)
    functions: dict[str, Callable[..., Tensor]] = {
        "published": peers.published_similarity_loss,
        "closed form": peers.plain_similarity_loss,
        "eager": functools.partial(ops.similarity_loss, impl="eager"),
    }
    made: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        name: functools.partial(trained, function, maps, text) for name, function in functions.items()
    }
    truth = trained(functools.partial(ops.similarity_loss, impl="reference"), maps.double(), text.double())
    for form in made.values():
        torch.testing.assert_close(form(), truth, atol=1e-5, rtol=1e-4, check_dtype=False)
    return made


RUNS = [
    (tokens, turn, threads, form) for tokens in TOKENS for turn in range(TURNS) for threads in (1, 2) for form in FORMS
]


@pytest.mark.parametrize(("tokens", "turn", "threads", "form"), RUNS)
def test_similarity_loss(benchmark: Any, tokens: int, turn: int, threads: int, form: str) -> None:
    measure(benchmark, forms(tokens)[form], case=(tokens,), form=form, threads=threads, rounds=ROUNDS[form])


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = quartiles(report, {(tokens,): FORMS for tokens in TOKENS})
    return [{"tokens": tokens, "grid": GRID} | row for (tokens,), row in found]


if __name__ == "__main__":
    record(__file__, "cpu_similarity.jsonl", summary, similarity_table)
