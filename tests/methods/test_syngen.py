"""SynGen: its loss against loops over pairs and pieces, its words, the parse of a prompt, bad input."""

from __future__ import annotations

import builtins
import itertools
import math
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.methods import _syntax
from attnctl_fast.methods.syngen import symmetric_kl
from tests.support import guided

PROMPTS = ("a red, black pineapple and a blue octopus", "a red cat and dog")
# 1 a, 2 red, 3 comma, 4 black, 5 pine, 6 apple, 7 and, 8 a, 9 blue, 10 octo, 11 pus
PAIRS = [[("red", "black", "pineapple"), ("blue", "octopus")], [("red", "cat"), ("red", "dog")]]
PLACES = [[[[2], [4], [5, 6]], [[9], [10, 11]]], [[[2], [3]], [[2], [5]]]]
ENDS = (12, 6)


def divergence(a: list[float], b: list[float]) -> float:
    a, b = ([x / sum(row) for x in row] for row in (a, b))
    forward = sum(p * math.log(p / q) for p, q in zip(a, b, strict=True))
    return (forward + sum(q * math.log(q / p) for p, q in zip(a, b, strict=True))) / 2


def textbook(maps: dict[int, list[float]], groups: list[list[list[int]]]) -> float:
    """The released code's rules, for the maps of the words of one prompt by their positions."""
    loss = 0.0
    for *modifiers, noun in groups:
        inside = {position for word in [*modifiers, noun] for position in word}
        outside = [position for position in maps if position not in inside]
        for modifier in modifiers:
            loss += max(divergence(maps[s], maps[d]) for s, d in itertools.product(modifier, noun))
            for word in (modifier, noun):
                away = sum(max(divergence(maps[s], maps[u]) for s in word) for u in outside)
                loss -= away / len(outside) / 2 if outside else 0.0
    return loss


def test_loss_is_the_textbook() -> None:
    method = ac.SynGen(PAIRS)
    context = guided.started(method, guided.call(*PROMPTS, images=2))
    maps = guided.maps_for(context)
    for sample, loss in enumerate(method.loss(maps, context).tolist()):
        own = {place: maps[sample, place - 1].tolist() for place in range(1, ENDS[sample // 2])}
        assert loss == pytest.approx(textbook(own, PLACES[sample // 2]), rel=1e-12)


def test_loss_away_from_named_tokens_only() -> None:
    method = ac.SynGen([(2, 3), (6, 7)], unrelated=[1, 7])
    context = guided.started(method, guided.embedded(1))
    assert context.token_ids.tolist() == [[1, 2, 3, 6, 7]]
    maps = guided.maps_for(context)
    rows = dict(zip(context.token_ids[0].tolist(), maps[0].tolist(), strict=True))
    expected = textbook({place: rows[place] for place in (1, 2, 3, 7)}, [[[2], [3]]])
    expected += textbook({place: rows[place] for place in (1, 6, 7)}, [[[6], [7]]])
    assert method.loss(maps, context).item() == pytest.approx(expected, rel=1e-12)


def test_a_prompt_with_nothing_else() -> None:
    method = ac.SynGen([("red", "cat")])
    context = guided.started(method, guided.call("red cat"))
    maps = guided.maps_for(context)
    assert method.loss(maps, context).item() == pytest.approx(divergence(*maps[0].tolist()), rel=1e-12)


def test_divergence_in_float32() -> None:
    """Sharp maps, two of them nearly alike: right to a few units in the last place of the largest divergence."""
    torch.manual_seed(0)
    maps = torch.rand(1, 6, 256) ** 8 + 1e-4
    maps[0, 1] = maps[0, 0] * (1 + 1e-3 * torch.rand(256))
    wide = maps.double() / maps.double().sum(2, keepdim=True)
    truth = ((wide[:, :, None] - wide[:, None]) * (wide[:, :, None].log() - wide[:, None].log())).sum(3) / 2
    assert (symmetric_kl(maps) - truth).abs().max() < 4 * torch.finfo().eps * truth.max()
    torch.testing.assert_close(symmetric_kl(maps.double()), truth, rtol=1e-10, atol=1e-12)


def test_gradient() -> None:
    torch.manual_seed(0)
    method = ac.SynGen(PAIRS)
    context = guided.started(method, guided.call(*PROMPTS))
    real = context.token_ids >= 0
    maps = (0.1 + torch.rand(2, 11, 20, dtype=torch.float64)) * real[..., None]
    torch.autograd.gradcheck(lambda x: method.loss(x * real[..., None], context), maps.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_in_a_batch_is_the_sample_alone(dtype: torch.dtype) -> None:
    method = ac.SynGen(PAIRS)
    batch = guided.started(method, guided.call(*PROMPTS))
    maps = guided.maps_for(batch, dtype=dtype)
    loss, gradient = guided.gradient(method, maps, batch)
    assert loss.dtype == dtype
    for index, pairs in enumerate(PAIRS):
        alone = ac.SynGen(pairs)
        context = guided.started(alone, guided.call(PROMPTS[index]))
        own = maps[index : index + 1, : context.token_ids.shape[1]]
        one, one_gradient = guided.gradient(alone, own, context)
        tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(loss[index : index + 1], one, **tolerance)
        torch.testing.assert_close(gradient[index : index + 1, : own.shape[1]], one_gradient, **tolerance)
        assert not gradient[index, own.shape[1] :].any()


def test_zero_maps_have_finite_gradients() -> None:
    method = ac.SynGen(PAIRS)
    context = guided.started(method, guided.call(*PROMPTS))
    maps = guided.maps_for(context)
    maps[0, 3] = 0
    maps[0, :, 7] = 0
    maps[1] = 0
    loss, gradient = guided.gradient(method, maps, context)
    assert loss.isfinite().all() and gradient.isfinite().all() and gradient[0].any()


BAD_CALLS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "not in the prompt": (
        [("red", "dog")],
        ("a red cat",),
        "pairs holds 'dog', which is not in the prompt 'a red cat'",
    ),
    "twice": ([("red", "red cat")], ("a red cat",), "names token 2 more than once"),
    "start of text": (
        [(0, "cat")],
        ("a red cat",),
        "pairs holds the token id 0, but the prompt's words are tokens 1..3",
    ),
    "end of text": ([(4, "cat")], ("a red cat",), "pairs holds the token id 4"),
    "too many lists": (PAIRS, ("a red cat",), "holds 2 lists of groups, but there are 1 prompts"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_pairs_that_do_not_fit_the_prompt(case: str) -> None:
    pairs, texts, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.SynGen(pairs).tokens(guided.call(*texts).prompts)


def test_embeddings_need_the_unrelated_tokens() -> None:
    with pytest.raises(ValueError, match="unknown .* token ids as unrelated="):
        ac.SynGen([(2, 3)]).tokens(guided.embedded().prompts)
    with pytest.raises(ValueError, match="unrelated holds the token id 16"):
        ac.SynGen([(2, 3)], unrelated=[16]).tokens(guided.embedded().prompts)
    with pytest.raises(ValueError, match=r"pairs is None, but the words .* unknown .* name the pairs yourself"):
        ac.SynGen(unrelated=[5]).tokens(guided.embedded().prompts)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a word alone": ({"pairs": [("bag",)]}, "has the group ('bag',); name at least 2 words"),
    "words": ({"pairs": ["red", "bag"]}, "pass a list of groups such as"),
    "one pair without its list": ({"pairs": ("red", "bag")}, "pass a list of groups such as"),
    "no pairs": ({"pairs": []}, "pass a list of groups such as"),
    "unrelated": ({"unrelated": [-1]}, "unrelated holds the token id -1"),
    "parser": ({"parser": 3}, "parser is 3; pass the name of a spaCy model"),
    "steps": ({"steps": -1}, "steps is -1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.SynGen(**({"pairs": [("red", "bag")]} | arguments))


def test_presets() -> None:
    method = ac.SynGen.official([("red", "bag")])
    assert method == ac.SynGen([["red", "bag"]]) and hash(method) == hash(ac.SynGen([("red", "bag")]))
    assert (method.steps, method.scale, method.bounds(50)) == (25, 20.0, {})
    assert method.schedule == ac.schedules.constant()


# A parse is a list of words (text, part of speech, relation, index of the head), as spaCy gives them.
Word = tuple[str, str, str, int]


def parsed(*words: Word) -> list[Any]:
    doc = [
        SimpleNamespace(i=i, text=text, pos_=pos, dep_=dep, children=[]) for i, (text, pos, dep, _) in enumerate(words)
    ]
    for word, (*_, head) in zip(doc, words, strict=True):
        word.head = doc[head]
        if word.head is not word:
            word.head.children.append(word)
    return doc


PARSES: dict[str, tuple[list[Word], list[list[str]]]] = {
    "adjectives": (
        [("a", "DET", "det", 2), ("red", "ADJ", "amod", 2), ("bag", "NOUN", "ROOT", 2), ("and", "CCONJ", "cc", 2)]
        + [("a", "DET", "det", 6), ("blue", "ADJ", "amod", 6), ("cat", "NOUN", "conj", 2)],
        [["red", "bag"], ["blue", "cat"]],
    ),
    "joined adjectives": (
        [("a", "DET", "det", 4), ("red", "ADJ", "amod", 4), ("and", "CCONJ", "cc", 1)]
        + [("blue", "ADJ", "conj", 1), ("bag", "NOUN", "ROOT", 4)],
        [["red", "blue", "bag"]],
    ),
    "a noun before a noun": (
        [("a", "DET", "det", 2), ("dog", "NOUN", "compound", 2), ("bag", "NOUN", "ROOT", 2)],
        [["dog", "bag"]],
    ),
    "relative clause": (
        [("a", "DET", "det", 1), ("dog", "NOUN", "ROOT", 1), ("that", "PRON", "nsubj", 3)]
        + [("is", "AUX", "relcl", 1), ("red", "ADJ", "acomp", 3)],
        [["red", "dog"]],
    ),
    "sentence": (
        [("the", "DET", "det", 1), ("dog", "NOUN", "nsubj", 2), ("is", "AUX", "ROOT", 2), ("red", "ADJ", "acomp", 2)],
        [["red", "dog"]],
    ),
    "nothing": ([("a", "DET", "det", 1), ("bag", "NOUN", "ROOT", 1)], []),
}


@pytest.mark.parametrize("case", PARSES)
def test_nouns_and_their_modifiers(case: str) -> None:
    words, groups = PARSES[case]
    assert [[word.text for word in group] for group in _syntax.noun_groups(parsed(*words))] == groups


def test_found_pairs_are_where_the_words_stand() -> None:
    """Repeated words, words of several tokens, words that the parser splits otherwise."""
    doc = parsed(
        ("A", "DET", "det", 2), ("red", "ADJ", "amod", 2), ("octopus", "NOUN", "ROOT", 2), (",", "PUNCT", "punct", 2),
        ("a", "DET", "det", 6), ("red", "ADJ", "amod", 6), ("pine", "NOUN", "conj", 2), ("apple", "NOUN", "dep", 6),
    )  # fmt: skip
    method = ac.SynGen(parser=lambda text: doc)
    prompts = guided.call("A red octopus, a red pineapple").prompts
    assert _syntax.parsed_places(method.parser, prompts) == [[[[2], [3, 4]], [[7], [8]]]]
    assert method.tokens(prompts) == [list(range(1, 10))]
    named = ac.SynGen([[(2, "octopus"), (7, 8)]])
    context, other = (guided.started(one, guided.call("A red octopus, a red pineapple")) for one in (method, named))
    maps = guided.maps_for(context)
    expected = ac.SynGen([(7, 8)])
    assert guided.started(expected, guided.call("A red octopus, a red pineapple")).prepared.attract.sum() == 1
    torch.testing.assert_close(method.loss(maps, context), named.loss(maps, other))


def test_prompts_without_pairs_stay_as_they_are() -> None:
    docs = {"a bag": PARSES["nothing"][0], "a dog bag": PARSES["a noun before a noun"][0]}
    method = ac.SynGen(parser=lambda text: parsed(*docs[text]))
    for texts in (("a bag",), ("a bag", "a dog bag")):
        context = guided.started(method, guided.call(*texts))
        loss, gradient = guided.gradient(method, guided.maps_for(context), context)
        assert loss[0] == 0 and not gradient[0].any()
        assert len(texts) == 1 or gradient[1].any()
    with pytest.raises(ValueError, match="but it is empty; give the image a prompt"):
        ac.SynGen(parser=lambda text: []).tokens(guided.call("").prompts)


def test_text_beyond_the_context_is_left_out() -> None:
    doc = parsed(
        *[("bag", "NOUN", "ROOT", 0)] + [("bag", "NOUN", "conj", 0)] * 18,
        ("red", "ADJ", "amod", 20), ("cat", "NOUN", "conj", 0),
    )  # fmt: skip
    prompts = guided.call(" ".join(["bag"] * 19 + ["red cat"])).prompts
    assert _syntax.parsed_places(lambda text: doc, prompts) == [[]]


def test_a_spelling_that_is_not_the_prompts() -> None:
    with pytest.raises(ValueError, match="are spelled differently, so its words cannot be found; name the pairs"):
        ac.SynGen(parser=lambda text: parsed(("an", "DET", "ROOT", 0))).tokens(guided.call("a bag").prompts)


def test_without_spacy_or_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _syntax._model.cache_clear()
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "spacy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        with pytest.raises(ValueError, match="needs spaCy; pip install spacy and .* name the pairs yourself"):
            ac.SynGen().tokens(guided.call("a red bag").prompts)
    spacy: Any = ModuleType("spacy")

    def load(name: str) -> Any:
        if name == "mine":
            return lambda text: parsed(*PARSES["adjectives"][0][:3])
        raise OSError(name)

    spacy.load = load
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(ValueError, match="spaCy has no model 'en_core_web_trf'"):
        ac.SynGen().tokens(guided.call("a red bag").prompts)
    assert ac.SynGen(parser="mine").tokens(guided.call("a red bag").prompts) == [[1, 2, 3]]
    _syntax._model.cache_clear()
