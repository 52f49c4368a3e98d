"""NAG on pipelines: equal to the released scheme by hand, with the batch doubled, and what it goes together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny, tiny_transformers
from tests.support.doubled import doubled
from tests.support.marks import full
from tests.support.pipelines import KINDS, LAYERS, call, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NUMBERS = {"scale": 6.0, "tau": 1.5, "alpha": 0.6, "norm": 2}
AWAY = "a red ball"
EXACT = {"rtol": 0, "atol": 1e-9}  # in float64
# Kinds of pipelines, with the model's cells to a side and where the text stands.
UNETS = [("sd1", {}), ("sd1", {"guidance_scale": 1.0}), ("sdxl", {}), ("sd2", {"guidance_scale": 1.0})]
TRANSFORMERS = [
    ("sd3", {}, {}),
    ("sd3", {"dual": True}, {"guidance_scale": 1.0}),
    ("flux", {}, {}),
    ("flux", {"schnell": True}, {"num_images_per_prompt": 2}),
    ("flux", {}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    ("pixart_sigma", {}, {}),
    ("sana", {}, {}),
]


def encoded(kind: str, pipe: Any) -> dict[str, Tensor]:
    """The arguments of the model for the negative prompt, by the pipeline's own encoders."""
    with torch.no_grad():
        if kind in ("sd1", "sd2"):
            return {"encoder_hidden_states": pipe.encode_prompt(AWAY, "cpu", 1, False)[0]}
        if kind == "sdxl":
            found = pipe.encode_prompt(AWAY, device="cpu", do_classifier_free_guidance=False)
            return {"encoder_hidden_states": found[0]}
        how: dict[str, Any] = {"device": "cpu", "max_sequence_length": tiny_transformers.T5_LENGTH}
        if kind == "sd3":
            found = pipe.encode_prompt(AWAY, None, None, do_classifier_free_guidance=False, **how)
            return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
        if kind == "flux":
            found = pipe.encode_prompt(AWAY, None, **how)
            return {"encoder_hidden_states": found[0], "pooled_projections": found[1]}
        more = {"complex_human_instruction": tiny_transformers.tiny_text.INSTRUCTION} if kind == "sana" else {}
        found = pipe.encode_prompt(AWAY, do_classifier_free_guidance=False, clean_caption=False, **how, **more)
        return {"encoder_hidden_states": found[0], "encoder_attention_mask": found[1]}


def by_hand(kind: str, pipe: Any, draw: Any, guided: bool, images: int = 1, numbers: Any = NUMBERS) -> Tensor:
    model = getattr(pipe, "unet", None) or pipe.transformer
    negative = {name: x.repeat_interleave(images, 0) for name, x in encoded(kind, pipe).items()}
    order = {"sd3": "last", "flux": "first"}.get(kind, "")
    rows = images * (2 if guided else 1)
    tokens = negative["encoder_hidden_states"].shape[1]
    with doubled(model, rows, slice(rows - images, rows), tokens, negative, numbers, order):
        return draw()


@pytest.mark.parametrize(("kind", "options"), UNETS)
def test_equals_the_released_scheme_on_a_unet(kind: str, options: dict[str, Any]) -> None:
    pipe = tiny.pipeline(**KINDS[kind][0]).to(torch.float64)
    expected = by_hand(kind, pipe, lambda: call(pipe, **options), options.get("guidance_scale", 7.5) > 1)
    before, plain = snapshot(pipe), call(pipe, **options)
    with ac.control(pipe, ac.NAG(AWAY, **NUMBERS)):
        found = call(pipe, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - plain).abs().max() > 1e-2
    assert snapshot(pipe) == before and torch.equal(call(pipe, **options), plain)


def draw(kind: str, pipe: Any, **options: Any) -> Tensor:
    return tiny_transformers.call(kind, pipe, **options)


@pytest.mark.parametrize(("kind", "parts", "options"), TRANSFORMERS)
def test_equals_the_released_scheme_on_a_transformer(kind: str, parts: dict[str, Any], options: dict[str, Any]) -> None:
    pipe = tiny_transformers.pipeline(kind, **parts)
    guided = kind != "flux" and options.get("guidance_scale", 2.0) > 1
    images = options.get("num_images_per_prompt", 1)
    expected = by_hand(kind, pipe, lambda: draw(kind, pipe, **options), guided, images)
    before, plain = set(_attributes(pipe)), draw(kind, pipe, **options)
    with ac.control(pipe, ac.NAG(AWAY, **NUMBERS)):
        found = draw(kind, pipe, **options)
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * size)
    assert set(_attributes(pipe)) == before and torch.equal(draw(kind, pipe, **options), plain)


def _attributes(pipe: Any) -> list[tuple[str, str]]:
    return [(name, key) for name, module in pipe.transformer.named_modules() for key in vars(module)]
