"""The prompts of a sweep, with their own options and seeds: from a file, or scenes of the shapes model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from ..cli.method_options import METHODS, OPTIONS
from ..cli.options import natural
from ..shapes.scene import scene_for_seed

# A prompt with what it has of its own, by the names of `FIELDS`.
Entry: TypeAlias = dict[str, Any]

_LISTS = {name: option.read for name, option in OPTIONS.items() if option.takes in ("texts", "words", "mapping")}
# Scenes of the shapes model where --seeds does not say how many.
SCENES = 64
FIELDS = ("prompt", "negative_prompt", "seeds", *_LISTS, "phrases", "skip")


def read_prompts(path: Path) -> list[Entry]:
    """Read the prompts of a text file, one a line; blank lines and those that start with `#` are skipped.

    A line that starts with `{` is JSON: the prompt and, where it has its own, `negative_prompt`, `seeds` (whole
    numbers) and those options of methods that go with a prompt, as lists of what stands on the command line;
    `phrases` are what a detector is to find (its targets, where there are none), `skip` the methods that it is not
    drawn with.

        {"prompt": "a red ball and a dog", "targets": ["ball", "dog"], "pairs": ["red:ball"], "seeds": [3, 4]}

    Raises:
        OSError: the file cannot be read.
        ValueError: no prompt in it, or a line that is not as above.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"--prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not UTF-8 text: {error}") from error
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line.startswith("{"):
            entries.append(_entry(line, f"--prompts {path}, line {number}"))
        elif line and not line.startswith("#"):
            entries.append({"prompt": line})
    if not entries:
        raise ValueError(f"--prompts {path} holds no prompt; write one a line")
    return entries


def scene_prompts(seeds: Iterable[int]) -> list[Entry]:
    """Return the shapes model's scenes of these seeds, one picture each, with the words that methods ask for."""
    entries = []
    for seed in seeds:
        scene = scene_for_seed(seed)
        objects = list(scene.objects)
        words = {"targets": list(scene.nouns), "pairs": objects, "groups": objects}
        entries.append({"prompt": scene.prompt, **words, "seeds": [seed]})
    return entries


def _entry(line: str, where: str) -> Entry:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if unknown := sorted(entry.keys() - set(FIELDS)):
        raise ValueError(f"{where} has the field {unknown[0]!r}; known are {', '.join(FIELDS)}")
    for name in ("prompt", "negative_prompt"):
        if not isinstance(entry.get(name, "text"), str):
            raise ValueError(f"{where}: {name} is {entry[name]!r}; it must be text")
    if "prompt" not in entry:
        raise ValueError(f"{where} has no field 'prompt'")
    for name, parse in _LISTS.items():
        if name in entry:
            entry[name] = _parsed(entry[name], parse, f"{where}: {name}")
    for name in ("phrases", "skip"):
        if name in entry:
            entry[name] = _parsed(entry[name], str, f"{where}: {name}")
    if unknown := sorted(set(entry.get("skip", [])) - set(METHODS)):
        raise ValueError(f"{where}: skip holds {unknown[0]!r}; methods are {', '.join(METHODS)}")
    if "seeds" in entry:
        _check_seeds(entry["seeds"], where)
    return entry


def _parsed(words: Any, parse: Callable[[str], Any], where: str) -> list[Any]:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where} is {words!r}; it must be a list of texts, written as on the command line")
    try:
        return [parse(word) for word in words]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where} {error}") from error


def _check_seeds(seeds: Any, where: str) -> None:
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: seeds is {seeds!r}; it must be a list of whole numbers, none twice")
    try:
        for seed in seeds:
            natural(str(seed))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{where}: seeds {error}") from error
