"""Places of words in a prompt: from targets as the user names them to positions in the text encoder's context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import Segment, Tokens

__all__ = ["Prompts", "Segment", "Target", "Targets", "Tokens", "check_targets", "one_hot", "padded"]

Target: TypeAlias = str | int
Targets: TypeAlias = Target | Sequence[Target] | Sequence[Sequence[Target]]


def check_targets(targets: Any, name: str = "targets") -> Targets:
    """Return targets in hashable form: a tuple of words, phrases and token ids for all prompts, or one per prompt.

    Raises:
        ValueError: none at all, an empty word, a negative id, the same one twice, or anything but words and ids.
    """
    if isinstance(targets, (str, int)):
        return check_targets((targets,), name)
    if not isinstance(targets, Sequence):
        raise ValueError(f"{name} is {targets!r}; pass a list of words, phrases or token ids")
    nested = [isinstance(item, (list, tuple)) for item in targets]
    if any(nested) and not all(nested):
        raise ValueError(
            f"{name} is {targets!r}; pass either one list for every prompt or one list per prompt, not a mix"
        )
    rows = tuple(map(tuple, targets)) if all(nested) and targets else (tuple(targets),)
    for row in rows:
        if not row:
            raise ValueError(
                f"{name} is {targets!r}, which has an empty list; name at least one word, phrase or token id"
            )
        for item in row:
            if isinstance(item, bool) or not isinstance(item, (str, int)):
                raise ValueError(f"{name} holds {item!r}; targets are words, phrases or token ids (ints)")
            if isinstance(item, str) and not item.strip():
                raise ValueError(f"{name} holds {item!r}; an empty word has no token")
            if isinstance(item, int) and item < 0:
                raise ValueError(f"{name} holds the token id {item}; ids count from 0, the start-of-text token")
        keys = [item.strip().lower() if isinstance(item, str) else item for item in row]
        double = next((item for item, key in zip(row, keys, strict=True) if keys.count(key) > 1), None)
        if double is not None:
            raise ValueError(
                f"{name} holds {double!r} more than once; name it once, and give token ids for a word that the prompt "
                "repeats"
            )
    return rows if all(nested) else rows[0]


class Prompts:
    """The prompts of one pipeline call, as far as they are known.

    Positions are columns of the whole text that the model attends to. Where several text encoders have a part of it
    (SD 3: CLIP, then T5), a word stands wherever one of them has it.

    Args:
        segments: those parts, in order.
        count: number of prompts.
        length: columns of the text that was encoded first; parts of other encoders may lie behind (HunyuanDiT's T5).

    Attributes:
        segments: the parts.
        length: columns of the whole text.
        rows: the prompts' tokens in each part; None where there are none.
        tokens: those in the first part.
        second: those of the prompts that its second encoder reads (SDXL, SD 3), where these differ.
    """

    def __init__(self, segments: Sequence[Segment], count: int, length: int) -> None:
        self.segments, self.count = list(segments), count
        self.length = max([length, *(segment.start + segment.length for segment in segments)])
        self.rows = self._read()
        self._seconds = [
            None if self.rows is None or segment.second is None else [segment.tokenise(text) for text in segment.second]
            for segment in self.segments
        ]
        self.tokens = None if self.rows is None else self.rows[0]
        self.second = self._seconds[0] if self._seconds else None
        self._aligned = self.rows is not None and all(segment.aligned for segment in self.segments)

    def _read(self) -> list[list[Tokens]] | None:
        rows = []
        for segment in self.segments:
            if segment.tokenizer is None or segment.texts is None:
                return None
            rows.append([segment.tokenise(text) for text in segment.texts])
        return rows or None

    @property
    def clip_alone(self) -> bool:
        """Whether the text is CLIP's alone, as of Stable Diffusion up to XL."""
        return [segment.name for segment in self.segments] == ["CLIP"]

    def parts(self, index: int) -> list[tuple[Segment, Tokens]]:
        """Return every part with its tokens of one prompt."""
        assert self.rows is not None
        return [(segment, rows[index]) for segment, rows in zip(self.segments, self.rows, strict=True)]

    def _shown(self, index: int) -> str:
        parts = self.parts(index)
        return "; ".join(
            segment.shown(tokens) if len(parts) == 1 else f"{segment.name}: {segment.shown(tokens)}"
            for segment, tokens in parts
        )

    def _missing(self, phrase: str, index: int, name: str) -> ValueError:
        """Return the error of a word that no encoder has."""
        parts = self.parts(index)
        text = " and ".join(dict.fromkeys(repr(tokens.text) for _, tokens in parts))
        cut = [(segment, tokens) for segment, tokens in parts if segment.lost(phrase, tokens)]
        if cut:
            kept = " and ".join(
                f"{'the tokenizer' if len(parts) == 1 else segment.name} keeps {len(tokens.ids)} tokens"
                for segment, tokens in cut
            )
            return ValueError(
                f"{name} holds {phrase!r}, which was cut off: {kept} of the prompt {text}; shorten the prompt, or move "
                "the word to its front"
            )
        return ValueError(
            f"{name} holds {phrase!r}, which is not in the prompt {text}, whose tokens are {self._shown(index)}; use "
            "words of the prompt as they stand there, or token ids"
        )

    def positions(self, targets: Targets, name: str = "targets", *, within_prompt: bool = True) -> list[list[int]]:
        """Return the targets' positions in the text, one list per prompt.

        Words and phrases stand for all their tokens at their first occurrence, in every text encoder's part that has
        them, compared as the tokenizer normalises them, without case. One that an encoder's tokenizer cut off stands in
        the other parts alone.

        Raises:
            ValueError: a word that is not in the prompt, or elsewhere in the prompt of the second text encoder; words
                where the prompt is unknown; a position out of range or twice; more positions than the prompt has tokens
                (unless `within_prompt` is false); a number of lists that is not that of the prompts.
        """
        checked: Any = check_targets(targets, name)
        rows = checked if isinstance(checked[0], tuple) else (checked,) * self.count
        if len(rows) != self.count:
            raise ValueError(
                f"{name} holds {len(rows)} lists, but there are {self.count} prompts; pass one list per prompt"
            )
        return [self._row(row, index, name, within_prompt) for index, row in enumerate(rows)]

    def _row(self, row: tuple[Target, ...], index: int, name: str, within_prompt: bool) -> list[int]:
        found = [position for item in row for position in self.find(item, index, name)]
        if self.rows is not None and within_prompt:
            own = sum(tokens.end - tokens.begin for _, tokens in self.parts(index))
            if len(found) > own:
                raise ValueError(
                    f"{name} names {len(found)} tokens, but the prompt {self.rows[0][index].text!r} has only {own}: "
                    f"{self._shown(index)}"
                )
        double = next((position for position in found if found.count(position) > 1), None)
        if double is not None:
            raise ValueError(f"{name} {list(row)} names token {double} more than once; name it once")
        return found

    def find(self, item: Target, index: int, name: str) -> list[int]:
        """Return the positions of one word, phrase or token id in the prompt `index`; errors as for `positions`."""
        return self.occurrences(item, index, name)[0]

    def occurrences(self, item: Target, index: int, name: str) -> list[list[int]]:
        """Return positions as `find` does, wherever the word or phrase stands: the k-th time in every encoder's part.

        Of those, what both prompts of two encoders side by side have from the first one on.
        """
        if isinstance(item, int):
            if item >= self.length:
                raise ValueError(f"{name} holds the token id {item}, but the context has tokens 0..{self.length - 1}")
            return [[item]]
        if self.rows is None:
            raise ValueError(
                f"{name} holds {item!r}, but the pipeline was given prompt_embeds instead of a prompt, so where the "
                "word stands is unknown; pass token ids (positions in the context) instead"
            )
        if not self._aligned:
            raise ValueError(
                f"{name} holds {item!r}, but the context has {self.length} tokens and the tokenizer makes "
                f"{self.segments[0].limit}, so where the word stands is unknown; pass token ids instead"
            )
        found: list[list[list[int]]] = []
        for (segment, tokens), second in zip(self.parts(index), self._seconds, strict=True):
            places = segment.places(item, tokens)
            if places and second is not None:
                places = self._in_both(item, places, (segment, tokens), second[index], name)
            found.append([[segment.start + i for i in place] for place in places])
        if not any(found):
            raise self._missing(item, index, name)
        return [[i for place in places if place for i in place] for places in zip_longest(*found)]

    def _in_both(
        self, item: str, first: list[list[int]], part: tuple[Segment, Tokens], other: Tokens, name: str
    ) -> list[list[int]]:
        """Return the places of a word in the prompt that another encoder's prompt has too."""
        segment, tokens = part
        second = segment.places(item, other)
        if not second:
            raise ValueError(
                f"{name} holds {item!r}, which is not in the prompt {other.text!r}, whose tokens are "
                f"{segment.shown(other)}; use words of the prompt as they stand there, or token ids"
            )
        if second[0] != first[0]:
            raise ValueError(
                f"{name} holds {item!r}, which stands at {first[0]} in the prompt {tokens.text!r}, but elsewhere in "
                f"prompt_2 {other.text!r}; give it the same place in both, or pass token ids"
            )
        return [place for place in first if place in second]

    def words(self, targets: Targets | None = None, name: str = "targets") -> list[dict[str, list[int]]] | None:
        """Return the positions of every word by what it is called, one dict per prompt; None where they are unknown.

        With targets, those as the user named them (an id by its digits); without, the words of the prompts in order,
        each all its tokens, as the tokenizer normalises them. What would be called the same is numbered: "dog",
        "dog (2)". Of prompts that differ between encoders side by side, the words that stand at the same place in both.

        Raises:
            ValueError: as `positions` does.
        """
        if targets is not None:
            checked: Any = check_targets(targets, name)
            rows = checked if isinstance(checked[0], tuple) else (checked,) * self.count
            return [
                _numbered([(str(item), self.find(item, index, name)) for item in row]) for index, row in enumerate(rows)
            ]
        if self.rows is None or not self._aligned:
            return None
        return [self._words(index) for index in range(self.count)]

    def _words(self, index: int) -> dict[str, list[int]]:
        found: dict[str, tuple[str, list[int]]] = {}
        for (segment, tokens), second in zip(self.parts(index), self._seconds, strict=True):
            words = segment.words(tokens)
            if second is not None:
                others = segment.words(second[index])
                words = [word for word in words if word in others]
            for word, positions in _numbered(words).items():
                # The same word in several parts, where one keeps capitals.
                found.setdefault(word.casefold(), (word, []))[1].extend(segment.start + i for i in positions)
        return dict(found.values())

    def ends(self) -> list[int] | None:
        """Return the position of the first end-of-text in every prompt, in the first encoder's part.

        None where the text is unknown (embeddings were given) or encoded piece by piece.
        """
        return [tokens.end for tokens in self.tokens] if self.tokens is not None and self._aligned else None

    def content(self) -> list[list[list[int]]] | None:
        """Return the positions of the prompts' own tokens, without special ones: per part, one list per prompt.

        None where the text is unknown (embeddings were given) or encoded piece by piece.
        """
        if self.rows is None or not self._aligned:
            return None
        return [
            [list(range(segment.start + tokens.begin, segment.start + tokens.end)) for tokens in rows]
            for segment, rows in zip(self.segments, self.rows, strict=True)
        ]

    def own(self) -> list[list[int]] | None:
        """Return the positions of `content` of all parts together, one list per prompt."""
        content = self.content()
        return (
            None if content is None else [[i for part in parts for i in part] for parts in zip(*content, strict=True)]
        )

    def strings(self, ids: list[list[int]]) -> list[list[str]] | None:
        """Return the tokens at these positions, one list per prompt; "" past the end of a text. None without text."""
        if self.rows is None:
            return None
        known = [
            {
                segment.start + i: segment.bare(string) or string
                for segment, tokens in self.parts(index)
                for i, string in enumerate(tokens.strings)
            }
            for index in range(self.count)
        ]
        return [[row.get(i, "") for i in chosen] for row, chosen in zip(known, ids, strict=True)]

    def special(self) -> list[list[int]]:
        """Return the positions of start-of-text and of the first end-of-text of every encoder, one list per prompt.

        Where the text is unknown (embeddings were given) only the starts are, and none where padding is before them.
        """
        found: list[list[int]] = [[] for _ in range(self.count)]
        for part, segment in enumerate(self.segments):
            for index, row in enumerate(found):
                if self.rows is not None or segment.padding == "right":
                    start = segment.start + (0 if self.rows is None else self.rows[part][index].padding)
                    row.extend(range(start, start + segment.opening))
                if self.rows is not None and self._aligned and segment.closing:
                    row.append(segment.start + self.rows[part][index].end)
        return found


def _numbered(words: list[tuple[str, list[int]]]) -> dict[str, list[int]]:
    seen: Counter[str] = Counter()
    named = {}
    for word, positions in words:
        key = word.casefold()
        seen[key] += 1
        named[word if seen[key] == 1 else f"{word} ({seen[key]})"] = positions
    return named


def shown_ranges(numbers: list[int]) -> str:
    """Return rising numbers as text, such as 1..4, 78..81."""
    starts = [number for number in numbers if number - 1 not in numbers]
    stops = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{start}..{stop}" for start, stop in zip(starts, stops, strict=True)) or "of nothing"


def padded(rows: list[list[int]]) -> Tensor:
    """Return ids `[len(rows), longest]`, int64, padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int64)


def one_hot(ids: Tensor, batch: int, tokens: int, like: Tensor) -> Tensor:
    """Return `[B,n,N]` from ids `[n]` or `[B,n]`; a padded id (-1) has a row of zeros."""
    return F.one_hot(ids.expand(batch, -1) + 1, tokens + 1)[..., 1:].to(like)
