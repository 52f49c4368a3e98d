"""The pictures of a sweep: which they are, whether they can be drawn, drawing and judging them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ._choice import MethodSettings, chosen_method, settings_for
from ._folder import Folder, Log, Row
from ._model import call_arguments, draw
from ._prompts import Entry
from ._report import first_line
from ._tokens import Prompts
from .pipeline import control

if TYPE_CHECKING:
    from ._scores import Scorer

PLAIN = "plain"


@dataclass(frozen=True)
class Picture:
    """One picture: its prompt's place in the sweep, from 0, and what it is drawn with."""

    place: int
    settings: MethodSettings

    @property
    def file(self) -> str:
        """Where it lies in the sweep's folder."""
        return f"pictures/{self.place:05d}-{self.settings.seed}-{self.settings.method}.png"

    def row(self) -> Row:
        """What every row about it says."""
        names = {"place": self.place, "prompt": self.settings.prompt}
        return {"file": self.file, **names, "seed": self.settings.seed, "method": self.settings.method}

    def control(self, pipe: Any) -> Any:
        """The context in which the pipeline draws it."""
        plain = self.settings.method == PLAIN
        return nullcontext() if plain else control(pipe, chosen_method(self.settings))


def plan(base: MethodSettings, methods: Sequence[str], entries: Sequence[Entry], seeds: Sequence[int]) -> list[Picture]:
    """Every prompt with every seed and method; the methods of a prompt and seed follow one another.

    Args:
        base: what all pictures share; an entry's own fields come before it.
        entries: the prompts.
        seeds: of the prompts that name none.

    Raises:
        ValueError: a prompt lacks what a method needs.
    """
    pictures = []
    for place, entry in enumerate(entries):
        own = {name: value for name, value in entry.items() if name != "seeds"}
        kinds = [settings_for(replace(base, **own), method) for method in methods]
        for settings in kinds:
            try:
                if settings.method != PLAIN:
                    chosen_method(settings)
            except ValueError as error:
                raise ValueError(f"prompt {place + 1} ({settings.prompt!r}): {error}") from error
        own_seeds = entry.get("seeds", seeds)
        pictures += [Picture(place, replace(settings, seed=seed)) for seed in own_seeds for settings in kinds]
    return pictures


def check(pipe: Any, pictures: Iterable[Picture]) -> None:
    """Find what the pipeline would refuse, without drawing.

    Raises:
        ValueError: a method that does not fit the UNet or scheduler, an argument that the pipeline does not take, or a
            word that is not in its prompt.
    """
    seen: set[Any] = set()
    for picture in pictures:
        settings = picture.settings
        if settings.method not in seen:
            with picture.control(pipe):
                call_arguments(pipe, settings)
        if (picture.place, settings.method) not in seen and getattr(pipe, "tokenizer", None) is not None:
            prompts = Prompts(pipe, [settings.prompt], 1, pipe.tokenizer.model_max_length)
            for name in ("targets", "pairs", "groups", "token_weights"):
                for word in _words(name, getattr(settings, name)):
                    prompts.find(word, 0, f"prompt {picture.place + 1}: {name}")
        seen.update([settings.method, (picture.place, settings.method)])


def _words(name: str, given: Any) -> list[str]:
    if name == "targets":
        return given or []
    if name == "token_weights":
        return [word for word, _ in given or []]
    return [word for words in given or [] for word in words]


def draw_pictures(pipe: Any, pictures: Iterable[Picture], folder: Folder, log: Log) -> None:
    """Draw and save pictures one by one. One that fails is a row with its error."""
    for picture in pictures:
        if (folder.path / picture.file).is_file():
            # Killed between the picture and its row.
            log.write("picture", {**picture.row(), "seconds": None})
            continue
        try:
            start = time.perf_counter()
            with picture.control(pipe):
                (image,) = draw(pipe, picture.settings)
            seconds = time.perf_counter() - start
        except Exception as error:
            log.write("picture", {**picture.row(), "error": _reason(error)})
            continue
        folder.save(picture.file, image)
        log.write("picture", {**picture.row(), "seconds": seconds})


def score_pictures(scorer: Scorer, pictures: Iterable[Picture], folder: Folder, log: Log) -> None:
    """Judge drawn pictures one by one. One that cannot be judged is a row with its error."""
    from PIL import Image

    for picture in pictures:
        row: Row = {"file": picture.file, "by": scorer.name}
        try:
            with Image.open(folder.path / picture.file) as image:
                row["scores"] = scorer(image.convert("RGB"), picture.settings.prompt)
        except Exception as error:
            row["error"] = _reason(error)
        log.write("scores", row)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
