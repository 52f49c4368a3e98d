"""The joint transformer of the shapes models before training: recording its attention, and padding of any length."""

import math
from typing import Any

import pytest
import torch

from attnctl_fast.shapes.autoencoder import build_vae
from attnctl_fast.shapes.denoiser import denoiser_named
from attnctl_fast.shapes.mmdit import BLOCKS, SHORT_LENGTH, JointProcessor, MMDiTDenoiser, record_attention
from attnctl_fast.shapes.text import MAX_LENGTH, POOLED

PROMPT = "a red circle and a blue star"


@pytest.fixture(scope="module")
def denoiser() -> Any:
    return denoiser_named("mmdit")


@pytest.fixture(scope="module")
def model(denoiser: Any) -> Any:
    torch.manual_seed(0)
    made = denoiser.build().eval().requires_grad_(False)
    # Before training it predicts zero.
    torch.nn.init.normal_(made.proj_out.weight)
    return made


def inputs(denoiser: Any, length: int) -> tuple[torch.Tensor, ...]:
    """Latents, text that T5 pads to a length, pooled text and a time."""
    made = denoiser.pipeline(build_vae(), denoiser.build())
    text, _, pooled, _ = made.encode_prompt(PROMPT, None, None, max_sequence_length=length)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return latents, text, pooled, torch.tensor([400.0])


def test_recording_changes_nothing_and_is_undone(denoiser: Any, model: Any) -> None:
    before = model.attn_processors
    given = inputs(denoiser, SHORT_LENGTH)
    plain = model(*given).sample
    with denoiser.record(model) as recorders:
        recorded = model(*given).sample
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
    assert model.attn_processors == before
    assert list(recorders) == [f"{layer} {name}" for layer in MMDiTDenoiser.layers for name in ("CLIP", "T5")]
    clip, t5 = (recorders[f"{MMDiTDenoiser.layers[0]} {name}"].probabilities for name in ("CLIP", "T5"))
    # All of the attention to the text, counted twice; CLIP's last column is what T5's begin behind.
    assert clip.shape == (1, 256, MAX_LENGTH + SHORT_LENGTH)
    torch.testing.assert_close(clip.sum(-1), torch.full((1, 256), 2.0))
    torch.testing.assert_close(t5, clip[..., MAX_LENGTH - 1 :])
    assert set(MMDiTDenoiser.layers) <= {f"transformer_blocks.{block}.attn" for block in range(BLOCKS)}


@pytest.mark.parametrize("length", [16, 256])
def test_one_column_stands_for_padding_of_any_length(denoiser: Any, model: Any, length: int) -> None:
    whole = model(*inputs(denoiser, length)).sample
    short = inputs(denoiser, SHORT_LENGTH)
    bias = torch.zeros(1, 1, 1, 256 + MAX_LENGTH + SHORT_LENGTH)
    bias[..., -1] = math.log(length - SHORT_LENGTH + 1)
    with record_attention(model, []):
        counted = model(*short, joint_attention_kwargs={"column_bias": bias}).sample
        ignored = model(*short).sample
    torch.testing.assert_close(counted, whole, atol=1e-4, rtol=1e-4)
    assert (ignored - whole).abs().max() > 1e-3


def test_training_counts_padding_at_random(denoiser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(JointProcessor, "__call__", lambda *_, column_bias, **__: seen.append(column_bias) or 1 / 0)
    noise = torch.randn(200, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = denoiser.tokens([PROMPT] * 200)
    assert tokens.shape == (200, MAX_LENGTH + SHORT_LENGTH)
    made = denoiser.build()
    with denoiser.record(made), pytest.raises(ZeroDivisionError):
        denoiser.errors(made, noise, tokens, noise, torch.full((200,), 0.5))
    bias = seen[0]
    assert not bias[..., :-1].any()
    lengths = bias[:, 0, 0, -1].exp() + SHORT_LENGTH - 1
    assert 13 <= lengths.min() < 14
    assert 230 < lengths.max() <= 256


def test_times_are_logit_normal_and_the_error_is_that_of_the_velocity(denoiser: Any, model: Any) -> None:
    levels = denoiser.levels(2000, torch.Generator().manual_seed(0))
    assert abs(levels.logit().mean()) < 0.1
    assert abs(levels.logit().std() - 1) < 0.1
    latents, text, pooled, _ = inputs(denoiser, SHORT_LENGTH)
    noise, share = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.25])
    # So that the last column's count is one.
    noise[0, 0, 0, 0] = -10
    with denoiser.record(model):
        errors, signal = denoiser.errors(model, latents, denoiser.tokens([PROMPT]), noise, share)
    velocity = model(0.75 * latents + 0.25 * noise, text, pooled, torch.tensor([250.0])).sample
    torch.testing.assert_close(errors, ((velocity - (noise - latents)) ** 2).mean().reshape(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signal, 1 - share)
    assert pooled.shape == (1, 2 * POOLED)
    assert not pooled.any()
