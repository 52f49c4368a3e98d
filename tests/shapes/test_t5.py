"""The constructed T5 text encoder of the joint transformer, and CLIP's as Stable Diffusion 3 reads it."""

from typing import Any

import pytest
import torch

from attnctl_fast import shapes
from attnctl_fast.shapes.t5 import EOS, build_t5_encoder, build_t5_tokenizer
from attnctl_fast.shapes.text import WORDS, build_projected_text_encoder, build_text_encoder, build_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_t5_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> Any:
    return build_t5_encoder()


def encode(tokenizer: Any, encoder: Any, prompt: str, length: int = LENGTH) -> torch.Tensor:
    tokens = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
    return encoder(tokens.input_ids).last_hidden_state[0]


def test_every_word_is_one_token_and_others_are_spelled(tokenizer: Any) -> None:
    for word in WORDS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids) == [f"▁{word}", EOS]
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer("zebra").input_ids)) == f"▁zebra{EOS}"
    scene = shapes.scene_for_seed(0, 3)
    assert tokenizer.decode(tokenizer(scene.prompt).input_ids, skip_special_tokens=True) == scene.prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_noun_carries_its_colour_and_nothing_else_does(tokenizer: Any, dtype: torch.dtype) -> None:
    encoder = build_t5_encoder().to(dtype)
    red, blue = (encode(tokenizer, encoder, f"a {colour} circle and a green star") for colour in ("red", "blue"))
    changed = (red - blue).norm(dim=-1)
    # 0: a, 1: the colour itself, 2: the noun after it, from 3: everything else.
    assert (changed > 0.1).nonzero().flatten().tolist() == [1, 2]
    assert changed[2] > 0.5 * changed[1]


def test_words_are_orthogonal_and_of_one_length(tokenizer: Any, encoder: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in WORDS]
    words = encoder.shared.weight[ids] / 16
    torch.testing.assert_close(words @ words.T, torch.eye(len(ids)), atol=1e-5, rtol=0)


def test_padding_carries_nothing_of_the_prompt_and_is_alike_at_every_length(tokenizer: Any, encoder: Any) -> None:
    empty = encode(tokenizer, encoder, "")[1]
    for seed in range(10):
        hidden = encode(tokenizer, encoder, shapes.scene_for_seed(seed, 2).prompt, 40)
        torch.testing.assert_close(hidden[8:], empty.expand(32, -1), atol=1e-4, rtol=0)


def test_clip_before_its_last_layer_says_what_the_unet_reads_and_its_pooled_text_nothing() -> None:
    ids = build_tokenizer()(["a red circle and a blue star", "a ring"], padding="max_length", return_tensors="pt")
    projected = build_projected_text_encoder()(ids.input_ids, output_hidden_states=True)
    assert len(projected.hidden_states) == 3
    plain = build_text_encoder()(ids.input_ids).last_hidden_state
    before = torch.nn.functional.layer_norm(projected.hidden_states[-2], plain.shape[-1:])
    torch.testing.assert_close(before, plain, atol=1e-2, rtol=0)
    assert not projected.text_embeds.any()
