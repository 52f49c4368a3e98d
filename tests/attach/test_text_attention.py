"""The self-attention of a prompt's tokens within T5, Bert and CLIP, as the pipelines of transformers run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnctl_fast.attach.text_attention import content_attention, text_attention
from tests.attach.test_segments import prompts
from tests.support import tiny_transformers as tiny

PROMPTS = ("a red bag and a blue octopus", "cat", "A (dog) and two ball")
KINDS = ("pixart_alpha", "pixart_sigma", "chroma", "flux", "hunyuan", "sd3", "auraflow", "ltx")
UNMASKED = ("flux", "sd3", "ltx")


def pipeline(kind: str) -> Any:
    pipe = tiny.pipeline(kind)
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        for part, weight in [] if encoder is None else encoder.named_parameters():
            # Sharper than random weights are, so that the words differ.
            if part.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 12
            elif part.endswith((".query.weight", ".key.weight")):
                weight.data *= 24
            elif part.endswith((".q.weight", ".k.weight")):
                weight.data *= 2
    return pipe


def eager_attention(pipe: Any, kind: str, text: str) -> Tensor:
    """transformers' own maps of a text as its pipeline pads it, mean over layers, heads and encoders."""
    segment = prompts(kind, text, pipe=pipe).segments[0]
    found = []
    for name in segment.encoders:
        encoder = getattr(pipe, name, None)
        if encoder is None:
            continue
        options = {"padding": "max_length", "max_length": segment.length, "truncation": True, "return_tensors": "pt"}
        given = segment.tokenizer(segment.converted(text), **options)
        before = encoder.config._attn_implementation
        encoder.set_attn_implementation("eager")
        mask = None if kind in UNMASKED else given.attention_mask
        with torch.no_grad():
            maps = encoder(given.input_ids, attention_mask=mask, output_attentions=True).attentions
        encoder.set_attn_implementation(before)
        found.append(torch.stack(maps).float().mean((0, 2))[0])
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_that_of_the_encoders(kind: str) -> None:
    pipe = pipeline(kind)
    known = prompts(kind, *PROMPTS, pipe=pipe)
    whole, own = text_attention(pipe, known), content_attention(pipe, known)
    assert whole.dtype == own.dtype == torch.float32 and not whole.requires_grad
    assert known.tokens is not None and known.content() is not None
    for i, text in enumerate(PROMPTS):
        tokens, content = known.tokens[i], known.content()[0][i]  # type: ignore[index]
        n, length = len(content), len(tokens.ids)
        expected = eager_attention(pipe, kind, text)
        torch.testing.assert_close(whole[i, :length, :length], expected[:length, :length], rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(own[i, :n, :n], expected[content][:, content], rtol=2e-5, atol=1e-6)
        # FLUX and LTX let T5 attend to its padding.
        shares = whole[i, :length, :length].sum(1)
        assert shares.mean() < 0.9 if kind in ("flux", "ltx") else torch.allclose(shares, torch.ones(length))
    assert own.shape[1] == max(map(len, known.content()[0]))  # type: ignore[index]
    assert own[0].max() > 0.3


def test_t5_attends_to_both_sides() -> None:
    pipe = pipeline("chroma")
    found = content_attention(pipe, prompts("chroma", PROMPTS[0], pipe=pipe))[0]
    assert found.triu(1).sum() > 0.5 < found.tril(-1).sum()


@pytest.mark.parametrize("kind", ["chroma", "flux", "hunyuan"])
def test_the_encoder_stays_as_it_was(kind: str) -> None:
    pipe = pipeline(kind)
    known = prompts(kind, "a cat", pipe=pipe)
    encoder = getattr(pipe, known.segments[0].encoders[0])
    before = [(one._forward_pre_hooks.copy(), one.__dict__.keys()) for one in encoder.modules()]
    implementation, expected = encoder.config._attn_implementation, text_attention(pipe, known)
    assert [(one._forward_pre_hooks, one.__dict__.keys()) for one in encoder.modules()] == before
    assert encoder.config._attn_implementation == implementation != "eager"
    encoder.compile(backend="eager")
    torch.testing.assert_close(text_attention(pipe, known), expected)


def test_half_precision() -> None:
    pipe = pipeline("chroma")
    known = prompts("chroma", *PROMPTS, pipe=pipe)
    expected = text_attention(pipe, known)
    pipe.text_encoder.to(torch.bfloat16)
    found = text_attention(pipe, known)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(found[0].sum(1), torch.ones(len(found[0])))


def test_what_has_none() -> None:
    with pytest.raises(ValueError, match="Gemma2Model is not a CLIP, T5 or Bert text encoder; pass text_similarity"):
        text_attention(tiny.pipeline("sana"), prompts("sana", "a bag"))
    with pytest.raises(ValueError, match="which words the prompt has is unknown"):
        text_attention(tiny.pipeline("flux"), prompts("flux"))
    pipe = tiny.pipeline("flux", parts={"text_encoder_2": None})
    with pytest.raises(ValueError, match="FluxPipeline has no text encoder"):
        text_attention(pipe, prompts("flux", "a bag", pipe=pipe))
    pipe = tiny.pipeline("sd3")
    with pytest.raises(ValueError, match="prompt and prompt_2 differ"):
        text_attention(pipe, prompts("sd3", "a bag", pipe=pipe, prompt_2="the bag"))
