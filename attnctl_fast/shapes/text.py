"""The tokenizer and the text encoder of the shapes model, both written down rather than learned.

A causal text encoder that is trained jointly with so small a UNet writes the whole prompt into the padding tokens, and
the cross-attention maps of the nouns stop saying where the objects are. This one is a regular `CLIPTextModel` whose
weights are set by construction, so that every token carries itself, its position and, for a noun, its colour.
"""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import torch

from .scene import COLOURS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    Encoder = TypeVar("Encoder", CLIPTextModel, CLIPTextModelWithProjection)

WORDS = ("a", "and", *COLOURS, *SHAPES)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 20
WIDTH = 128
POOLED = 8
_POSITION_NORM = 0.3
_COPY_LOGIT = 30.0
CHARACTERS = string.ascii_lowercase + string.digits + ",.-"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the byte-pair vocabulary and merges.

    Every word of `WORDS` is one token, other words are spelled by letters.
    """
    tokens = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            symbols = _merged(symbols, pair)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merges.append(pair)
            symbols = _merged(symbols, pair)
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    return {token: index for index, token in enumerate([*tokens, BOS, EOS])}, merges


def build_tokenizer(length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Build a `CLIPTokenizer` of so many tokens."""
    from transformers import CLIPTokenizer

    with TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), length)
        return CLIPTokenizer.from_pretrained(folder)


def write_vocabulary(folder: Path, length: int = MAX_LENGTH) -> None:
    """Write the files from which a `CLIPTokenizer` of so many tokens is loaded into a folder."""
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": length,
                "bos_token": BOS,
                "eos_token": EOS,
                "pad_token": EOS,
                "unk_token": EOS,
                "clean_up_tokenization_spaces": False,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )


def build_text_encoder(seed: int = 0) -> CLIPTextModel:
    """Build a frozen causal `CLIPTextModel` of one layer, 128 wide, as the UNet reads it."""
    from transformers import CLIPTextModel

    return _written(CLIPTextModel(_config(layers=1)), seed, length=1.0)


def build_projected_text_encoder(seed: int = 0) -> CLIPTextModelWithProjection:
    """Build the same as Stable Diffusion 3 reads it: the states before the last layer, and a pooled vector.

    The last layer does nothing, tokens have the length `sqrt(128)`, and the pooled vector is zero: what the picture
    shows comes through attention to the words alone.
    """
    from transformers import CLIPTextModelWithProjection

    return _written(CLIPTextModelWithProjection(_config(layers=2)), seed, length=math.sqrt(WIDTH))


def _config(layers: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    vocab, _ = vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH if layers == 1 else POOLED,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
        pad_token_id=vocab[EOS],
    )


@torch.no_grad()
def _written(model: Encoder, seed: int, length: float) -> Encoder:
    """Set the weights of an encoder; `length` is that of a token before its position is added.

    Its attention copies a colour word into the noun after it.

    The space splits into orthogonal parts: words, positions, copied colours, spelled tokens; all orthogonal to the
    vector of ones, so that the layer norms only rescale. The query of position `j` is the key of position `j - 1`; the
    value is non-zero for colour words only; the MLP is zero. Start, end and padding tokens therefore carry nothing of
    the prompt.
    """
    vocab, _ = vocabulary()
    named = [f"{word}</w>" for word in WORDS] + [BOS, EOS]
    basis = _basis(seed)
    words, positions, copies, rest = basis.split(
        [len(named), MAX_LENGTH, len(COLOURS), WIDTH - 1 - len(named) - MAX_LENGTH - len(COLOURS)]
    )
    colours = words[[named.index(f"{colour}</w>") for colour in COLOURS]]

    generator = torch.Generator().manual_seed(seed)
    spelled = torch.randn(len(vocab), len(rest), generator=generator, dtype=basis.dtype)
    table = torch.nn.functional.normalize(spelled, dim=-1) @ rest
    for vector, token in zip(words, named, strict=True):
        table[vocab[token]] = vector

    # After the layer norm a token has length sqrt(WIDTH), of which this is the part along its position.
    position_part = math.sqrt(WIDTH) * _POSITION_NORM / math.sqrt(1 + _POSITION_NORM**2)
    gain = _COPY_LOGIT * math.sqrt(WIDTH) / position_part**2
    query = gain * positions[:-1].T @ positions[1:]
    key = positions.T @ positions
    # A copied colour weighs as much as the word itself, which is not normalised on the residual path.
    value = copies.T @ colours * math.sqrt((1 + _POSITION_NORM**2) / WIDTH)

    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.zero_() if "norm" not in name or name.endswith("bias") else parameter.fill_(1)
    modules = dict(model.named_modules())
    prefix = "" if "embeddings" in modules else "text_model."
    attention = modules[f"{prefix}encoder.layers.0.self_attn"]
    modules[f"{prefix}embeddings.token_embedding"].weight.copy_(length * table)
    modules[f"{prefix}embeddings.position_embedding"].weight.copy_(length * _POSITION_NORM * positions)
    attention.q_proj.weight.copy_(query)
    attention.k_proj.weight.copy_(key)
    attention.v_proj.weight.copy_(length * value)
    attention.out_proj.weight.copy_(torch.eye(WIDTH))
    return model.eval()


def _basis(seed: int) -> torch.Tensor:
    """Return `WIDTH - 1` orthonormal rows, each orthogonal to the vector of ones, float64 `[WIDTH - 1, WIDTH]`."""
    generator = torch.Generator().manual_seed(seed + 1)
    columns = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q[:, 1:].T


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
