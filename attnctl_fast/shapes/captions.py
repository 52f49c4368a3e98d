"""Captions of drawn scenes: what a training example is called, and which of its words stand for which object."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from .scene import Scene

_COLOURED = 0.85
# Of a picture's objects a caption names more than one, and more than two, this often.
_NAMED: dict[int, tuple[float, ...]] = {1: (), 2: (0.6,), 3: (0.7, 0.4)}


class Word(NamedTuple):
    """A colour word or noun of a caption: its place among the words, the index of its object, whether it is a noun."""

    place: int
    object: int
    noun: bool


class Caption(NamedTuple):
    """A caption such as `a blue star and a circle`, and its colour words and nouns."""

    text: str
    words: tuple[Word, ...]


def describe(scene: Scene, named: Sequence[int], coloured: Sequence[bool]) -> Caption:
    """Name the objects `named` of a scene in that order, each with its colour where `coloured` says so."""
    texts: list[str] = []
    words: list[Word] = []
    for index, colour in zip(named, coloured, strict=True):
        texts += ["and", "a"] if texts else ["a"]
        if colour:
            words.append(Word(len(texts), index, noun=False))
            texts.append(scene.colours[index])
        words.append(Word(len(texts), index, noun=True))
        texts.append(scene.nouns[index])
    return Caption(" ".join(texts), tuple(words))


def prompt(scene: Scene) -> Caption:
    """Return the scene's prompt as a caption: every object with its colour, in the scene's order."""
    return describe(scene, range(len(scene.objects)), [True] * len(scene.objects))


def caption(scene: Scene, seed: int) -> Caption:
    """Draw a caption as people write them: of all, some or one of the objects, in any order, mostly with colours.

    A caption that is silent about an object does not say that it is absent. So a model that learned from such captions
    can be asked for one object at a time, and its answers be composed.
    """
    rng = random.Random(f"caption {seed}")
    order = sorted(range(len(scene.objects)), key=lambda _: rng.random())
    share = rng.random()
    named = order[: 1 + sum(share < often for often in _NAMED[len(order)])]
    return describe(scene, named, [rng.random() < _COLOURED for _ in named])
