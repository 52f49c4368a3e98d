"""Regions on pipelines: equal to the released scheme by hand, and what they go together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny, tiny_transformers
from tests.support.regional import regional

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-9}  # in float64
CELLS = 8  # image tokens along a side


def a_mask(top: int, bottom: int, left: int, right: int, side: int = 16) -> Tensor:
    mask = torch.zeros(side, side)
    mask[top:bottom, left:right] = 1
    return mask


# Two that overlap and leave cells free.
MASKS = {"a red ball": a_mask(0, 12, 0, 10), "two dog": a_mask(4, 16, 6, 12)}


def on_grid(masks: Any) -> Tensor:
    return torch.stack([mask[::2, ::2].flatten() > 0 for mask in masks])


def draw(kind: str, pipe: Any, **options: Any) -> Tensor:
    return tiny_transformers.call(kind, pipe, **options)


def under(kind: str, pipe: Any, *methods: Any, **options: Any) -> Tensor:
    with ac.control(pipe, *methods):
        return draw(kind, pipe, **options)


def encoded(kind: str, pipe: Any, texts: list[str]) -> Tensor:
    how: dict[str, Any] = {"device": "cpu", "max_sequence_length": tiny_transformers.T5_LENGTH}
    with torch.no_grad():
        if kind == "sd3":
            return pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, **how)[0]
        return pipe.encode_prompt(texts, None, **how)[0]


def by_hand(kind: str, pipe: Any, masks: Any, rows: int, steps: int, numbers: dict[str, Any], **options: Any) -> Tensor:
    contexts = encoded(kind, pipe, list(masks))
    images = options.get("num_images_per_prompt", 1)
    numbers = {"isolated": True, "every": 1, "doubles": len(pipe.transformer.transformer_blocks), **numbers}
    given = [contexts.expand(images, -1, -1, -1), [on_grid(masks.values())] * images, numbers]
    order = "last" if kind == "sd3" else "first"
    with regional(pipe.transformer, rows, slice(rows - images, rows), *given, order, steps):
        return draw(kind, pipe, **options)


CASES = [
    ("sd3", {}, {}, {"base": 0.2}, {"steps": 2}),
    ("sd3", {"dual": True}, {"guidance_scale": 1.0}, {"isolated": False, "base": 0.3}, {"steps": 1.0}),
    ("sd3", {}, {"num_images_per_prompt": 2}, {"every": 2, "base": 0.1}, {"steps": 2}),
    ("flux", {}, {}, {"base": 0.2}, {"steps": 2}),
    ("flux", {"schnell": True}, {"num_images_per_prompt": 2}, {"every": 2, "isolated": False, "base": 0.0}, {"steps": 1.0}),
]


@pytest.mark.parametrize(("kind", "parts", "options", "numbers", "steps"), CASES)
def test_equals_the_released_scheme(
    kind: str, parts: dict[str, Any], options: dict[str, Any], numbers: dict[str, Any], steps: dict[str, Any]
) -> None:
    pipe = tiny_transformers.pipeline(kind, **parts).to(torch.float64)
    plain = draw(kind, pipe, **options)
    rows = options.get("num_images_per_prompt", 1) * (2 if kind == "sd3" and "guidance_scale" not in options else 1)
    count = steps["steps"] if isinstance(steps["steps"], int) else 100
    expected = by_hand(kind, pipe, MASKS, rows, count, numbers, **options)
    found = under(kind, pipe, ac.Regions(MASKS, **numbers, **steps), **options)
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size)
    assert torch.equal(draw(kind, pipe, **options), plain)
