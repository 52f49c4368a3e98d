"""The tiny pipelines themselves: each draws, in any shape, and what it draws depends on the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import tiny_transformers as tiny

PIPELINES: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in tiny.KINDS},
    "sd3 without T5": {"kind": "sd3", "t5": False},
    "sd3.5 medium": {"kind": "sd3", "dual": True},
    "sd3 img2img": {"kind": "sd3", "cls": "StableDiffusion3Img2ImgPipeline"},
    "sd3 inpaint": {"kind": "sd3", "cls": "StableDiffusion3InpaintPipeline"},
    "sd3 controlnet": {"kind": "sd3", "cls": "StableDiffusion3ControlNetPipeline"},
    "flux schnell": {"kind": "flux", "schnell": True},
    "flux img2img": {"kind": "flux", "cls": "FluxImg2ImgPipeline"},
    "flux inpaint": {"kind": "flux", "cls": "FluxInpaintPipeline"},
    "flux fill": {"kind": "flux", "cls": "FluxFillPipeline"},
    "flux controlnet": {"kind": "flux", "cls": "FluxControlNetPipeline"},
    "chroma img2img": {"kind": "chroma", "cls": "ChromaImg2ImgPipeline"},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_draw(name: str) -> None:
    options = PIPELINES[name]
    kind = options["kind"]
    pipe = tiny.pipeline(**options)
    first = tiny.call(kind, pipe)
    assert first.isfinite().all()
    assert torch.equal(tiny.call(kind, pipe), first)
    other = tiny.call(kind, pipe, prompt="a photo of a bag and an octopus")
    assert (other - first).std() > 0.01 * first.std(), "the prompt has next to no effect"
    height, width = tiny.default_size(kind)
    assert tiny.call(kind, pipe, size=(height, 2 * width)).numel() == 2 * first.numel()


def test_flux_with_a_negative_prompt() -> None:
    pipe = tiny.pipeline("flux")
    one, other = (
        tiny.call("flux", pipe, negative_prompt=text, true_cfg_scale=3.0) for text in ("the red ball", "two dog")
    )
    assert not torch.equal(one, other)
