"""Evaluations of papers as sweeps: their prompts, methods and figures."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType
from typing import Any

from ..cli.method_options import Given
from .prompts import Entry, scene_prompts

# The lists of Attend-and-Excite (Chefer et al., arXiv 2301.13826), in the order in which its prompts name them.
ANIMALS = ("cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse")
OBJECTS = (
    *("backpack", "glasses", "crown", "suitcase", "chair", "balloon"),
    *("bow", "car", "bowl", "bench", "clock", "apple"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")
# An animal has these on, without a colour.
WORN = ("glasses", "crown", "bow")


@dataclass(frozen=True)
class Preset:
    """What `attnctl-fast reproduce NAME` sweeps, where its options say nothing else.

    Args:
        source: what the figures of the paper are from.
        prompts: makes its prompts.
        seeds: of every prompt.
        methods: of the table.
        overheads: what the paper says that its methods add to the time of a picture, in percent.
        shapes: options of methods on the shapes models, by `--model`, whose layers are not those of Stable Diffusion.
    """

    source: str
    prompts: Callable[[], list[Entry]]
    seeds: int
    methods: Sequence[str]
    overheads: Mapping[str, float]
    shapes: Mapping[str, Mapping[str, Given]] = field(default_factory=dict)


def attend_and_excite_prompts() -> list[Entry]:
    """Return the prompts of Attend-and-Excite's evaluation, with the words that methods ask for.

    66 pairs of animals, 144 animals with an object and 66 pairs of objects. The authors drew the colours at random;
    these are drawn here, the same ones every time. An article is "a" before every noun, as it is there.
    """
    # Only Random.random() is promised to give the same numbers in every Python version.
    chance = random.Random("Attend-and-Excite")

    def coloured(noun: str) -> tuple[str, ...]:
        return COLOURS[int(chance.random() * len(COLOURS))], noun

    def things() -> Iterator[tuple[tuple[str, ...], str, tuple[str, ...]]]:
        for one, other in combinations(ANIMALS, 2):
            yield (one,), "and", (other,)
        for animal in ANIMALS:
            for noun in OBJECTS:
                yield ((animal,), "with", (noun,)) if noun in WORN else ((animal,), "and", coloured(noun))
        for one, other in combinations(OBJECTS, 2):
            yield coloured(one), "and", coloured(other)

    return [described(f"a {' '.join(a)} {joint} a {' '.join(b)}", [a, b]) for a, joint, b in things()]


def described(prompt: str, things: Sequence[Sequence[str]]) -> Entry:
    """Return a prompt of things, each its modifiers and then its noun, with the words that methods ask for."""
    pairs = [tuple(thing) for thing in things if len(thing) > 1]
    entry: Entry = {
        "prompt": prompt,
        "targets": [thing[-1] for thing in things],
        "groups": [tuple(thing) for thing in things],
        "edit": [f"a {' '.join(thing)}" for thing in things],
    }
    # SynGen binds modifiers, of which a pair of animals has none.
    return entry | ({"pairs": pairs} if pairs else {"skip": ["syngen"]})


def preset_scenes(seeds: range) -> list[Entry]:
    """Return scenes of the shapes model in place of a paper's prompts, with the words that its methods ask for."""
    return [entry | {"edit": [f"a {' '.join(thing)}" for thing in entry["groups"]]} for entry in scene_prompts(seeds)]


_LAYERS: Mapping[str, Any] = MappingProxyType({"layers": ["down_blocks.0", "up_blocks.2"]})
PRESETS = {
    "table1": Preset(
        source="arXiv 2403.06381, Table 1: SD 2, 512x512, 50 steps, A4000",
        prompts=attend_and_excite_prompts,
        seeds=10,
        methods=("plain", "regulation", "excite", "syngen", "composable"),
        overheads={"regulation": 48.8, "dense": 79.3, "composable": 119.5, "syngen": 378.0, "excite": 414.6},
        shapes={"shapes": {"excite": {**_LAYERS, "scale": 2.0}, "syngen": {**_LAYERS, "scale": 1.0}}},
    ),
}
