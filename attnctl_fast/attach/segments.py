"""Which text encoders make up the text that a pipeline's model attends to, family by family.

Every function here returns the parts of the text that have words, in order, of

    pipe: the pipeline, for its tokenizers;
    arguments: those of its `encode_prompt`, by name; without "prompt" the texts are unknown;
    length: how many columns `encode_prompt` returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from .tokens import SPACE_BYTE, WORD_GOES_ON, WORD_START, Segment


def _texts(given: Any) -> Sequence[str] | None:
    return [given] if isinstance(given, str) else given


def _textual_inversion(pipe: Any, tokenizer: Any) -> Callable[[str], str]:
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return str if convert is None else lambda text: convert(text, tokenizer)


def _cleaned(pipe: Any, arguments: dict[str, Any]) -> Callable[[str], str]:
    """Return what PixArt and Sana make of a caption."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    # They warn, every time, that they do not clean without these.
    clean = bool(arguments.get("clean_caption", False)) and is_bs4_available() and is_ftfy_available()
    return lambda text: pipe._text_preprocessing(text, clean_caption=clean)[0]


def _t5(tokenizer: Any, texts: Any, start: int, length: int, **more: Any) -> Segment:
    """Return a part by T5, which has no start of text."""
    return Segment("T5", tokenizer, _texts(texts), start, length, limit=length, opening=0, marks=WORD_START, **more)


def _byte_level(name: str, tokenizer: Any, texts: Any, length: int, limit: int, **more: Any) -> Segment:
    """Return the whole text of a language model, in a template or between special tokens of the tokenizer's own."""
    given = {"opening": 0, "closing": 0, "marks": SPACE_BYTE, "encoders": ("text_encoder",), **more}
    return Segment(name, tokenizer, _texts(texts), 0, length, limit, **given)


def unet_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return CLIP's part, which two encoders may share."""
    tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
    return [
        Segment(
            "CLIP",
            tokenizer,
            _texts(arguments.get("prompt")),
            0,
            length,
            limit=getattr(tokenizer, "model_max_length", length),
            second=_texts(arguments.get("prompt_2")),
            converted=_textual_inversion(pipe, tokenizer),
            encoders=("text_encoder", "text_encoder_2"),
        )
    ]


def sd3_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return CLIP's part, of two encoders, and T5's if there is one."""
    prompt, clip = arguments.get("prompt"), pipe.tokenizer_max_length
    # An empty prompt_2 or prompt_3 is none.
    second, third = arguments.get("prompt_2") or None, arguments.get("prompt_3") or prompt
    encoders = ("text_encoder", "text_encoder_2")
    found = [Segment("CLIP", pipe.tokenizer, _texts(prompt), 0, clip, clip, second=_texts(second), encoders=encoders)]
    # Without T5 its columns are zeros.
    if pipe.text_encoder_3 is not None and pipe.tokenizer_3 is not None:
        found.append(_t5(pipe.tokenizer_3, third, clip, length - clip, encoders=("text_encoder_3",)))
    return found


def flux_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part."""
    # CLIP's tokens are pooled: they have no columns.
    text = arguments.get("prompt_2") or arguments.get("prompt")
    convert = _textual_inversion(pipe, pipe.tokenizer_2)
    return [_t5(pipe.tokenizer_2, text, 0, length, converted=convert, encoders=("text_encoder_2",))]


def ltx_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part."""
    return [_t5(pipe.tokenizer, arguments.get("prompt"), 0, length, encoders=("text_encoder",))]


def _only_t5(pipe: Any, arguments: dict[str, Any], length: int, converted: Callable[[str], str]) -> list[Segment]:
    text = arguments.get("prompt")
    encoders = ("text_encoder",)
    return [_t5(pipe.tokenizer, text, 0, length, converted=converted, encoders=encoders, masked=True)]


def auraflow_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part, by the tokenizer of its own that Pile-T5 has."""
    return _own_t5(pipe, arguments, length, str)


def wan_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part, by UMT5's tokenizer."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return _own_t5(pipe, arguments, length, prompt_clean)


def _own_t5(pipe: Any, arguments: dict[str, Any], length: int, converted: Callable[[str], str]) -> list[Segment]:
    (segment,) = _only_t5(pipe, arguments, length, converted)
    opening, closing = _ends(pipe.tokenizer)
    return [replace(segment, opening=opening, closing=closing, padding=_side(pipe.tokenizer))]


def _ends(tokenizer: Any) -> tuple[int, int]:
    """Return how many special tokens a tokenizer puts before and behind a text."""
    if tokenizer is None:
        return 0, 0
    whole, own = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    before = next(at for at in range(len(whole)) if whole[at : at + len(own)] == own)
    return before, len(whole) - before - len(own)


def _side(tokenizer: Any) -> Literal["right", "left"]:
    return "left" if getattr(tokenizer, "padding_side", "right") == "left" else "right"


def sana_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Gemma's part."""
    tokenizer, instruction = pipe.tokenizer, "\n".join(arguments.get("complex_human_instruction") or [])
    before = max(0, len(tokenizer(instruction).input_ids) - 2) if instruction and tokenizer is not None else 0
    return [
        Segment(
            "Gemma",
            tokenizer,
            _texts(arguments.get("prompt")),
            0,
            length,
            limit=before + length,
            closing=0,
            marks=WORD_START,
            instruction=instruction,
            # The instruction's last token stays: it may have become one with the prompt's first.
            left_out=(1, 1 + before),
            converted=_cleaned(pipe, arguments),
            encoders=("text_encoder",),
            masked=True,
        )
    ]


def lumina2_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Gemma's part: a start token, the system's message and the prompt."""
    message = arguments.get("system_prompt") or pipe.system_prompt
    return [
        Segment(
            "Gemma",
            pipe.tokenizer,
            _texts(arguments.get("prompt")),
            0,
            length,
            limit=length,
            closing=0,
            marks=WORD_START,
            instruction=f"{message} <Prompt Start> ",
            encoders=("text_encoder",),
            masked=True,
        )
    ]


def hunyuan_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Bert's part and T5's."""
    text, bert = _texts(arguments.get("prompt")), pipe.transformer.config.text_len
    return [
        Segment(
            "Bert", pipe.tokenizer, text, 0, bert, bert, marks=WORD_GOES_ON, encoders=("text_encoder",), masked=True
        ),
        _t5(
            pipe.tokenizer_2,
            text,
            bert,
            pipe.transformer.config.text_len_t5,
            encoders=("text_encoder_2",),
            masked=True,
        ),
    ]


def pixart_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part."""
    return _only_t5(pipe, arguments, length, _cleaned(pipe, arguments))


def chroma_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return T5's part."""
    return _only_t5(pipe, arguments, length, _textual_inversion(pipe, pipe.tokenizer))


def flux2_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Mistral's part, or Qwen's in Klein's pipelines: a chat with the prompt in it, and padding."""
    # Mistral's is a processor.
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    if tokenizer is None:
        return [_byte_level("Qwen", None, None, length, length)]
    text, padding = arguments.get("prompt"), _side(tokenizer)
    if not hasattr(pipe, "system_message"):
        more = _in_chat(pipe.tokenizer, _FROM_USER, add_generation_prompt=True, enable_thinking=False)
        return [_byte_level("Qwen", tokenizer, text, length, length, padding=padding, **more)]
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    (chat,) = format_input([_HERE], pipe.system_message)
    more = _in_chat(pipe.tokenizer, chat, add_generation_prompt=False)
    more |= {"padding": padding, "converted": _without_pictures}
    return [_byte_level("Mistral", tokenizer, text, length, length, **more)]


# Where the prompt stands in a chat.
_HERE = "PROMPT"
_FROM_USER = [{"role": "user", "content": _HERE}]


def _in_chat(chats: Any, chat: list[Any], **options: Any) -> dict[str, Any]:
    """Return what stands before and behind a prompt in a chat, and how many special tokens around it.

    Args:
        chats: the tokenizer, or its processor.
        chat: the messages.
        options: of `apply_chat_template`.
    """
    tokenizer = getattr(chats, "tokenizer", chats)
    before, behind = chats.apply_chat_template(chat, tokenize=False, **options).rsplit(_HERE, 1)
    starts = bool(tokenizer.bos_token) and before.startswith(tokenizer.bos_token)
    opening, closing = (0, 0) if starts else _ends(tokenizer)
    return {"opening": opening, "closing": closing, "instruction": before, "behind": behind}


def zimage_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Qwen's part: a chat with the prompt in it."""
    if pipe.tokenizer is None:
        return [_byte_level("Qwen", None, None, length, length)]
    limit = arguments.get("max_sequence_length", 512)
    more = _in_chat(pipe.tokenizer, _FROM_USER, add_generation_prompt=True, enable_thinking=True)
    return [_byte_level("Qwen", pipe.tokenizer, arguments.get("prompt"), length, limit, masked=True, **more)]


def _without_pictures(text: str) -> str:
    return text.replace("[IMG]", "")


def cogview4_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return GLM's part, which is padded in front."""
    limit, (opening, closing) = min(length, arguments.get("max_sequence_length", 1024)), _ends(pipe.tokenizer)
    more = {"opening": opening, "closing": closing, "padding": "left"}
    return [_byte_level("GLM", pipe.tokenizer, arguments.get("prompt"), length, limit, **more)]


def qwen_segments(pipe: Any, arguments: dict[str, Any], length: int) -> list[Segment]:
    """Return Qwen2.5-VL's part: the prompt in a template, whose beginning has no columns."""
    texts, (before, behind) = _texts(arguments.get("prompt")), pipe.prompt_template_encode.split("{}")
    dropped, more = pipe.prompt_template_encode_start_idx, {"behind": behind, "masked": True}
    if arguments.get("image") is not None:
        # How many tokens the pictures before a prompt have is not known here; but the text ends with it.
        whole = length < arguments.get("max_sequence_length", 1024)
        alone = texts if texts is not None and len(texts) == 1 and whole else None
        return [_byte_level("Qwen", pipe.tokenizer, alone, length, length, padding="left", **more)]
    more |= {"instruction": before, "left_out": (0, dropped)}
    return [_byte_level("Qwen", pipe.tokenizer, texts, length, dropped + length, **more)]
