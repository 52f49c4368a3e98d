"""The published, stock and diffusers forms of every method draw what ours draws, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast import schedules
from attnctl_fast.attach.call import Call
from attnctl_fast.shapes import LAYERS
from bench.pictures import architectures, diffusers_forms, guidance_loop, ours, published, stock
from bench.pictures.sampling import PROMPT, Setting, sample
from tests.support import guided
from tests.support.architectures import small

FORMS = {"published": published.FORMS, "stock": stock.FORMS}
EVERY = [(form, name) for form in FORMS for name in ours.METHODS]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def setting() -> Setting:
    """Two samples in double precision, where the descents of all forms take the same path."""
    pipe = architectures.pipeline("shapes", dtype=torch.float64)
    size = pipe.unet.config.sample_size
    latents = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Setting(pipe, latents, steps=2, edited=2, layers=LAYERS)


@pytest.fixture(scope="module")
def drawn(setting: Setting) -> Callable[[str], tuple[Tensor, list[Tensor]]]:
    """Our pictures by a method, and the losses of its descents."""

    @functools.cache
    def draw(name: str) -> tuple[Tensor, list[Tensor]]:
        with ours.regulation_losses() as losses:
            return ours.draw(name, setting).images, losses

    return draw


def state(pipe: Any) -> tuple[Any, ...]:
    """What a form may not change."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in pipe.unet.parameters()]
    modes = torch.is_grad_enabled(), torch.is_anomaly_enabled(), pipe.text_encoder.config._attn_implementation
    return dict(pipe.unet.attn_processors), hooks, flags, modes


def lowest(descents: Iterable[Tensor]) -> list[float]:
    """Of the losses `[steps,B,H]` of every descent, that of each sample, mean over them."""
    return [float(losses.mean(2).amin(0).mean()) for losses in descents]


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize(("form", "name"), EVERY)
def test_forms_give_our_picture(
    setting: Setting, drawn: Callable[[str], tuple[Tensor, list[Tensor]]], form: str, name: str
) -> None:
    images, losses = drawn(name)
    setting.pipe.unet.conv_in.weight.requires_grad_(False)
    before = state(setting.pipe)
    other = FORMS[form][name](setting)
    assert state(setting.pipe) == before
    assert images.shape == (2, 3, 64, 64) and apart(other.images, images) < 1e-5
    assert lowest(other.losses or ()) == pytest.approx(lowest(losses), rel=1e-5)


def box(top: int, bottom: int) -> Tensor:
    """Overlapping ones leave cells without a mask."""
    mask = torch.zeros(64, 64)
    mask[top:bottom, 5:50] = 1
    return mask


OTHERWISE: dict[str, dict[str, Any]] = {
    "AttentionRegulation": {
        **{"strength": 0.5, "steps": 5, "step_size": 50.0, "ema": 0.6, "decay": 0.7, "quantile": 0.8, "level": 0.6},
        **{"mass": 0.05, "mass_weight": 40.0, "penalty": 0.2, "sigma": 2.0, "seed": 1},
    },
    "EnergyContext": {"gamma_attn": 0.02, "gamma_norm": 0.01, "schedule": schedules.reverse_step(1)},
    "Composition": {"edits": [ac.Edit("a green triangle", 0.3), ac.Edit("a red square", 0.4, direction=-1)]},
    "NAG": {"negative_prompt": "a red square", "scale": 8.0, "tau": 1.1, "alpha": 0.6},
    "DenseDiffusion": {
        **{"masks": {"a red circle": box(0, 40), "blue square": box(30, 60)}, "area": 0.4},
        **{"cross_strength": 0.6, "self_strength": 0.5, "decay": 2.0},
    },
    "ComposableDiffusion": {"prompts": ["a blue square", "a red circle"], "weights": [1.2, -0.3]},
    "AttendAndExcite": {"sharpness": 30.0, "kernel_size": 5},
    "TSAM": {"scale": 1.0},
    "SynGen": {"scale": 5.0},
    "CONFORM": {"temperature": 0.2, "sigma": 1.0},
    "FOCUS": {"strength": 3.0, "sigma": 1.0},
}


def changed(patch: pytest.MonkeyPatch, name: str, **options: Any) -> None:
    """Have our method, and so every form of it, take other options."""
    made = ours._MAKE[name]
    patch.setitem(ours._MAKE, name, lambda x: dataclasses.replace(made(x), **options))


@pytest.mark.parametrize("name", ours.METHODS)
def test_forms_share_our_hyperparameters(
    setting: Setting,
    drawn: Callable[[str], tuple[Tensor, list[Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    default = drawn(name)[0][:1]
    changed(monkeypatch, name, **OTHERWISE[name])
    alone = dataclasses.replace(setting, latents=setting.latents[:1])
    images = ours.draw(name, alone).images
    assert apart(images, default) > 1e-3
    for form, forms in FORMS.items():
        assert apart(forms[name](alone).images, images) < 1e-5, form


@pytest.mark.parametrize(("form", "name"), EVERY)
def test_forms_restore_after_an_error(setting: Setting, monkeypatch: pytest.MonkeyPatch, form: str, name: str) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = state(setting.pipe)
    monkeypatch.setattr(setting.pipe.unet.mid_block, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        FORMS[form][name](setting)
    assert state(setting.pipe) == before


@pytest.mark.parametrize("form", ["published", "stock", "diffusers"])
def test_a_failure_after_the_steps_restores(setting: Setting, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(setting.pipe.vae, "decode", fail)
    before = state(setting.pipe)
    with pytest.raises(RuntimeError, match="no picture"):
        {**FORMS, "diffusers": diffusers_forms.FORMS}[form]["AttendAndExcite"](setting)
    assert state(setting.pipe) == before


def test_diffusers(setting: Setting, drawn: Callable[[str], tuple[Tensor, list[Tensor]]]) -> None:
    assert diffusers_forms.objection(setting) is None
    before = state(setting.pipe)
    images = diffusers_forms.FORMS["AttendAndExcite"](setting).images
    assert apart(images, drawn("AttendAndExcite")[0]) < 1e-5
    assert state(setting.pipe) == before

    some = dataclasses.replace(setting, layers=("up_blocks.2",))
    with pytest.raises(ValueError, match=r"layers is \('up_blocks.2',\), but diffusers reads all .* of 16x16"):
        diffusers_forms.FORMS["AttendAndExcite"](some)


def test_words_of_several_tokens(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their largest divergence is what the published form takes; the stock form says that it cannot."""
    changed(monkeypatch, "SynGen", pairs=[("red circle", "and"), ("blue", "square")])
    images = ours.draw("SynGen", setting).images
    assert apart(published.FORMS["SynGen"](setting).images, images) < 1e-5
    with pytest.raises(ValueError, match="has a word of several tokens"):
        stock.FORMS["SynGen"](setting)


@pytest.fixture(scope="module")
def sdxl() -> Setting:
    """Two text encoders, pooled embeddings, pictures that are not square and layers of several sizes."""
    with small():
        pipe = architectures.pipeline("sdxl", dtype=torch.float64)
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Setting(pipe, latents, steps=2, edited=1)


@pytest.mark.parametrize("name", ours.METHODS)
def test_forms_on_sdxl(sdxl: Setting, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Random weights attend evenly, so that only long steps are seen.
    guides = name in ("AttendAndExcite", "TSAM", "SynGen", "CONFORM")
    if guides:
        changed(monkeypatch, name, scale=1e5)
    images = ours.draw(name, sdxl).images
    assert not guides or apart(sample(sdxl), images) > 1e-3
    for form, forms in FORMS.items():
        assert apart(forms[name](sdxl).images, images) < 1e-5, form
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has two text encoders"):
        diffusers_forms.FORMS["AttendAndExcite"](sdxl)


@pytest.mark.parametrize("padded", [True, False])
def test_text_similarity(padded: bool, sdxl: Setting) -> None:
    method = ours.method("TSAM", sdxl)
    prompts = guided.prompts(sdxl.pipe, [PROMPT], length=sdxl.pipe.tokenizer.model_max_length)
    expected = method.prepare(Call(sdxl.pipe, prompts, 1, lambda _: torch.empty(0))).text[0]
    found = guidance_loop.text_similarity(sdxl, method.gamma, padded=padded)
    torch.testing.assert_close(found.to(expected.dtype), expected)
    assert guidance_loop.text_similarity(sdxl, 1.0, padded=padded).sub(found).abs().max() > 0.01
