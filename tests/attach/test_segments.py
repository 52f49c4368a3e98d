"""Words in the text of several encoders: where SD 3, FLUX.1, Chroma, PixArt, Sana, HunyuanDiT and Qwen-Image have
them."""

from __future__ import annotations

import inspect
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnctl_fast.attach.families import FAMILIES
from attnctl_fast.attach.prompts import Prompts
from tests.support import tiny_text
from tests.support import tiny_transformers as tiny

PROMPT = "a photo of an octopus and a pineapple and a bag, an apple"
T5 = tiny.T5_LENGTH
LENGTHS = {
    "sd3": 16 + T5,
    "hunyuan": 77 + 256,
    "flux2": T5 + 8,
    "flux2_klein": T5 + 8,
    "lumina2": 48,
    "zimage": T5 + 16,
}

pipeline = cache(tiny.pipeline)


def prompts(kind: str, *texts: str, pipe: Any = None, length: int | None = None, **arguments: Any) -> Prompts:
    pipe = pipe or pipeline(kind)
    arguments = {"prompt": list(texts) or None, **arguments}
    if kind == "sana":
        arguments.setdefault("complex_human_instruction", tiny_text.INSTRUCTION)
    length = length or LENGTHS.get(kind, T5)
    limit = LENGTHS[kind] if kind == "zimage" else T5
    arguments.setdefault("max_sequence_length", length if kind.startswith("flux2") else limit)
    family = next(family for family in FAMILIES if family.name == kind.split("_")[0])
    return Prompts(family.segments(pipe, arguments, length), len(texts) or 1, length)


class Output(tuple):
    """What a text encoder returns, CLIP's with its features elsewhere than others'."""

    hidden_states: list[torch.Tensor]
    pooler_output: torch.Tensor
    last_hidden_state: torch.Tensor


class Echo(torch.nn.Module):
    """A text encoder whose features are its input: what a column holds says which token it is of."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.width = getattr(encoder.config, "d_model", None) or encoder.config.get_text_config().hidden_size
        self.projects = hasattr(encoder, "text_projection")
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, *_: Any, **options: Any) -> Output:
        features = input_ids[..., None].float().expand(-1, -1, self.width)
        pooled = features[:, 0]
        output = Output((pooled if self.projects else features,))
        output.hidden_states, output.pooler_output, output.last_hidden_state = [features] * 3, pooled, features
        return output


def echoing(kind: str) -> Any:
    pipe = tiny.pipeline(kind)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, Echo(getattr(pipe, name)))
    return pipe


def encoded(kind: str, pipe: Any, text: str) -> torch.Tensor:
    """The token that every column of the pipeline's own text is of."""
    given: dict[str, Any] = {"prompt": text, "prompt_2": None, "prompt_3": None, "max_sequence_length": T5}
    given |= {"complex_human_instruction": tiny_text.INSTRUCTION, "device": torch.device("cpu")}
    longer = {"max_sequence_length": LENGTHS[kind]} if kind in ("lumina2", "zimage") else {}
    given |= {"text_encoder_out_layers": (0, 1, 2), **longer}
    known = inspect.signature(type(pipe).encode_prompt).parameters
    given = {name: value for name, value in given.items() if name in known}
    if kind != "hunyuan":
        return pipe.encode_prompt(**given)[0][0][:, 0]
    parts = [pipe.encode_prompt(**given | {"max_sequence_length": None, "text_encoder_index": i})[0] for i in (0, 1)]
    return torch.cat([part[0, :, 0] for part in parts])


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("text", [PROMPT, "bag", "", " ".join(["A black BAG, an octopus"] * 12)])
def test_columns_are_those_of_the_pipeline(kind: str, text: str) -> None:
    pipe = echoing(kind)
    columns = encoded(kind, pipe, text)
    known = prompts(kind, text, pipe=pipe, length=len(columns))
    assert known.rows is not None
    for segment, (tokens,) in zip(known.segments, known.rows, strict=True):
        ids = columns[segment.start : segment.start + segment.length].int().tolist()
        assert len(tokens.ids) <= len(ids) == segment.length
        assert tuple(ids[: len(tokens.ids)]) == tokens.ids
        # Qwen-Image pads embeddings, not tokens.
        assert set(ids[len(tokens.ids) :]) <= {0 if kind == "qwen" else segment.tokenizer.pad_token_id}


PLACES: dict[str, dict[str, list[int]]] = {
    # 0 a, 1 photo, 2 of, 3 an, 4 octo, 5 pus, 6 and, 7 a, 8 pine, 9 apple (of pineapple), 10 and, 11 a, 12 bag,
    # 13 comma, 14 an, 15 apple, 16 end
    "pixart": {"bag": [12], "octopus": [4, 5], "pineapple": [8, 9], "apple": [15], "bag, an": [12, 13, 14]},
    # 0 start, 1 a
    "sana": {"bag": [13], "octopus": [5, 6], "pineapple": [9, 10], "apple": [16], "bag, an": [13, 14, 15]},
    # CLIP: 0 start, 1 a, ... 13 bag, 14 comma, 15 end: the rest is cut off; T5 from 16 on
    "sd3": {"bag": [13, 28], "octopus": [5, 6, 20, 21], "apple": [31], "bag, an": [28, 29, 30]},
    "hunyuan": {"bag": [13, 89], "octopus": [5, 6, 81, 82], "apple": [16, 92], "bag, an": [13, 14, 15, 89, 90, 91]},
}
PLACES |= {"pixart_alpha": PLACES["pixart"], "pixart_sigma": PLACES["pixart"]}
PLACES |= {"flux": PLACES["pixart"], "chroma": PLACES["pixart"], "qwen": PLACES["pixart"]}
PLACES |= {"auraflow": PLACES["pixart"]}
# 16 tokens behind 2 special ones, and padding before these: in 24 columns 6.
PLACES["cogview4"] = {word: [place + 8 for place in places] for word, places in PLACES["pixart"].items()}
# Behind the chat's beginning, and before its end: 8 and 1 tokens behind padding to 32 columns; 3 tokens.
PLACES["flux2"] = {word: [place + 15 for place in places] for word, places in PLACES["pixart"].items()}
# A start, and 18 tokens of the system's message.
PLACES |= {"wan": PLACES["pixart"], "ltx": PLACES["pixart"]}
PLACES["zimage"] = {word: [place + 3 for place in places] for word, places in PLACES["pixart"].items()}
PLACES["lumina2"] = {word: [place + 19 for place in places] for word, places in PLACES["pixart"].items()}
PLACES["flux2_klein"] = {word: [place + 3 for place in places] for word, places in PLACES["pixart"].items()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_words_stand_in_every_encoder_that_has_them(kind: str) -> None:
    known = prompts(kind, PROMPT)
    for word, positions in PLACES[kind].items():
        assert known.positions([word]) == [positions]
        assert known.positions([f" {word.upper()} "]) == [positions]
    words = known.words()
    assert words is not None
    assert {word: words[0][word] for word in ("bag", "octopus", "apple")} == {
        word: PLACES[kind][word] for word in ("bag", "octopus", "apple")
    }


def test_a_word_as_it_is_written() -> None:
    """Capitals, brackets and quotes change a sentence piece's tokens, and not the word."""
    known = prompts("flux", '"Bag" (apple) apples bag-an snapple')
    words = known.words()
    assert words is not None
    assert {"Bag", "apple", "apples", "bag (2)", "an", "snapple"} <= set(words[0])
    assert known.strings([words[0]["Bag"]]) == [["B", "a", "g"]]
    assert known.positions(["bag"]) == [words[0]["Bag"]]
    assert known.positions(["apple"]) == [words[0]["apple"]]
    assert known.occurrences("bag", 0, "targets") == [words[0]["Bag"], words[0]["bag (2)"]]
    assert len(known.occurrences("apple", 0, "targets")) == 1
    for part in ("app", "snap", "les"):
        with pytest.raises(ValueError, match="which is not in the prompt"):
            known.positions([part])


def test_chinese_words_are_written_without_spaces() -> None:
    known = prompts("hunyuan", "a bag, 苹果bag")
    assert known.positions(["苹果"]) == [[4, 5]]
    assert known.occurrences("bag", 0, "targets") == [[2, 78], [6, 82, 83, 84]]


def test_occurrences_are_joined() -> None:
    known = prompts("sd3", "a bag and a bag and a bag", "dog")
    assert known.occurrences("bag", 0, "targets") == [[2, 17], [5, 20], [8, 23]]
    assert known.words()[0]["bag (2)"] == [5, 20]  # type: ignore[index]
    # CLIP cut the third off.
    text = "a bag and a bag " + "and " * 9 + "bag"
    assert prompts("sd3", text).occurrences("bag", 0, "targets") == [[2, 17], [5, 20], [30]]


def test_prompts_of_their_own() -> None:
    known = prompts("sd3", "a bag", prompt_2=["the bag"], prompt_3="a photo of an apple")
    assert known.positions(["bag", "apple"]) == [[2, 20]]
    assert known.words() == [{"bag": [2], "a": [16], "photo": [17], "of": [18], "an": [19], "apple": [20]}]
    with pytest.raises(ValueError, match=r"stands at \[2\].*but elsewhere in prompt_2 'the red bag'"):
        prompts("sd3", "a bag", prompt_2="the red bag").positions(["bag"])
    with pytest.raises(ValueError, match="'zebra', which is not in the prompt 'a bag' and 'an apple', whose tokens"):
        prompts("sd3", "a bag", prompt_3=["an apple"]).positions(["zebra"])
    assert prompts("flux", "a bag", prompt_2="an apple").positions(["apple"]) == [[1]]
    assert prompts("flux", "a bag", prompt_2=None).positions(["bag"]) == [[1]]


def test_without_t5() -> None:
    known = prompts("sd3", "a bag", pipe=pipeline("sd3", t5=False))
    assert known.positions(["bag"]) == [[2]]
    assert known.special() == [[0, 3]] and known.content() == [[[1, 2]]]
    assert known.positions([30]) == [[30]]


ERRORS = {
    "not there": (
        ("sd3", "a bag", "zebra"),
        "'zebra', which is not in the prompt 'a bag', whose tokens are CLIP: 0 '<|startoftext|>', 1 'a', 2 'bag', "
        "3 '<|endoftext|>'; T5: 16 'a', 17 'bag', 18 '</s>'; use words",
    ),
    "not there, one encoder": (("flux", "a bag", "zebra"), "whose tokens are 0 'a', 1 'bag', 2 '</s>'; use words"),
    "not there, Bert": (("hunyuan", "an octopus", "octo"), "Bert: 0 '[CLS]', 1 'an', 2 'octo', 3 'pus', 4 '[SEP]'; T5"),
    "unknown to the tokenizer": (("flux", "a 苹果", "天"), "whose tokens are 0 'a', 1 '▁', 2 '<unk>', 3 '</s>'"),
    "cut off by both": (
        ("sd3", "dog " * 30 + "apple", "apple"),
        "'apple', which was cut off: CLIP keeps 16 tokens and T5 keeps 24 tokens of the prompt 'dog dog",
    ),
    "cut off by one": (
        ("flux", "dog " * 30 + "apple", "apple"),
        "cut off: the tokenizer keeps 24 tokens of the prompt",
    ),
    "cut off after an instruction": (
        ("sana", "dog " * 30 + "apple", "apple"),
        "cut off: the tokenizer keeps 24 tokens",
    ),
    "cut off behind padding": (("cogview4", "dog " * 30 + "apple", "apple"), "cut off: the tokenizer keeps 24 tokens"),
    "not there, behind padding": (
        ("cogview4", "a bag", "zebra"),
        "whose tokens are 20 '[gMASK]', 21 '<sop>', 22 'a', 23 'bag'; use words",
    ),
    "of a system's message": (("lumina2", "a bag", "photo"), "whose tokens are 19 'a', 20 'bag'; use words"),
    "of the template": (("qwen", "a bag", "user"), "whose tokens are 0 'a', 1 'bag'; use words"),
    "cut off in a template": (("qwen", "dog " * 30 + "apple", "apple"), "cut off: the tokenizer keeps 24 tokens"),
    "of the instruction": (("sana", "a bag", "ball"), "whose tokens are 0 '<bos>', 1 'a', 2 'bag'; use words"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_words_that_are_not_there(case: str) -> None:
    (kind, text, word), message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts(kind, text).positions([word])


def test_half_a_word_is_not_the_word() -> None:
    """What is left of a word that was cut off has no name of its own to be found by."""
    text = "dog " * 22 + "octopus"
    assert prompts("flux", text).strings([[21, 22, 23]]) == [["dog", "octo", "</s>"]]
    for word in ("octopus", "octo"):
        with pytest.raises(ValueError, match="cut off" if word == "octopus" else "not in the prompt"):
            prompts("flux", text).positions([word])


SPECIAL = {
    "pixart_alpha": [2],
    "pixart_sigma": [2],
    "sana": [0],
    "hunyuan": [0, 3, 79],
    "sd3": [0, 3, 18],
    "flux": [2],
    "chroma": [2],
    "qwen": [],
    "auraflow": [2],
    "cogview4": [20, 21],
    "flux2": [],
    "flux2_klein": [],
    "lumina2": [0],
    "wan": [2],
    "ltx": [2],
    "zimage": [],
}
OWN = {
    "sana": [[1, 2]],
    "sd3": [[1, 2], [16, 17]],
    "hunyuan": [[1, 2], [77, 78]],
    "cogview4": [[22, 23]],
    "flux2": [[29, 30]],
    "flux2_klein": [[3, 4]],
    "zimage": [[3, 4]],
    "lumina2": [[19, 20]],
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_special_tokens_and_the_prompts_own(kind: str) -> None:
    known = prompts(kind, "a bag", "")
    assert known.special()[0] == SPECIAL[kind]
    own = known.content()
    assert own is not None
    assert [rows[0] for rows in own] == OWN.get(kind, [[0, 1]])
    assert [rows[1] for rows in own] == [[] for _ in own]
    given = prompts(kind)
    assert given.content() is None and given.words() is None and given.strings([[0]]) is None
    assert given.special() == [[0] if kind in ("sana", "sd3", "hunyuan", "lumina2") else []]
    assert given.positions([3]) == [[3]]
    with pytest.raises(ValueError, match="given prompt_embeds instead of a prompt"):
        given.positions(["bag"])


def test_strings() -> None:
    known = prompts("sd3", "an octopus", "a")
    assert known.strings([[0, 1, 2, 3, 4, 5], [16, 17, 18]]) == [
        ["<|startoftext|>", "an", "octo", "pus", "<|endoftext|>", ""],
        ["a", "</s>", ""],
    ]
    assert known.strings([[16, 17, 18, 19, 20]] * 2) == [["an", "octo", "pus", "</s>", ""], ["a", "</s>", "", "", ""]]


def test_an_instruction_whose_last_token_stays() -> None:
    """Without a space at its end the last token of the instruction is a column too, and no word of the prompt."""
    known = prompts("sana", "a bag", complex_human_instruction=["the photo of a dog."])
    assert known.strings([[0, 1, 2, 3, 4]]) == [["<bos>", ".", "a", "bag", ""]]
    assert known.positions(["bag"]) == [[3]]
    assert known.content() == [[[2, 3]]] and known.special() == [[0]]
    assert prompts("sana", "a bag", complex_human_instruction=None).positions(["bag"]) == [[2]]


def test_a_chat_of_a_processor() -> None:
    """FLUX.2 has its tokenizer within one; a picture's token in a prompt is left out."""
    tokens = tiny_text.mistral_tokenizer()
    processor = SimpleNamespace(tokenizer=tokens, apply_chat_template=tokens.apply_chat_template)
    pipe = SimpleNamespace(tokenizer=processor, system_message="a photo.")
    assert prompts("flux2", "a [IMG]bag", pipe=pipe, length=12).content() == [[[9, 10]]]
    tokens.padding_side = "right"
    assert prompts("flux2", "a [IMG]bag", pipe=pipe, length=12).content() == [[[7, 8]]]
    tokens.chat_template = tokens.chat_template.removeprefix("{{ bos_token }}")
    assert prompts("flux2", "a bag", pipe=pipe, length=12).content() == [[[6, 7]]]
    unknown = prompts("flux2", "a bag", pipe=SimpleNamespace(tokenizer=None), length=12)
    assert unknown.content() is None and unknown.positions([11]) == [[11]]


def test_words_behind_pictures() -> None:
    """How many tokens a picture before the prompt has is not known; the text ends as always."""
    known = prompts("qwen", "a bag", image=object(), length=20)
    assert known.content() == [[[13, 14]]] and known.positions(["bag"]) == [[14]]
    # Of several prompts some may be padded, and of one that was cut the end is gone.
    assert prompts("qwen", "a bag", "a dog", image=object(), length=20).content() is None
    assert prompts("qwen", "a bag", image=object(), length=20, max_sequence_length=20).content() is None


def test_a_template_that_is_left_out_in_part() -> None:
    """Pipelines leave a number of tokens out, whatever the tokenizer made of the template."""
    pipe = tiny.pipeline("qwen")
    whole = pipe.prompt_template_encode_start_idx
    pipe.prompt_template_encode_start_idx = whole - 3
    known = prompts("qwen", "a bag", pipe=pipe, length=10)
    assert known.strings([[0, 3, 4, 5]]) == [["<|im_start|>", "a", "bag", "<|im_end|>"]]
    assert known.positions(["bag"]) == [[4]] and known.content() == [[[3, 4]]]
    # The prompt's end is gone, and some of what stands behind it.
    assert prompts("qwen", "a bag", length=4).content() == [[[0, 1]]]
    assert prompts("qwen", "a photo of a bag", length=3).content() == [[[0, 1, 2]]]


def test_words_of_bytes() -> None:
    """Letters of other scripts are bytes, some of which are parts of one."""
    known = prompts("qwen", 'Ein Äpfel, für 苹果 of 苹 "bag"\nballs', length=60)
    words = known.words()
    assert words is not None
    assert {"Ein", "Äpfel", "für", "苹", "果", "bag", "balls"} <= set(words[0])
    assert known.positions(["äpfel"]) == [words[0]["Äpfel"]]
    assert [len(place) for place in known.occurrences("苹果", 0, "targets")] == [7]
    assert len(known.occurrences("苹", 0, "targets")) == 2
    with pytest.raises(ValueError, match="which is not in the prompt"):
        known.positions(["果苹"])
    "".join(known.strings([list(range(40))])[0]).encode()  # type: ignore[index]


def test_captions_are_cleaned_as_the_pipeline_does() -> None:
    known = prompts("pixart_sigma", "  A Bag  ")
    assert known.rows is not None and known.rows[0][0].text == "  A Bag  "
    assert known.positions(["BAG"]) == [[1]] and known.strings([[0, 1]]) == [["a", "bag"]]


def test_textual_inversion_in_t5() -> None:
    tokenizer = tiny_text.t5_tokenizer()
    tokenizer.add_tokens(["<thing>", "<thing>_1"])
    pipe = SimpleNamespace(
        tokenizer=tokenizer, maybe_convert_prompt=lambda text, _: text.replace("<thing>", "<thing> <thing>_1")
    )
    known = prompts("chroma", "a <thing> bag", pipe=pipe)
    assert known.words() == [{"a": [0], "<thing>": [1, 2], "bag": [3]}]
    assert known.positions(["<thing>", "bag"]) == [[1, 2, 3]]


def test_more_targets_than_tokens() -> None:
    with pytest.raises(ValueError, match="names 5 tokens, but the prompt 'a bag' has only 4: CLIP: 0"):
        prompts("sd3", "a bag").positions([0, 1, 2, 3, 4])
