"""TACA on pipelines: equal to full matrices by hand, in the first steps, of all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny, tiny_transformers
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.pipelines import snapshot
from tests.support.recomputed import attending_by_hand, layout_of

T5, SIDE = tiny_transformers.T5_LENGTH, tiny_transformers.SIDE // 2
TEXT = {"sd3": 16 + T5, "flux": T5, "chroma": T5, "auraflow": T5, "flux2": T5}


def draw(kind: str, pipe: Any, *methods: Any) -> Tensor:
    if not methods:
        return tiny_transformers.call(kind, pipe)
    with ac.control(pipe, *methods):
        return tiny_transformers.call(kind, pipe)


def by_hand(kind: str, pipe: Any, factor: float, steps: int = 9, raised: float = 0.0) -> Tensor:
    """With the logits of image rows and text columns multiplied. raised: the prompt's rows have more of token 3."""
    layout, counts = layout_of(kind, 1, TEXT[kind], SIDE * SIDE, kind == "sd3"), {}

    def sharper(name: str, logits: Tensor) -> Tensor | None:
        if logits.shape[-1] <= SIDE * SIDE:
            return None
        counts[name] = counts.get(name, 0) + 1
        if counts[name] > steps:
            return None
        logits = logits.clone()
        logits[:, :, layout.image, layout.text] *= factor
        logits[layout.rows, :, layout.image, layout.text.start + 3] += raised
        return logits.softmax(-1)

    with attending_by_hand(pipe.transformer, sharper):
        return draw(kind, pipe)


@pytest.mark.parametrize(("kind", "steps"), [("sd3", 9), ("flux", 1), full("flux", 9), full("sd3", 1), ("auraflow", 9)])
def test_equals_full_matrices(kind: str, steps: int) -> None:
    pipe = tiny_transformers.pipeline(kind).to(torch.float64)
    plain, before = draw(kind, pipe), snapshot(pipe)
    expected = by_hand(kind, pipe, 1.5, steps)
    found = draw(kind, pipe, ac.TACA(1.5, steps=steps))
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size)
    assert snapshot(pipe) == before and torch.equal(draw(kind, pipe), plain)
    assert torch.equal(draw(kind, pipe, ac.TACA(1.5, steps=0.0)), plain)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_an_edit_and_maps_see_the_sharper_logits(kind: str) -> None:
    from tests.attach.test_transformers import Raised

    pipe = tiny_transformers.pipeline(kind)
    expected = by_hand(kind, pipe, 1.5, raised=2.0)
    edited = draw(kind, pipe, ac.TACA(1.5, steps=9), Raised([3]))
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    shown = []
    for methods in ((ac.TACA(1.5, steps=9),), (ac.TACA(1e-6, steps=9),)):
        with ac.control(pipe, *methods), ac.capture(pipe) as maps:
            watched = tiny_transformers.call(kind, pipe)
        torch.testing.assert_close(watched, draw(kind, pipe, *methods), rtol=0, atol=1e-4 * float(watched.abs().max()))
        shown.append(next(iter(maps.values())))
    # Without any difference between words.
    assert shown[1].std(2).max() < 1e-6 < shown[0].std(2).max()


def test_beside_nag() -> None:
    """Both texts' columns are sharper: with a share of nothing, or the prompt against itself, it is TACA alone."""
    pipe = tiny_transformers.pipeline("flux")
    taca = ac.TACA(1.5, steps=9)
    alone = draw("flux", pipe, taca)
    for nag in (ac.NAG("a dog", alpha=0.0), ac.NAG(tiny_transformers.PROMPT)):
        found = draw("flux", pipe, nag, taca)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("kind", ["sd3", full("flux")])
def test_one_graph(kind: str) -> None:
    pipe, taca = tiny_transformers.pipeline(kind), ac.TACA(1.5, steps=1)
    expected = draw(kind, pipe, taca)
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            found = draw(kind, pipe, taca)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert len(graphs) == 1


def test_bad_input() -> None:
    for given, message in (
        ({"factor": 0.0}, "factor is 0.0; it must be a number above 0"),
        ({"steps": -1}, "steps is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.TACA(**given)
    pipe = tiny.pipeline()
    with pytest.raises(ValueError, match="has a UNet2DConditionModel, but TACA is for joint attention"):
        ac.enable(pipe, ac.TACA())
