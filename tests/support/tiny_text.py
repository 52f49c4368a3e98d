"""Tiny tokenizers and text encoders with random weights that pipelines of transformers have besides CLIP's: T5, Gemma,
Bert, Qwen2.5-VL, Qwen3, GLM and Mistral."""

from __future__ import annotations

import string
from functools import cache
from typing import Any

from tests.support.tiny import WORDS, _merge

# Spelled by several tokens; "apple" is a token by itself, and also the end of "pineapple".
PIECES = {"octopus": ("octo", "pus"), "pineapple": ("pine", "apple")}
LETTERS = string.ascii_lowercase + string.digits + ".!-'\"():"
CAPITALS = string.ascii_uppercase
MARK = "▁"
# What Sana puts before a prompt; long enough that its pipeline leaves most of it out of the transformer's text.
INSTRUCTION = ["the photo of a two,", "a cat and the dog.", "red ball: "]


@cache
def _unigram() -> list[tuple[str, float]]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (MARK, -3.0)]
    pieces += [(f"{MARK}{word}", -2.0) for word in WORDS if word != ","]
    for first, *rest in PIECES.values():
        pieces += [(f"{MARK}{first}", -2.0), *((piece, -2.0) for piece in rest)]
    return [*pieces, (",", -2.0), *((letter, -6.0) for letter in LETTERS + CAPITALS)]


def t5_tokenizer() -> Any:
    """A sentence-piece tokenizer: words begin with a mark, and a text has an end but no start."""
    from transformers import T5TokenizerFast

    # As many as T5's own has by default would be most of the vocabulary.
    return T5TokenizerFast(vocab=_unigram(), extra_ids=0, model_max_length=512)


def t5_encoder(tokens: Any, width: int = 32, cls: str = "T5EncoderModel") -> Any:
    import transformers

    config = getattr(transformers, cls.replace("EncoderModel", "Config"))(
        vocab_size=len(tokens),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return getattr(transformers, cls)(config).eval()


@cache
def _gemma_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _merge([*word], (word,), merges)
    for word, pieces in PIECES.items():
        _merge([*word], pieces, merges)
    # Joined with the mark last, so that a word has the same pieces with it and without.
    merges += [(MARK, word) for word in (*WORDS, *(pieces[0] for pieces in PIECES.values())) if word != ","]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", MARK, ",", *LETTERS, *CAPITALS]
    tokens += dict.fromkeys(a + b for a, b in merges)
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def gemma_tokenizer() -> Any:
    """Byte-pair encoding with marks for spaces: a start of text and no end."""
    from transformers import GemmaTokenizerFast

    vocab, merges = _gemma_files()
    return GemmaTokenizerFast(vocab=dict(vocab), merges=list(merges), model_max_length=512, add_bos_token=True)


def gemma_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=512,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return Gemma2Model(config).eval()


@cache
def _byte_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers.pre_tokenizers import ByteLevel

    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _merge([*word], (word,), merges)
    for word, pieces in PIECES.items():
        _merge([*word], pieces, merges)
    # As Gemma's, with the space's byte in place of the mark.
    merges += [("Ġ", word) for word in (*WORDS, *(pieces[0] for pieces in PIECES.values())) if word != ","]
    tokens = [*sorted(ByteLevel.alphabet()), *dict.fromkeys(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_tokenizer(special: list[str], **options: Any) -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = _byte_files()
    tokens = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=512, **options)
    tokens.add_special_tokens({"additional_special_tokens": special})
    return tokens


def qwen_tokenizer() -> Any:
    """Byte-pair encoding of bytes, with the space before a word as its first byte: neither start nor end of text."""
    tokens = _byte_tokenizer(["<|im_start|>", "<|im_end|>", "user", "assistant", "<think>", "</think>"])
    tokens.chat_template = (
        "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    return tokens


def mistral_tokenizer() -> Any:
    """As Qwen's, with another chat and padding in front. Mistral's own is within a processor, which makes the chat."""
    roles = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    tokens = _byte_tokenizer(roles, bos_token="<s>", padding_side="left")
    tokens.chat_template = (
        "{{ bos_token }}[SYSTEM_PROMPT]{{ messages[0]['content'][0]['text'] }}[/SYSTEM_PROMPT]"
        "[INST]{{ messages[1]['content'][0]['text'] }}[/INST]"
    )
    return tokens


def _decoder(tokens: Any, width: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": tokens.pad_token_id,
    }


def qwen3_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_decoder(tokens, width))).eval()


def mistral_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **_decoder(tokens, width)},
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 16, **vision},
    )
    return Mistral3ForConditionalGeneration(config).eval()


def qwen_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    pad = tokens.pad_token_id
    text = {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), pad),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision | {"fullatt_block_indexes": [0]})
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def glm_tokenizer() -> Any:
    """As Qwen's, but with two tokens before a text, and padded in front."""
    from tokenizers.processors import TemplateProcessing

    before = ["[gMASK]", "<sop>"]
    tokens = _byte_tokenizer(before, padding_side="left")
    special = [(token, tokens.convert_tokens_to_ids(token)) for token in before]
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=special)
    return tokens


def glm_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import GlmConfig, GlmModel

    return GlmModel(GlmConfig(**_decoder(tokens, width))).eval()


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = string.ascii_lowercase + string.digits
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(pieces[0] for pieces in PIECES.values())]
    tokens += [f"##{piece}" for pieces in PIECES.values() for piece in pieces[1:]]
    tokens += [*LETTERS, *(f"##{letter}" for letter in letters), *"苹果"]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, model_max_length=77)


def bert_encoder(tokens: Any, width: int = 16) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return BertModel(config).eval()
