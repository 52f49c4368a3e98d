"""Scenes of the shapes model: colours, shapes, objects and their prompts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
MAX_OBJECTS = 3


@dataclass(frozen=True)
class Scene:
    """One to three coloured shapes, in the order in which the prompt names them.

    Args:
        objects: `(colour, shape)` pairs from `COLOURS` and `SHAPES`; no colour and no shape occurs twice.

    Raises:
        ValueError: for an unknown or repeated colour or shape, or a number of objects outside 1..3.
    """

    objects: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple((colour, shape) for colour, shape in self.objects))
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, got {len(self.objects)}")
        _check("colour", self.colours, COLOURS)
        _check("shape", self.nouns, SHAPES)

    @property
    def colours(self) -> tuple[str, ...]:
        """The colour words, in prompt order."""
        return tuple(colour for colour, _ in self.objects)

    @property
    def nouns(self) -> tuple[str, ...]:
        """The shape words, in prompt order."""
        return tuple(shape for _, shape in self.objects)

    @property
    def prompt(self) -> str:
        """The caption that the model was trained on, such as `a red circle and a blue star`."""
        return " and ".join(f"a {colour} {shape}" for colour, shape in self.objects)


def scene_for_seed(seed: int, objects: int = 2) -> Scene:
    """Draw a scene uniformly from those with `objects` objects; the same for the same arguments on every machine."""
    if not 1 <= objects <= MAX_OBJECTS:
        raise ValueError(f"objects must be 1 to {MAX_OBJECTS}, got {objects}")
    rng = random.Random(f"scene {objects} {seed}")
    return Scene(tuple(zip(_shuffled(COLOURS, rng)[:objects], _shuffled(SHAPES, rng)[:objects], strict=True)))


def scene_for_prompt(prompt: str) -> Scene | None:
    """Return the scene whose prompt this is, word for word; None where there is none."""
    objects = [words.removeprefix("a ").partition(" ") for words in prompt.split(" and ")]
    try:
        scene = Scene(tuple((colour, shape) for colour, _, shape in objects))
    except ValueError:
        return None
    return scene if scene.prompt == prompt else None


def _shuffled(names: Iterable[str], rng: random.Random) -> list[str]:
    # Only Random.random() is promised to give the same numbers in every Python version; shuffle() and sample() are not.
    return sorted(names, key=lambda _: rng.random())


def _check(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose from {', '.join(known)}")
        if names.count(name) > 1:
            raise ValueError(f"{kind} {name!r} occurs twice in a scene: every object needs its own {kind}")
