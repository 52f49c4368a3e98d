"""The published and stock forms of the methods that edit attention, against ours on the shapes model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast import schedules
from attnctl_fast.shapes import LAYERS
from bench.pictures import architectures, ours, published, stock
from bench.pictures.sampling import Setting

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("AttentionRegulation", "EnergyContext", "Composition", "DenseDiffusion", "ComposableDiffusion", "NAG")
FORMS = {"published": published.attention.FORMS, "stock": stock.attention.FORMS}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return architectures.pipeline("shapes", dtype=torch.float64)


@pytest.fixture(scope="module")
def setting(pipe: Any) -> Any:
    """Two samples in double precision, where the descents of all forms take the same path."""
    size = pipe.unet.config.sample_size
    latents = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Setting(pipe, latents, steps=2, edited=2, layers=LAYERS)


@pytest.fixture(scope="module")
def drawn(setting: Any) -> Callable[[str], tuple[Tensor, list[Tensor]]]:
    """Our pictures by a method, and the losses of its descents."""

    @functools.cache
    def draw(name: str) -> tuple[Tensor, list[Tensor]]:
        with ours.regulation_losses() as losses:
            return ours.draw(name, setting).images, losses

    return draw


def state(pipe: Any) -> tuple[Any, ...]:
    """What a form may not change."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    return dict(pipe.unet.attn_processors), hooks, flags, torch.is_grad_enabled(), torch.is_anomaly_enabled()


def lowest(descents: Iterable[Tensor]) -> list[float]:
    """Of the losses `[steps,B,H]` of every descent, that of each sample, mean over them."""
    return [float(losses.mean(2).amin(0).mean()) for losses in descents]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_forms_give_our_picture(
    setting: Any, drawn: Callable[[str], tuple[Tensor, list[Tensor]]], form: str, name: str
) -> None:
    images, losses = drawn(name)
    before = state(setting.pipe)
    other = FORMS[form][name](setting)
    assert state(setting.pipe) == before
    assert other.images.shape == images.shape == (2, 3, 64, 64)
    assert torch.allclose(other.images, images, rtol=0, atol=1e-5)
    assert lowest(other.losses or ()) == pytest.approx(lowest(losses), rel=1e-5)


OTHER_OPTIONS: dict[str, Any] = {
    "AttentionRegulation": lambda x: ac.AttentionRegulation(
        ["circle", "square"],
        edit_steps=x.edited,
        strength=0.5,
        steps=5,
        step_size=50.0,
        ema=0.6,
        decay=0.7,
        quantile=0.8,
        level=0.6,
        mass=0.05,
        mass_weight=40.0,
        penalty=0.2,
        sigma=2.0,
        seed=1,
    ),
    "EnergyContext": lambda x: ac.EnergyContext(0.02, 0.01, schedule=schedules.reverse_step(1)),
    "Composition": lambda x: ac.Composition(
        [ac.Edit("a green triangle", 0.3), ac.Edit("a red square", 0.4, direction=-1)]
    ),
    "NAG": lambda x: ac.NAG("a red square", scale=8.0, tau=1.1, alpha=0.6),
    "DenseDiffusion": lambda x: ac.DenseDiffusion(
        {"a red circle": box(0, 40), "blue square": box(30, 60)},
        edit_steps=2,
        cross_strength=0.6,
        self_strength=0.5,
        decay=2.0,
        area=0.4,
    ),
    "ComposableDiffusion": lambda x: ac.ComposableDiffusion(["a blue square", "a red circle"], [1.2, -0.3]),
}


def box(top: int, bottom: int) -> Tensor:
    """Overlapping ones leave cells without a mask."""
    mask = torch.zeros(64, 64)
    mask[top:bottom, 5:50] = 1
    return mask


@pytest.mark.parametrize("name", METHODS)
def test_forms_share_our_hyperparameters(
    setting: Any,
    drawn: Callable[[str], tuple[Tensor, list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    default = drawn(name)[0][:1]
    monkeypatch.setitem(ours._MAKE, name, OTHER_OPTIONS[name])
    alone = replace(setting, latents=setting.latents[:1])
    images = ours.draw(name, alone).images
    assert (images - default).abs().max() > 1e-3
    for form in FORMS:
        assert torch.allclose(FORMS[form][name](alone).images, images, rtol=0, atol=1e-5), form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_forms_restore_after_an_error(setting: Any, monkeypatch: pytest.MonkeyPatch, form: str, name: str) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = state(setting.pipe)
    monkeypatch.setattr(setting.pipe.unet.mid_block, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        FORMS[form][name](setting)
    assert state(setting.pipe) == before


SMALL_SDXL: dict[str, Any] = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "block_out_channels": (16, 32, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
SMALL_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VAE = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def sdxl() -> Any:
    """Two text encoders, pooled embeddings, pictures that are not square and layers of several sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.CONFIGS, "sdxl", SMALL_SDXL)
        patch.setitem(architectures.TEXT_CONFIGS, "sdxl", [SMALL_TEXT, {**SMALL_TEXT, "projection_dim": 16}])
        patch.setattr(architectures, "VAE_CONFIG", {**architectures.VAE_CONFIG, **SMALL_VAE})
        pipe = architectures.pipeline("sdxl", dtype=torch.float64)
    latents = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Setting(pipe, latents, steps=2, edited=1)


@pytest.mark.parametrize("name", METHODS)
def test_forms_on_sdxl(sdxl: Any, name: str) -> None:
    images = ours.draw(name, sdxl).images
    for form in FORMS:
        assert torch.allclose(FORMS[form][name](sdxl).images, images, rtol=0, atol=1e-5), form
