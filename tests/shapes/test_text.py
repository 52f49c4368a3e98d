"""The tokenizer and the constructed text encoder of the shapes model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from attnctl_fast import shapes
from attnctl_fast.shapes.text import (
    BOS,
    EOS,
    MAX_LENGTH,
    WORDS,
    build_text_encoder,
    build_tokenizer,
    vocabulary,
    write_vocabulary,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def encoder() -> Any:
    return build_text_encoder()


def encode(tokenizer: Any, encoder: Any, prompt: str) -> torch.Tensor:
    tokens = tokenizer(prompt, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state[0]


def test_every_word_is_one_token(tokenizer: Any) -> None:
    for word in WORDS:
        ids = tokenizer(word).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == [BOS, f"{word}</w>", EOS]


def test_a_prompt_is_its_words(tokenizer: Any) -> None:
    scene = shapes.Scene((("red", "circle"), ("blue", "star")))
    ids = tokenizer(scene.prompt, padding="max_length", max_length=MAX_LENGTH).input_ids
    words = [f"{word}</w>" for word in scene.prompt.split()]
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, *words, *[EOS] * (MAX_LENGTH - 1 - len(words))]
    assert tokenizer.decode(ids, skip_special_tokens=True) == scene.prompt
    assert tokenizer("A  Red CIRCLE").input_ids == tokenizer("a red circle").input_ids


def test_other_words_are_spelled(tokenizer: Any) -> None:
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer("greenish").input_ids)[1:-1]) == "greenish</w>"
    assert len(tokenizer("zebra").input_ids) > 3


def test_the_longest_scene_fits(tokenizer: Any) -> None:
    assert tokenizer.model_max_length == MAX_LENGTH
    assert max(len(tokenizer(shapes.scene_for_seed(seed, 3).prompt).input_ids) for seed in range(20)) <= MAX_LENGTH


def test_vocabulary_files_are_what_a_clip_tokenizer_reads(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    vocab, merges = vocabulary()
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    assert [tuple(line.split()) for line in lines[1:]] == merges
    assert sorted(vocab.values()) == list(range(len(vocab)))


def test_word_vectors_are_orthogonal(tokenizer: Any, encoder: Any) -> None:
    table = dict(encoder.named_parameters())
    (name,) = (name for name in table if name.endswith("token_embedding.weight"))
    ids = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in WORDS] + [tokenizer.bos_token_id]
    words = table[name][ids]
    torch.testing.assert_close(words @ words.T, torch.eye(len(ids)), atol=1e-5, rtol=0)


def test_a_noun_carries_its_colour_and_nothing_else_does(tokenizer: Any, encoder: Any) -> None:
    red, blue = (encode(tokenizer, encoder, f"a {colour} circle and a green star") for colour in ("red", "blue"))
    changed = (red - blue).norm(dim=-1) > 1e-3
    # 0: start, 1: a, 2: the colour itself, 3: the noun after it, from 4: everything else.
    assert changed.nonzero().flatten().tolist() == [2, 3]
    assert (red - blue)[3].norm() > 0.5 * (red - blue)[2].norm()


def test_padding_carries_nothing_of_the_prompt(tokenizer: Any, encoder: Any) -> None:
    empty = encode(tokenizer, encoder, "")
    for seed in range(10):
        scene = shapes.scene_for_seed(seed, 2)
        hidden = encode(tokenizer, encoder, scene.prompt)
        torch.testing.assert_close(hidden[8:], empty[8:], atol=1e-4, rtol=0)
        torch.testing.assert_close(hidden[0], empty[0], atol=1e-4, rtol=0)


def test_the_encoder_is_frozen_and_the_same_every_time(encoder: Any) -> None:
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for one, two in zip(encoder.parameters(), build_text_encoder().parameters(), strict=True):
        assert torch.equal(one, two)
