"""The T5 tokenizer and text encoder of the shapes model's joint transformer, written down as CLIP's in `text.py` are.

A regular one-layer `T5EncoderModel` whose weights are set by construction. Its attention looks at relative positions
alone: every token reads the one before it, and of what it reads only a colour comes through. So every token carries
itself, and a noun the colour word in front of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .scene import COLOURS
from .text import CHARACTERS, WIDTH, WORDS

if TYPE_CHECKING:
    from transformers import T5EncoderModel, T5TokenizerFast

# CLIP's two texts side by side are as wide.
T5_WIDTH = 2 * WIDTH
T5_LENGTH = 256
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
_MARK = "▁"
# Far apart, so that the softmax picks one: the token before, and at the start of the text the token itself.
_BEFORE_LOGIT, _ITSELF_LOGIT = 60.0, 30.0


def pieces() -> list[tuple[str, float]]:
    """Return the unigram vocabulary and its scores: every word of `WORDS` is one token, others are spelled."""
    special = [(PAD, 0.0), (EOS, 0.0), (UNKNOWN, 0.0), (_MARK, -3.0)]
    return [*special, *((_MARK + word, -2.0) for word in WORDS), *((letter, -6.0) for letter in CHARACTERS)]


def build_t5_tokenizer() -> T5TokenizerFast:
    """Build a `T5TokenizerFast` that knows the words of the captions."""
    from transformers import T5TokenizerFast

    return T5TokenizerFast(vocab=pieces(), extra_ids=0, model_max_length=T5_LENGTH)


@torch.no_grad()
def build_t5_encoder(seed: int = 0) -> T5EncoderModel:
    """Build a frozen one-layer `T5EncoderModel`, 256 wide, whose attention copies a colour word into the noun after it.

    All tokens and all copied colours are orthogonal. Padding and the end of the text carry nothing of the prompt.
    """
    from transformers import T5Config, T5EncoderModel

    names = [name for name, _ in pieces()]
    generator = torch.Generator().manual_seed(seed + 2)
    square = torch.randn(T5_WIDTH, T5_WIDTH, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    words, copies = basis[: len(names)], basis[len(names) : len(names) + len(COLOURS)]
    colours = words[[names.index(_MARK + colour) for colour in COLOURS]]

    model = T5EncoderModel(
        T5Config(
            vocab_size=len(names),
            d_model=T5_WIDTH,
            d_kv=len(COLOURS),
            d_ff=len(COLOURS),
            num_layers=1,
            num_heads=1,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "layer_norm" in name else parameter.zero_()
    attention = model.encoder.block[0].layer[0].SelfAttention
    # T5's norm gives every element a mean square of one.
    model.shared.weight.copy_(math.sqrt(T5_WIDTH) * words)
    attention.v.weight.copy_(colours)
    attention.o.weight.copy_(copies.T)
    # Buckets 0 and 1 are the distances to the token itself and to the one before.
    attention.relative_attention_bias.weight[:2, 0] = torch.tensor([_ITSELF_LOGIT, _BEFORE_LOGIT])
    return model.eval()
