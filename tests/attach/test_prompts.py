"""Targets: words, phrases and token ids, and everything that can be wrong with them and with other arguments."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

import attnctl_fast as ac
from attnctl_fast.attach.prompts import Prompts
from tests.support import guided, tiny

PIPE = SimpleNamespace(tokenizer=tiny.tokenizer())
PROMPT = "A black BAG and an octopus, a pineapple and an apple"
# 0 start, 1 a, 2 black, 3 bag, 4 and, 5 an, 6 octo, 7 pus, 8 comma, 9 a, 10 pine, 11 apple (of pineapple), 12 and,
# 13 an, 14 apple, 15 end


def prompts(*texts: str, second: list[str] | None = None, pipe: Any = PIPE) -> Prompts:
    return guided.prompts(pipe, list(texts), second=second)


@pytest.mark.parametrize(
    ("targets", "positions"),
    [
        (["bag"], [3]),
        ("bag", [3]),
        (["Bag"], [3]),
        ([" bag "], [3]),
        (["black bag"], [2, 3]),
        (["bag", "black"], [3, 2]),
        (["octopus"], [6, 7]),
        (["octopus,"], [6, 7, 8]),
        (["apple"], [14]),
        (["pineapple"], [10, 11]),
        (["an"], [5]),
        (["an", 13], [5, 13]),
        ([13, "bag"], [13, 3]),
        ((14,), [14]),
        (14, [14]),
        ([["apple", "bag"]], [14, 3]),
    ],
)
def test_positions(targets: Any, positions: list[int]) -> None:
    assert prompts(PROMPT).positions(targets) == [positions]


def test_positions_in_several_prompts() -> None:
    two = prompts("a bag", "an apple and a bag")
    assert two.positions([["bag"], ["bag", "apple"]]) == [[2], [5, 2]]
    assert two.positions(["bag"]) == [[2], [5]]
    assert two.positions([2]) == [[2], [2]]
    assert two.special() == [[0, 3], [0, 6]]


def test_special_tokens() -> None:
    assert prompts("a bag").special() == [[0, 3]]
    assert prompts("").special() == [[0, 1]]
    assert prompts(" ".join(["bag"] * 40)).special() == [[0, tiny.LENGTH - 1]]
    assert guided.prompts(SimpleNamespace(tokenizer=tiny.tokenizer("!")), ["a bag"]).special() == [[0, 3]]
    assert guided.prompts(PIPE, None, 2).special() == [[0], [0]]


def test_textual_inversion_tokens() -> None:
    """A word of several learned vectors stands for all of them, and the token after it starts a word."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<thing>", "<thing>_1"])
    pipe = SimpleNamespace(
        tokenizer=tokenizer, maybe_convert_prompt=lambda text, _: text.replace("<thing>", "<thing> <thing>_1")
    )
    found = prompts("a <thing> bag", pipe=pipe).positions(["<thing>", "bag"])
    assert found == [[2, 3, 4]]
    assert prompts("a <thing> bag", pipe=pipe).words() == [{"a": [1], "<thing>": [2, 3], "bag": [4]}]


def test_words() -> None:
    spelled = {"a": [1], "black": [2], "bag": [3], "and": [4], "an": [5], "octopus": [6, 7], ",": [8], "a (2)": [9]}
    spelled |= {"pineapple": [10, 11], "and (2)": [12], "an (2)": [13], "apple": [14]}
    assert prompts(PROMPT, "", "dog").words() == [spelled, {}, {"dog": [1]}]
    cut = prompts(" ".join(["bag"] * 13 + ["octopus"])).words()
    assert cut is not None and list(cut[0].items())[-1] == ("octo", [14])
    assert prompts("a bag", "a dog").words(["A", 2]) == [{"A": [1], "2": [2]}] * 2
    assert prompts("a 5 5", "a 5").words([["5", 5], [2]]) == [{"5": [2], "5 (2)": [5]}, {"2": [2]}]
    assert prompts("a bag", "a dog", second=["a bag", "dog"]).words() == [{"a": [1], "bag": [2]}, {}]
    assert guided.prompts(PIPE, None, 2).words() is None
    assert guided.prompts(PIPE, ["a bag"], length=2 * tiny.LENGTH).words() is None  # encoded piece by piece


BAD_TARGETS = {
    "not in the prompt": (["zebra"], "targets holds 'zebra', which is not in the prompt 'A black BAG"),
    "tokens are listed": (["zebra"], r"whose tokens are 0 '<|startoftext|>', 1 'a', 2 'black', 3 'bag', 4 'and'"),
    "part of a word": (["pus"], "'pus', which is not in the prompt"),
    "front of a word": (["octo"], "'octo', which is not in the prompt"),
    "words that are not adjacent": (["black and"], "'black and', which is not in the prompt"),
    "id out of range": ([16], "token id 16, but the context has tokens 0..15"),
    "word and its own id": (["bag", 3], "names token 3 more than once"),
    "phrase and its word": (["black bag", "bag"], "names token 3 more than once"),
    "more than the prompt has": (list(range(15)), "names 15 tokens, but the prompt 'A black"),
    "too many lists": ([["bag"], ["apple"]], "holds 2 lists, but there are 1 prompts; pass one list per prompt"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets_for_a_prompt(case: str) -> None:
    targets, message = BAD_TARGETS[case]
    ac.AttentionRegulation(targets)
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts(PROMPT).positions(targets)


def test_words_beyond_the_end_of_the_context() -> None:
    text = " ".join(["bag"] * 20) + " apple"
    with pytest.raises(ValueError, match="'apple', which was cut off: the tokenizer keeps 16 tokens"):
        prompts(text).positions(["apple"])


def test_second_prompt_of_sdxl() -> None:
    assert prompts("a bag", second=["a bag and an apple"]).positions(["bag"]) == [[2]]
    with pytest.raises(ValueError, match=r"'bag', which stands at \[2\].*but elsewhere in prompt_2 'the red bag'"):
        prompts("a bag", second=["the red bag"]).positions(["bag"])
    with pytest.raises(ValueError, match="'bag', which is not in the prompt 'an apple'"):
        prompts("a bag", second=["an apple"]).positions(["bag"])
    assert prompts("a bag", second=["an apple"]).positions([2]) == [[2]]


def test_second_prompt_reaches_the_check() -> None:
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl")
    with pytest.raises(ValueError, match="elsewhere in prompt_2"), ac.control(pipe, ac.AttentionRegulation(["bag"])):
        pipe("a bag", prompt_2="the red bag", num_inference_steps=1, output_type="latent")


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no targets": ({"targets": []}, "has an empty list; name at least one"),
    "no targets for one prompt": ({"targets": [["bag"], []]}, "has an empty list"),
    "an empty word": ({"targets": ["bag", " "]}, "holds ' '; an empty word"),
    "the same word twice": ({"targets": ["bag", "Bag"]}, "holds 'bag' more than once"),
    "the same id twice": ({"targets": [3, 3]}, "holds 3 more than once"),
    "a negative id": ({"targets": [-1]}, "token id -1; ids count from 0"),
    "words and lists": ({"targets": ["bag", ["apple"]]}, "not a mix"),
    "a number": ({"targets": [1.5]}, "holds 1.5; targets are"),
    "a truth value": ({"targets": [True]}, "holds True; targets are"),
    "nothing": ({"targets": None}, "targets is None; pass a list"),
    "a set": ({"targets": {"bag"}}, "pass a list"),
    "no layers": ({"layers": []}, "layers is []; pass name prefixes"),
    "layers by number": ({"layers": [1]}, "layers is [1]; pass name prefixes"),
    "share above one": ({"edit_steps": 1.5}, "edit_steps is 1.5; it must be a number at least 0 and at most 1"),
    "negative count": ({"edit_steps": -1}, "edit_steps is -1; it must be an int of at least 0"),
    "negative strength": ({"strength": -0.5}, "strength is -0.5; it must be a number at least 0"),
    "strength not finite": ({"strength": float("nan")}, "strength is nan"),
    "no descent": ({"steps": 0}, "steps is 0; it must be an int of at least 1"),
    "step size zero": ({"step_size": 0.0}, "step_size is 0.0; it must be a number above 0"),
    "ema": ({"ema": 1.5}, "ema is 1.5; it must be a number at least 0 and at most 1"),
    "decay": ({"decay": 0}, "decay is 0; it must be a number above 0 and at most 1"),
    "convention": ({"convention": "mine"}, "convention is 'mine'; it must be one of 'official', 'paper'"),
    "seed": ({"seed": 1.0}, "seed is 1.0; it must be an int"),
    "sigma": ({"sigma": 0.0}, "sigma is 0.0; it must be a number above 0"),
    "sigma per axis": ({"sigma": (1.0, -1.0)}, "sigma is -1.0"),
    "quantile": ({"quantile": 2.0}, "quantile is 2.0"),
    "penalty": ({"penalty": -1.0}, "penalty is -1.0"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.AttentionRegulation(**({"targets": ["bag"]} | arguments))


@pytest.mark.parametrize("targets", [[0], [3]])
def test_special_tokens_cannot_be_targets_while_they_are_pinned(targets: list[int]) -> None:
    pipe = tiny.pipeline()
    options = {"num_inference_steps": 1, "output_type": "latent"}
    pinned = ac.AttentionRegulation(targets)
    with pytest.raises(ValueError, match=rf"token id {targets[0]}, the start or end of text.*pin_special=False"):  # noqa: SIM117
        with ac.control(pipe, pinned):
            pipe("a bag", **options)
    with ac.control(pipe, ac.AttentionRegulation(targets, pin_special=False)):
        pipe("a bag", **options)


def test_methods_are_values() -> None:
    one = ac.AttentionRegulation(["bag", "black bag"], layers=["down_blocks.1"])
    assert one == ac.AttentionRegulation(("bag", "black bag"), layers=("down_blocks.1",))
    assert len({one, ac.AttentionRegulation([["bag"], [2]], layers=ac.by_downsampling(2))}) == 2
