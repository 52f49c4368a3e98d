"""The pictures of a sweep: which they are, whether they can be drawn, drawing and judging them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import Any

from ..attach.families import family_of
from ..attach.prompts import Prompts
from ..cli.method_options import Given, make_method, own_options, words_of
from ..cli.model import Settings, call_arguments, draw
from ..cli.report import first_line
from ..pipeline import control
from .prompts import Entry
from .store import Log, Record, Store

PLAIN = "plain"


@dataclass(frozen=True)
class Picture:
    """One picture: its prompt's place in the sweep, from 0, and what it is drawn with.

    options: those of its method. control: what the method does; None for the pipeline alone. entry: its prompt, with
    what judges need.
    """

    place: int
    method: str
    settings: Settings
    options: Given
    control: Any
    entry: Entry

    @property
    def file(self) -> str:
        """The picture's path in the sweep's folder."""
        return f"pictures/{self.place:05d}-{self.settings.seed}-{self.method}.png"

    @property
    def maps(self) -> str:
        """The path of its words' maps."""
        return self.file.replace("pictures", "maps", 1)

    @property
    def watchable(self) -> bool:
        """Whether its attention can be captured while it is drawn."""
        return self.control is None or not self.control.alone

    def with_method(self, method: str) -> Picture:
        """Return the picture of the same prompt and seed by another method, of which only its file is known."""
        return replace(self, method=method, options={}, control=None)

    def record(self) -> Record:
        """Return what every record of it says."""
        prompt, seed = self.settings.prompt, self.settings.seed
        return {"file": self.file, "place": self.place, "prompt": prompt, "seed": seed, "method": self.method}

    def controlled(self, pipe: Any) -> Any:
        """Return the context in which the pipeline draws it."""
        return nullcontext() if self.control is None else control(pipe, self.control)


def plan(
    base: Settings,
    options: Given,
    methods: Sequence[str],
    prompts: Sequence[Entry],
    seeds: Sequence[int],
    defaults: Mapping[str, Given] = MappingProxyType({}),
) -> list[Picture]:
    """Combine every prompt with every seed and method; the methods of a prompt and seed follow one another.

    Args:
        base: settings of all pictures; what a prompt has of its own comes before them.
        options: options of methods, likewise.
        methods: names of methods, or `plain`.
        prompts: the prompts.
        seeds: of the prompts that name none.
        defaults: options of single methods, which all others come before.

    Raises:
        ValueError: a prompt lacks what a method needs, or no prompt is drawn with any of the methods.
    """
    pictures = []
    for place, entry in enumerate(prompts):
        texts = {name: entry[name] for name in ("prompt", "negative_prompt") if name in entry}
        settings = replace(base, **texts)
        drawn = [name for name in methods if name not in entry.get("skip", [])]
        given = {name: own_options(name, {**defaults.get(name, {}), **options, **entry}) for name in drawn}
        try:
            made = {name: make_method(name, given[name], settings.prompt) for name in drawn if name != PLAIN}
        except ValueError as error:
            raise ValueError(f"prompt {place + 1} ({settings.prompt!r}): {error}") from error
        pictures += [
            Picture(place, name, replace(settings, seed=seed), given[name], made.get(name), entry)
            for seed in entry.get("seeds", seeds)
            for name in drawn
        ]
    if not pictures:
        raise ValueError(f"there is nothing to draw: every prompt skips {' and '.join(methods)}")
    return pictures


def in_turns(pictures: Iterable[Picture]) -> list[Picture]:
    """Order pictures to be drawn: at every other seed the methods the other way round, so that drifts hit all alike."""
    turns = [list(turn) for _, turn in groupby(pictures, lambda picture: (picture.place, picture.settings.seed))]
    return [picture for index, turn in enumerate(turns) for picture in (turn[::-1] if index % 2 else turn)]


def check(pipe: Any, pictures: Iterable[Picture]) -> None:
    """Find what the pipeline would refuse, without drawing.

    Raises:
        ValueError: a method that does not fit the model or scheduler, an argument that the pipeline does not take, or a
            word that is not in its prompt.
    """
    seen: set[Any] = set()
    for picture in pictures:
        place, method = picture.place, picture.method
        if method not in seen:
            with picture.controlled(pipe):
                pass
        if place not in seen:
            call_arguments(pipe, picture.settings)
        if (place, method) not in seen:
            _check_words(pipe, picture)
        seen.update([method, place, (place, method)])


def _check_words(pipe: Any, picture: Picture) -> None:
    words = words_of(picture.options)
    prompts = prompts_of(pipe, picture.settings.prompt) if words else None
    if prompts is not None:
        for name, word in words:
            prompts.find(word, 0, f"prompt {picture.place + 1}: {name}")


def prompts_of(pipe: Any, prompt: str) -> Prompts | None:
    """Return the prompt's tokens as the pipeline will make them when it is called with the prompt alone.

    None where its tokens are unknown.
    """
    if not hasattr(pipe, "encode_prompt"):
        return None
    family = family_of(pipe)
    encoding = inspect.signature(pipe.encode_prompt).parameters
    calling = inspect.signature(pipe.__call__).parameters.items()
    arguments = {name: one.default for name, one in calling if name in encoding} | {"prompt": [prompt]}
    length = arguments.get("max_sequence_length", 0)
    if family.name == "sd3":
        length += pipe.tokenizer_max_length
    elif family.name == "unet":
        tokenizer = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
        length = length or getattr(tokenizer, "model_max_length", 0)
    prompts = Prompts(family.segments(pipe, arguments, length), 1, length)
    if family.fill and prompts.tokens is not None:
        tokens = len(prompts.tokens[0].ids) - prompts.tokens[0].padding
        length = -(-tokens // family.fill) * family.fill
        prompts = Prompts(family.segments(pipe, arguments, length), 1, length)
    return None if prompts.tokens is None else prompts


def draw_pictures(pipe: Any, pictures: Iterable[Picture], store: Store, log: Log) -> None:
    """Draw and save pictures one by one. One that fails is a record with its error."""
    for picture in pictures:
        if (store.path / picture.file).is_file():
            # Killed between the picture and its record.
            log.write("picture", {**picture.record(), "seconds": None})
            continue
        try:
            start = time.perf_counter()
            with picture.controlled(pipe):
                (image,) = draw(pipe, picture.settings)
            seconds = time.perf_counter() - start
        except Exception as error:
            log.write("picture", {**picture.record(), "error": reason(error)})
            continue
        store.save(picture.file, image)
        log.write("picture", {**picture.record(), "seconds": seconds})


def reason(error: Exception) -> str:
    """Return what a record says of an error."""
    return f"{type(error).__name__}: {first_line(error)}"
