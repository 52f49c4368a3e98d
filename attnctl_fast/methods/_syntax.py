"""Modifiers of a prompt and the nouns that they modify, from a parse by spaCy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import accumulate
from typing import Any

from ..attach.prompts import Prompts
from ._groups import Places

_MODIFIERS = {"amod", "nmod", "compound", "npadvmod", "advmod", "acomp"}
_NOUNS = {"NOUN", "PROPN"}
_REMEDY = "name the pairs yourself, such as pairs=[('red', 'bag'), ('green', 'apple')]"


@cache
def _model(name: str) -> Callable[[str], Any]:
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            f"pairs is None, and finding them needs spaCy; pip install spacy and python -m spacy download {name}, or "
            f"{_REMEDY}"
        ) from error
    try:
        return spacy.load(name)
    except OSError as error:
        raise ValueError(
            f"spaCy has no model {name!r}; python -m spacy download {name}, pass another as parser=, or {_REMEDY}"
        ) from error


def parsed_places(parser: str | Callable[[str], Any], prompts: Prompts) -> Places:
    """Return the positions of the words of every noun with its modifiers, the noun last; see `groups.Places`.

    Raises:
        ValueError: no spaCy, no such model, unknown text, or text that the tokenizer spells otherwise.
    """
    if prompts.own() is None:
        raise ValueError(f"pairs is None, but the words of the prompt are unknown (prompt embeddings); {_REMEDY}")
    parse = _model(parser) if isinstance(parser, str) else parser
    found: Places = []
    for index in range(prompts.count):
        parts = prompts.parts(index)
        doc = parse(parts[0][1].text)
        positions: list[list[int]] = [[] for _ in doc]
        for segment, tokens in parts:
            pieces = [segment.bare(string).lower() for string in tokens.strings[tokens.begin : tokens.end]]
            spelled = _positions([word.text for word in doc], pieces, segment.start + tokens.begin)
            if spelled is None:
                raise ValueError(
                    f"the prompt {tokens.text!r} and its tokens {', '.join(tokens.strings)} are spelled differently, "
                    f"so its words cannot be found; {_REMEDY}"
                )
            positions = [before + here for before, here in zip(positions, spelled, strict=True)]
        groups = [[positions[word.i] for word in group] for group in noun_groups(doc)]
        # A noun beyond the end of the context is not there; neither are its modifiers.
        kept = [[word for word in group if word] for group in groups if group[-1]]
        found.append([group for group in kept if len(group) > 1])
    return found


def _positions(words: list[str], pieces: list[str], first_position: int) -> list[list[int]] | None:
    """Return the tokens that spell each word, by their places in the text without spaces; None where they differ."""
    words = ["".join(word.lower().split()) for word in words]
    if not "".join(words).startswith("".join(pieces)):
        return None
    stops = list(accumulate(map(len, pieces), initial=0))
    bounds = list(accumulate(map(len, words), initial=0))
    return [
        [
            place
            for place, (start, stop) in enumerate(zip(stops, stops[1:], strict=False), first_position)
            if start < last and stop > first
        ]
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]


def noun_groups(doc: Iterable[Any]) -> list[list[Any]]:
    """Return every noun that something modifies, behind its modifiers, in the order of the text.

    Those are adjectives, nouns before it ("a wooden kitchen table"), what modifies or joins those, and adjectives after
    a form of "to be" ("a dog that is red").
    """
    groups = []
    for noun in doc:
        if noun.pos_ not in _NOUNS or noun.dep_ in _MODIFIERS:
            continue
        verbs = [child for child in noun.children if child.dep_ == "relcl" and child.pos_ == "AUX"]
        if noun.dep_ == "nsubj" and noun.head.pos_ == "AUX":
            verbs.append(noun.head)
        modifiers = [child for child in noun.children if child.dep_ in _MODIFIERS]
        modifiers += [child for verb in verbs for child in verb.children if child.dep_ == "acomp"]
        for modifier in modifiers:
            # The list grows while it is gone through.
            modifiers += [child for child in modifier.children if child.dep_ in _MODIFIERS | {"conj"}]
        if modifiers:
            groups.append([*sorted(modifiers, key=lambda word: word.i), noun])
    return groups
