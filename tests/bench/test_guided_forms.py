"""The published, stock and diffusers forms of latent guidance draw what our methods draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("AttendAndExcite", "TSAM", "SynGen", "CONFORM")
OTHERWISE: dict[str, dict[str, Any]] = {
    "AttendAndExcite": {"sharpness": 30.0, "kernel_size": 5},
    "TSAM": {"scale": 1.0},
    "SynGen": {"scale": 5.0},
    "CONFORM": {"temperature": 0.2, "sigma": 1.0},
}
SDXL: dict[str, Any] = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": (1, 2, 2),
    "block_out_channels": (8, 16, 16),
    "transformer_layers_per_block": (1, 1, 2),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "projection_class_embeddings_input_dim": 6 * 256 + 16,
}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def pipe() -> Any:
    from attnctl_fast.shapes import load_pipeline

    loaded = load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def setting(pipe: Any, steps: int, edited: int, batch: int = 1) -> Any:
    from attnctl_fast.shapes import LAYERS
    from bench.pictures.sampling import Setting

    latents = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    return Setting(pipe, latents, steps, edited, layers=LAYERS)


def forms(name: str) -> dict[str, Any]:
    from bench.pictures.published import guidance as published_guidance
    from bench.pictures.stock import guidance as stock_guidance

    return {"published": published_guidance.FORMS[name], "stock": stock_guidance.FORMS[name]}


def state(pipe: Any) -> Any:
    """What a form may change for a while."""
    processors = {key: id(processor) for key, processor in pipe.unet.attn_processors.items()}
    required = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    return processors, required, pipe.text_encoder.config._attn_implementation


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_same_pictures_and_nothing_left_behind(name: str, pipe: Any) -> None:
    from bench.pictures import ours
    from bench.pictures.sampling import sample

    task = setting(pipe, steps=2, edited=2, batch=2)
    pipe.unet.conv_in.weight.requires_grad_(False)
    before, expected = state(pipe), ours.draw(name, task).images
    for form, run in forms(name).items():
        assert apart(run(task).images, expected) < 1e-3, form
        assert state(pipe) == before, form
    assert apart(sample(task), expected) > 0.1
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_are_those_of_our_method(name: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import ours

    task = setting(pipe, steps=2, edited=1)
    default = ours.draw(name, task).images
    made = ours._MAKE[name]
    monkeypatch.setitem(ours._MAKE, name, lambda x: dataclasses.replace(made(x), **OTHERWISE[name]))
    expected = ours.draw(name, task).images
    assert apart(default, expected) > 0.01
    for form, run in forms(name).items():
        assert apart(run(task).images, expected) < 1e-3, form


def test_diffusers(pipe: Any) -> None:
    from bench.pictures import diffusers_forms, ours

    task = setting(pipe, steps=2, edited=1, batch=2)
    assert diffusers_forms.objection(task) is None
    before = state(pipe)
    drawn = diffusers_forms.FORMS["AttendAndExcite"](task).images
    assert apart(drawn, ours.draw("AttendAndExcite", task).images) < 1e-3
    assert state(pipe) == before

    some = dataclasses.replace(task, layers=("up_blocks.2",))
    with pytest.raises(ValueError, match=r"layers is \('up_blocks.2',\), but diffusers reads all .* of 16x16"):
        diffusers_forms.FORMS["AttendAndExcite"](some)


@pytest.mark.parametrize("kind", ["published", "stock", "diffusers"])
def test_a_failure_restores(kind: str, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import diffusers_forms

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no picture")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    before = state(pipe)
    run = {**forms("AttendAndExcite"), "diffusers": diffusers_forms.FORMS["AttendAndExcite"]}[kind]
    with pytest.raises(RuntimeError, match="no picture"):
        run(setting(pipe, steps=1, edited=1))
    assert state(pipe) == before


def test_a_failure_within_an_evaluation_restores(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.unet.up_blocks[0], "forward", lambda *args, **kwargs: 1 / 0)
    before = state(pipe)
    for run in forms("CONFORM").values():
        with pytest.raises(ZeroDivisionError):
            run(setting(pipe, steps=1, edited=1))
        assert state(pipe) == before


def test_words_of_several_tokens(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their largest divergence is what the published form takes; the stock form says that it cannot."""
    from bench.pictures import ours

    made = ours._MAKE["SynGen"]
    pairs = [("red circle", "and"), ("blue", "square")]
    monkeypatch.setitem(ours._MAKE, "SynGen", lambda x: dataclasses.replace(made(x), pairs=pairs))
    task = setting(pipe, steps=1, edited=1)
    published, stock = forms("SynGen").values()
    assert apart(published(task).images, ours.draw("SynGen", task).images) < 1e-3
    with pytest.raises(ValueError, match="has a word of several tokens"):
        stock(task)


@pytest.fixture
def two_encoders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SDXL's architecture, small, in float64."""
    from bench.pictures import architectures

    monkeypatch.setitem(architectures.CONFIGS, "sdxl", architectures.CONFIGS["sdxl"] | SDXL)
    monkeypatch.setitem(architectures.TEXT_CONFIGS, "sdxl", [ENCODER, {**ENCODER, "projection_dim": 16}])
    monkeypatch.setattr(architectures, "VAE_CONFIG", architectures.VAE_CONFIG | VAE)
    return architectures.pipeline("sdxl", dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_two_text_encoders_and_default_layers(name: str, two_encoders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.pictures import diffusers_forms, ours
    from bench.pictures.sampling import Setting, sample

    # Random weights attend evenly, so that only long steps are seen.
    made = ours._MAKE[name]
    monkeypatch.setitem(ours._MAKE, name, lambda x: dataclasses.replace(made(x), scale=1e5))
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Setting(two_encoders, latents, 1, 1)
    expected = ours.draw(name, task).images
    assert apart(sample(task), expected) > 1e-3
    for form, run in forms(name).items():
        assert apart(run(task).images, expected) < 1e-6, form
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has two text encoders"):
        diffusers_forms.FORMS["AttendAndExcite"](task)


@pytest.mark.parametrize("padded", [True, False])
def test_text_similarity(padded: bool, two_encoders: Any) -> None:
    from attnctl_fast.attach.call import Call
    from bench.pictures import guidance_loop, ours
    from bench.pictures.sampling import PROMPT, Setting
    from tests.support import guided

    task = Setting(two_encoders, torch.zeros(1, 4, 16, 16), 1, 1)
    method = ours.method("TSAM", task)
    prompts = guided.prompts(two_encoders, [PROMPT], length=two_encoders.tokenizer.model_max_length)
    expected = method.prepare(Call(two_encoders, prompts, 1, lambda _: torch.empty(0))).text[0]
    found = guidance_loop.text_similarity(task, method.gamma, padded=padded)
    torch.testing.assert_close(found.to(expected.dtype), expected)
    assert guidance_loop.text_similarity(task, 1.0, padded=padded).sub(found).abs().max() > 0.01
