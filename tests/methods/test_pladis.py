"""PLADIS on pipelines: equal to sorted rows by hand, in all rows of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast import reference
from tests.support import tiny, tiny_transformers
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.pipelines import KINDS, call, snapshot
from tests.support.recomputed import attending_by_hand

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def built(kind: str) -> Any:
    made = tiny.pipeline(**KINDS[kind][0]) if kind in KINDS else tiny_transformers.pipeline(kind)
    return made.to(torch.float64)


def draw(kind: str, pipe: Any, *methods: Any, **options: Any) -> Tensor:
    if methods:
        with ac.control(pipe, *methods):
            return draw(kind, pipe, **options)
    return call(pipe, **options) if kind in KINDS else tiny_transformers.call(kind, pipe, **options)


def sparse(logits: Tensor, scale: float) -> Tensor:
    dense = logits.softmax(-1)
    return dense + scale * (reference.entmax(logits) - dense)


def by_hand(kind: str, pipe: Any, scale: float, steps: int = 9, **options: Any) -> Tensor:
    counts: dict[str, int] = {}

    def edited(name: str, logits: Tensor) -> Tensor | None:
        counts[name] = counts.get(name, 0) + 1
        return sparse(logits, scale) if name.endswith("attn2") and counts[name] <= steps else None

    with attending_by_hand(pipe.unet if kind in KINDS else pipe.transformer, edited):
        return draw(kind, pipe, **options)


CASES = [
    ("sd1", {}, 9),
    ("sdxl", {"guidance_scale": 1.0}, 2),
    ("pixart_sigma", {}, 9),
    full("sana", {}, 9),
    full("hunyuan", {}, 9),
    full("ltx", {}, 9),
]


@pytest.mark.parametrize(("kind", "options", "steps"), CASES)
def test_equals_sorted_rows(kind: str, options: dict[str, Any], steps: int) -> None:
    pipe = built(kind)
    plain, before = draw(kind, pipe, **options), snapshot(pipe)
    expected = by_hand(kind, pipe, 2.0, steps, **options)
    found = draw(kind, pipe, ac.PLADIS(2.0, steps=steps), **options)
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size)
    assert snapshot(pipe) == before and torch.equal(draw(kind, pipe, **options), plain)
    assert torch.equal(draw(kind, pipe, ac.PLADIS(0.0), **options), plain)


def test_beside_other_methods() -> None:
    """Composition, NAG and maps see the sparse attention; edits of the same layers are refused."""
    pipe = built("sd1")
    alone = draw("sd1", pipe, ac.PLADIS())
    for other in (ac.NAG("a dog", alpha=0.0), ac.Composition([ac.Edit("a dog", 0.0)])):
        torch.testing.assert_close(draw("sd1", pipe, other, ac.PLADIS()), alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(draw("sd1", pipe, ac.PLADIS(), other), alone, rtol=0, atol=1e-9)
    with ac.control(pipe, ac.PLADIS(1.0)), ac.capture(pipe) as maps:
        call(pipe)
    found = torch.cat([one.flatten() for one in maps.values()])
    assert (found == 0).float().mean() > 0.01 and found.min() >= 0
    with pytest.raises(ValueError, match="two of the methods edit"):
        ac.enable(pipe, ac.PLADIS(), ac.AttentionRegulation(["bag"]))


@pytest.mark.full
def test_one_graph() -> None:
    pipe = built("sd1")
    pladis = ac.PLADIS(steps=1)
    expected = draw("sd1", pipe, pladis)
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            torch.testing.assert_close(draw("sd1", pipe, pladis), expected, rtol=0, atol=1e-6)
    assert len(graphs) == 1


def test_bad_input() -> None:
    for given, message in (
        ({"scale": -1.0}, "scale is -1.0; it must be a number at least 0"),
        ({"steps": -1}, "steps"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.PLADIS(**given)
    pipe = tiny_transformers.pipeline("flux")
    with pytest.raises(ValueError, match="has a FluxTransformer2DModel, but PLADIS is for layers"):
        ac.enable(pipe, ac.PLADIS())
