"""T-SAM: the text encoders' self-attention, the loss against loops over pairs, prompts of every length, bad input."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.text_attention import text_attention
from tests.support import guided, tiny

PROMPTS = ("a red bag and a blue octopus", "cat", "a dog", " ".join(["red"] * 40))
LENGTHS = (8, 1, 2, tiny.LENGTH - 2)
KINDS = {"sd1": ("StableDiffusionPipeline", "sd1"), "sdxl": ("StableDiffusionXLPipeline", "sdxl")}


def pipeline(kind: str) -> Any:
    pipe = tiny.pipeline(*KINDS[kind])
    for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        for name, weight in [] if encoder is None else encoder.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                # Sharper than random weights are, so that the words differ.
                weight.data *= 12
    return pipe


def eager(encoder: Any) -> Any:
    """A copy that computes its attention maps."""
    config = type(encoder.config)(**encoder.config.to_dict(), attn_implementation="eager")
    copy = type(encoder)(config).eval().to(encoder.dtype)
    copy.load_state_dict(encoder.state_dict())
    return copy


def eager_attention(pipe: Any, text: str) -> torch.Tensor:
    """transformers' own attention maps, mean over layers, heads and encoders, `[16,16]`."""
    found = []
    for end in ("", "_2"):
        encoder, tokenizer = getattr(pipe, f"text_encoder{end}", None), getattr(pipe, f"tokenizer{end}", None)
        if encoder is not None:
            ids = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
            maps = eager(encoder)(ids, output_attentions=True).attentions
            found.append(torch.stack(maps).float().mean((0, 1, 2)))
    return torch.stack(found).mean(0).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_text_attention_is_that_of_the_encoders(kind: str) -> None:
    pipe = pipeline(kind)
    maps = text_attention(pipe, guided.call(*PROMPTS, pipe=pipe).prompts)
    assert maps.dtype == torch.float32 and not maps.requires_grad
    for row, length, text in zip(maps, LENGTHS, PROMPTS, strict=True):
        expected = eager_attention(pipe, text)[: length + 2, : length + 2]
        torch.testing.assert_close(row[: length + 2, : length + 2], expected, rtol=2e-5, atol=1e-6)
        assert length < 3 or expected[3].max() > 0.3


def test_half_precision_encoder() -> None:
    pipe, text = pipeline("sd1"), "a red cat and a blue dog"
    prompts = guided.call(text, pipe=pipe).prompts
    pipe.text_encoder = eager(pipe.text_encoder.to(torch.bfloat16))
    found = text_attention(pipe, prompts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(2), torch.ones(1, 9))
    # transformers rounds the logits and the maps to bfloat16.
    torch.testing.assert_close(found[0], eager_attention(pipe, text)[:9, :9], rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(text_attention(pipe, prompts).sum(2), torch.ones(1, 9))


def test_encoders_are_called_as_modules() -> None:
    """So that what offloads them, or scales their LoRA layers, sees the call."""
    pipe, called = pipeline("sdxl"), []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.register_forward_pre_hook(lambda module, _: called.append(module))
    text_attention(pipe, guided.call("a cat", "a dog and a bag", pipe=pipe).prompts)
    assert called == [pipe.text_encoder, pipe.text_encoder_2]


def test_the_encoder_stays_as_it_was() -> None:
    pipe = pipeline("sdxl")
    before = [(one._forward_pre_hooks.copy(), one.__dict__.keys()) for one in pipe.text_encoder.modules()]
    implementation = pipe.text_encoder.config._attn_implementation
    text_attention(pipe, guided.call("a cat", pipe=pipe).prompts)
    assert [(one._forward_pre_hooks, one.__dict__.keys()) for one in pipe.text_encoder.modules()] == before
    assert pipe.text_encoder.config._attn_implementation == implementation != "eager"
    pipe.text_encoder.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        text_attention(pipe, guided.call("a cat", pipe=pipe).prompts)
    assert not any(one._forward_pre_hooks for one in pipe.text_encoder.modules())


def test_an_encoder_compiled_in_place() -> None:
    pipe = pipeline("sd1")
    prompts = guided.call("a cat and a dog", pipe=pipe).prompts
    expected = text_attention(pipe, prompts)
    pipe.text_encoder.compile(backend="eager")
    pipe.encode_prompt("a bag", torch.device("cpu"), 1, False)
    torch.testing.assert_close(text_attention(pipe, prompts), expected)
    pipe.text_encoder = torch.compile(pipeline("sd1").text_encoder, backend="eager")
    torch.testing.assert_close(text_attention(pipe, prompts), expected)


def textbook(maps: np.ndarray, attention: np.ndarray, gamma: float) -> float:
    """The released code's loss of one prompt: maps `[n,M]`, attention `[n,n]` of its words."""
    text = attention**gamma
    text = text / text.sum(1, keepdims=True)
    flat = [guided.smoothed(one).ravel() for one in maps]

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))

    loss = 0.0
    for i in range(1, len(maps)):
        row = np.array([cosine(flat[i], flat[j]) for j in range(i)])
        loss += 0.2 * i * (1 - cosine(text[i, :i], row))
    return loss


@pytest.mark.parametrize(("preset", "gamma"), [("official", 3), ("paper", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_textbook(kind: str, preset: str, gamma: int) -> None:
    pipe = pipeline(kind)
    method = getattr(ac.TSAM, preset)()
    context = guided.started(method, guided.call(*PROMPTS, images=2, pipe=pipe))
    maps = guided.maps_for(context)
    assert maps.shape[:2] == (8, tiny.LENGTH - 2)
    losses = method.loss(maps, context).tolist()
    for sample, loss in enumerate(losses):
        length = LENGTHS[sample // 2]
        attention = eager_attention(pipe, PROMPTS[sample // 2]).double().numpy()[1 : length + 1, 1 : length + 1]
        assert loss == pytest.approx(textbook(maps[sample, :length].numpy(), attention, gamma), rel=2e-4, abs=1e-7)
    assert losses[2] == losses[3] == 0 and losses[0] > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_in_a_batch_is_the_sample_alone(dtype: torch.dtype) -> None:
    pipe, method = pipeline("sd1"), ac.TSAM()
    batch = guided.started(method, guided.call(*PROMPTS, pipe=pipe))
    maps = guided.maps_for(batch, dtype=dtype)
    loss, gradient = guided.gradient(method, maps, batch)
    assert loss.dtype == dtype and not gradient[1].any()
    for index, text in enumerate(PROMPTS):
        context = guided.started(method, guided.call(text, pipe=pipe))
        own = maps[index : index + 1, : LENGTHS[index]]
        one, one_gradient = guided.gradient(method, own, context)
        # The text encoder is float32, and rounds otherwise in another batch.
        torch.testing.assert_close(loss[index : index + 1], one, rtol=5e-5, atol=1e-6)
        torch.testing.assert_close(gradient[index : index + 1, : LENGTHS[index]], one_gradient, rtol=5e-4, atol=1e-5)
        assert not gradient[index, LENGTHS[index] :].any()


def test_zero_maps_have_finite_gradients() -> None:
    method = ac.TSAM()
    context = guided.started(method, guided.call(*PROMPTS, pipe=pipeline("sd1")))
    maps = guided.maps_for(context)
    maps[0, 3] = 0
    maps[3] = 0
    loss, gradient = guided.gradient(method, maps, context)
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient[0].any()


@pytest.mark.parametrize("variant", ["cosine", "normalised_cosine", "absolute"])
def test_gradient(variant: str) -> None:
    method = ac.TSAM(variant=variant, weight=0.7)
    context = guided.started(method, guided.call("a cat and a dog", "a bag", pipe=pipeline("sd1")))
    torch.autograd.gradcheck(lambda x: method.loss(x, context), guided.maps_for(context).requires_grad_())


def test_similarity_from_the_user() -> None:
    text = torch.rand(3, 3).tril()
    text /= text.sum(1, keepdim=True)
    method = ac.TSAM(text_similarity=text, targets=[2, 5, 7])
    for one in (guided.embedded(2, images=2), guided.call("a cat and a red bag", "a dog, a bag and a cat", images=2)):
        context = guided.started(method, one)
        assert context.token_ids.tolist() == [[2, 5, 7]] * 4
        maps = guided.maps_for(context)
        each = method.loss(maps, context).tolist()
        for sample, loss in enumerate(each):
            assert loss == pytest.approx(textbook(maps[sample].numpy(), text.double().numpy(), 1), rel=1e-6)
    batch = ac.TSAM(text_similarity=torch.stack([text, text.flip(0).tril()]), targets=[[2, 5, 7], [1, 2, 3]])
    assert guided.started(batch, guided.embedded(2, images=2)).prepared.text.shape == (4, 3, 3)
    words = ac.TSAM(text_similarity=text)
    assert guided.started(words, guided.call("a red bag")).token_ids.tolist() == [[1, 2, 3]]
    for wrong in (guided.call("a bag"), guided.call("a red cat and")):
        with pytest.raises(ValueError, match=r"text_similarity has shape \(3, 3\); for these prompts it must be \["):
            guided.started(words, wrong)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3\); .* or \[1, 3, 3\]"):
        guided.started(ac.TSAM(text_similarity=text.expand(2, 3, 3)), guided.call("a red bag"))


def test_calls_that_do_not_fit() -> None:
    pipe, xl = pipeline("sd1"), pipeline("sdxl")
    with pytest.raises(
        ValueError, match=r"unknown \(prompt embeddings.* pass a prompt, or text_similarity= and targets="
    ):
        guided.started(ac.TSAM(), guided.embedded(pipe=pipe))
    with pytest.raises(ValueError, match="one is empty; give every image a prompt"):
        guided.started(ac.TSAM(), guided.call("a cat", "", pipe=pipe))
    with pytest.raises(ValueError, match="prompt and prompt_2 differ, .* pass text_similarity="):
        guided.started(ac.TSAM(), guided.call("a cat", pipe=xl, second=["a dog"]))
    same = guided.started(ac.TSAM(), guided.call("a cat", pipe=xl, second=["a CAT"]))
    assert same.prepared.lengths.tolist() == [2]
    bare = SimpleNamespace(tokenizer=pipe.tokenizer, text_encoder=None)
    with pytest.raises(ValueError, match="SimpleNamespace has no text encoder; load the pipeline with it, or pass"):
        guided.started(ac.TSAM(), guided.call("a cat", pipe=bare))
    bare.text_encoder = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear is not a CLIP, T5 or Bert text encoder; pass text_similarity="):
        guided.started(ac.TSAM(), guided.call("a cat", pipe=bare))
    pipe.tokenizer.add_tokens(["<thing>"])
    with pytest.raises(ValueError, match="the prompt has a token .* but CLIPTextModel knows .* textual inversion"):
        guided.started(ac.TSAM(), guided.call("a <thing>", pipe=pipe))


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "gamma": ({"gamma": 0.0}, "gamma is 0.0; it must be a number above 0"),
    "variant": ({"variant": "mse"}, "variant is 'mse'; it must be one of 'cosine', 'normalised_cosine', 'absolute'"),
    "weight": ({"weight": -1.0}, "weight is -1.0"),
    "kernel": ({"kernel_size": 4}, "kernel_size is 4; it must be odd"),
    "sigma": ({"sigma": 0.0}, "sigma is 0.0"),
    "targets alone": ({"targets": ["cat"]}, "targets names the tokens of text_similarity; pass both, or neither"),
    "a list": ({"text_similarity": [[1.0]]}, "text_similarity is list; it must be a tensor [n,n]"),
    "not square": ({"text_similarity": torch.ones(2, 3)}, "text_similarity is (2, 3)"),
    "not finite": ({"text_similarity": torch.full((2, 2), float("nan"))}, "must hold finite floating-point numbers"),
    "ints": ({"text_similarity": torch.eye(2, dtype=torch.int64)}, "(torch.int64) must hold finite floating-point"),
    "bad targets": ({"text_similarity": torch.eye(1), "targets": []}, "targets is [], which has an empty list"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.TSAM(**arguments)


def test_presets_and_refinement() -> None:
    assert ac.TSAM() == ac.TSAM.official() != ac.TSAM.paper() and hash(ac.TSAM()) == hash(ac.TSAM.official())
    assert ac.TSAM.paper().gamma == 4 and ac.TSAM.paper(gamma=2.0).gamma == 2
    method = ac.TSAM()
    assert (method.steps, method.scale, method.max_refinements) == (30, 5.0, 30)
    assert method.schedule == ac.schedules.root(0.5)
    assert method.bounds(50) == {0: None, 10: None, 20: None}
    assert method.bounds(10) == {0: None}
    assert ac.TSAM(refinement=()).bounds(50) == {}
    with pytest.raises(ValueError, match="refinement names step 20, but the call runs steps 0..9"):
        ac.TSAM(refinement={0: 0.1, 20: 0.1}).bounds(10)
