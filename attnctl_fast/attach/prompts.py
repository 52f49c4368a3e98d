"""Places of words in a prompt: from targets as the user names them to positions in the text encoder's context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Target: TypeAlias = str | int
Targets: TypeAlias = Target | Sequence[Target] | Sequence[Sequence[Target]]

_WORD_END = "</w>"


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


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompt.

    Ids, and the strings that the tokenizer shows for them, both with special tokens, unpadded; and the ids of the text
    that the tokenizer cut off.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    text: str
    cut: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Position of the first end-of-text token."""
        return len(self.ids) - 1


class Prompts:
    """The prompts of one pipeline call, as far as they are known.

    Args:
        pipe: the pipeline, for its tokenizer.
        texts: the prompts, or None where the call was given embeddings.
        count: number of prompts.
        length: tokens of the text encoders' context.
        second: prompts for the second text encoder, where they differ (SDXL).

    Attributes:
        tokens: the prompts' tokens; None where there are none.
        second: those of the second encoder's prompts; None where there are none.
    """

    def __init__(
        self, pipe: Any, texts: Sequence[str] | None, count: int, length: int, second: Sequence[str] | None = None
    ) -> None:
        self.count, self.length = count, length
        self._pipe = pipe
        self._tokenizer: Any = getattr(pipe, "tokenizer", None) or getattr(pipe, "tokenizer_2", None)
        self.tokens = None if texts is None or self._tokenizer is None else [self._tokenise(text) for text in texts]
        self.second = None if self.tokens is None or second is None else [self._tokenise(text) for text in second]
        # Pipelines that encode long prompts piece by piece give a longer context, and words then stand elsewhere.
        self._aligned = self.tokens is not None and length == getattr(self._tokenizer, "model_max_length", None)

    def _converted(self, text: str) -> str:
        convert = getattr(self._pipe, "maybe_convert_prompt", None)
        return text if convert is None else convert(text, self._tokenizer)

    def _tokenise(self, text: str) -> Tokens:
        tokenizer, text_read = self._tokenizer, self._converted(text)
        ids = list(tokenizer(text_read, max_length=tokenizer.model_max_length, truncation=True).input_ids)
        if tokenizer.eos_token_id in ids[1:]:
            ids = ids[: ids.index(tokenizer.eos_token_id, 1) + 1]
        cut = ()
        if len(ids) == tokenizer.model_max_length:
            cut = tuple(tokenizer(text_read, add_special_tokens=False, verbose=False).input_ids[len(ids) - 2 :])
        return Tokens(tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)), text, cut)

    def _shown(self, tokens: Tokens) -> str:
        """Return the tokens with their positions; those that are no text by themselves (Chinese, emoji) as a word."""
        words = [[0], *(positions for _, positions in self._split(tokens)), [tokens.end]]
        shown = []
        for positions in words:
            each = [self._tokenizer.decode([tokens.ids[i]]).strip() for i in positions]
            if any("\ufffd" in text for text in each):
                word = self._tokenizer.decode([tokens.ids[i] for i in positions]).strip()
                shown.append(f"{positions[0]}-{positions[-1]} {word!r}")
            else:
                shown.extend(f"{i} {text!r}" for i, text in zip(positions, each, strict=True))
        return ", ".join(shown)

    def _find(self, phrase: str, tokens: Tokens, name: str) -> list[list[int]]:
        """Return the positions of every occurrence of a word or phrase.

        Raises:
            ValueError: it does not stand in the prompt.
        """
        places = []
        wanted = list(self._tokenizer(self._converted(phrase.strip()), add_special_tokens=False).input_ids)
        for start in range(1, len(tokens.ids) - len(wanted)):
            # Without this, "apple" would be found within "pineapple".
            inside = self._inside(start, tokens)
            if wanted and not inside and list(tokens.ids[start : start + len(wanted)]) == wanted:
                places.append(list(range(start, start + len(wanted))))
        if places:
            return places
        text = [*tokens.ids[1 : tokens.end], *tokens.cut]
        if tokens.cut and any(text[i : i + len(wanted)] == wanted for i in range(len(text))):
            raise ValueError(
                f"{name} holds {phrase!r}, which was cut off: the tokenizer keeps {len(tokens.ids)} tokens of the "
                f"prompt {tokens.text!r}; shorten the prompt, or move the word to its front"
            )
        raise ValueError(
            f"{name} holds {phrase!r}, which is not in the prompt {tokens.text!r}, whose tokens are "
            f"{self._shown(tokens)}; use words of the prompt as they stand there, or token ids"
        )

    def _inside(self, position: int, tokens: Tokens) -> bool:
        """Return whether the token goes on with the word of the one before."""
        before = tokens.strings[position - 1]
        marked = any(string.endswith(_WORD_END) for string in tokens.strings)
        whole = before.endswith(_WORD_END) or before in self._tokenizer.get_added_vocab()
        return marked and position > 1 and not whole

    def positions(self, targets: Targets, name: str = "targets", *, within_prompt: bool = True) -> list[list[int]]:
        """Return the targets' positions in the context, one list per prompt.

        Words and phrases stand for all their tokens at their first occurrence, compared as the tokenizer normalises
        them (CLIP: without case).

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
        if self.tokens is not None and within_prompt:
            tokens = self.tokens[index]
            if len(found) > tokens.end - 1:
                raise ValueError(
                    f"{name} names {len(found)} tokens, but the prompt {tokens.text!r} has only {tokens.end - 1}: "
                    f"{self._shown(tokens)}"
                )
        double = next((position for position in found if found.count(position) > 1), None)
        if double is not None:
            raise ValueError(f"{name} {list(row)} names token {double} more than once; name it once")
        return found

    def find(self, item: Target, index: int, name: str) -> list[int]:
        """Return the positions of one word, phrase or token id in the prompt `index`; errors as for `positions`."""
        return self.occurrences(item, index, name)[0]

    def occurrences(self, item: Target, index: int, name: str) -> list[list[int]]:
        """Return positions as `find` does, wherever the word or phrase stands.

        Of those, what both text encoders' prompts have from the first one on.
        """
        if isinstance(item, int):
            if item >= self.length:
                raise ValueError(f"{name} holds the token id {item}, but the context has tokens 0..{self.length - 1}")
            return [[item]]
        if self.tokens is None:
            raise ValueError(
                f"{name} holds {item!r}, but the pipeline was given prompt_embeds instead of a prompt, so where the "
                "word stands is unknown; pass token ids (positions in the context) instead"
            )
        if not self._aligned:
            raise ValueError(
                f"{name} holds {item!r}, but the context has {self.length} tokens and the tokenizer makes "
                f"{self._tokenizer.model_max_length}, so where the word stands is unknown; pass token ids instead"
            )
        found = self._find(item, self.tokens[index], name)
        if self.second is None:
            return found
        second = self._find(item, self.second[index], name)
        if second[0] != found[0]:
            raise ValueError(
                f"{name} holds {item!r}, which stands at {found[0]} in the prompt {self.tokens[index].text!r}, but "
                f"elsewhere in prompt_2 {self.second[index].text!r}; give it the same place in both, or pass token ids"
            )
        return [place for place in found if place in second]

    def words(self, targets: Targets | None = None, name: str = "targets") -> list[dict[str, list[int]]] | None:
        """Return the positions of every word by what it is called, one dict per prompt; None where they are unknown.

        With targets, those as the user named them (an id by its digits); without, the words of the prompts in order,
        each all its tokens, as the tokenizer normalises them. What would be called the same is numbered: "dog",
        "dog (2)". Of prompts that differ between the text encoders, the words that stand at the same place in both.

        Raises:
            ValueError: as `positions` does.
        """
        if targets is not None:
            checked: Any = check_targets(targets, name)
            rows = checked if isinstance(checked[0], tuple) else (checked,) * self.count
            return [
                _numbered([(str(item), self.find(item, index, name)) for item in row]) for index, row in enumerate(rows)
            ]
        if self.tokens is None or not self._aligned:
            return None
        second = self.second or self.tokens
        shared = [[self._split(tokens) for tokens in both] for both in zip(self.tokens, second, strict=True)]
        return [_numbered([word for word in first if word in other]) for first, other in shared]

    def _split(self, tokens: Tokens) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt and their positions, without start and end."""
        strings, learned = tokens.strings, self._tokenizer.get_added_vocab()
        found: list[list[int]] = []
        for position in range(1, tokens.end):
            # Textual inversion calls the further vectors of a word <word>_1, <word>_2.
            further = found and strings[position] == f"{strings[found[-1][0]]}_{len(found[-1])}"
            if further or self._inside(position, tokens):
                found[-1].append(position)
            else:
                found.append([position])
        shown = [[i for i in word if i == word[0] or strings[i] not in learned] for word in found]
        return [
            (self._tokenizer.decode([tokens.ids[i] for i in named]).strip(), word)
            for named, word in zip(shown, found, strict=True)
        ]

    def ends(self) -> list[int] | None:
        """Return the position of the first end-of-text in every prompt.

        None where the text is unknown (embeddings were given) or encoded piece by piece.
        """
        return [tokens.end for tokens in self.tokens] if self.tokens is not None and self._aligned else None

    def strings(self, ids: list[list[int]]) -> list[list[str]] | None:
        """Return the tokens at these positions, one list per prompt; "" past the end of the text. None without text."""
        if self.tokens is None:
            return None
        known = [[string.removesuffix(_WORD_END) for string in tokens.strings] for tokens in self.tokens]
        return [[row[i] if i < len(row) else "" for i in chosen] for row, chosen in zip(known, ids, strict=True)]

    def special(self) -> list[list[int]]:
        """Return the positions of start-of-text and of the first end-of-text, one list per prompt.

        Where the text is unknown (embeddings were given) only the start is, position 0.
        """
        ends = self.ends()
        return [[0] for _ in range(self.count)] if ends is None else [[0, end] for end in ends]


def _numbered(words: list[tuple[str, list[int]]]) -> dict[str, list[int]]:
    seen: Counter[str] = Counter()
    named = {}
    for word, positions in words:
        seen[word] += 1
        named[word if seen[word] == 1 else f"{word} ({seen[word]})"] = positions
    return named


def padded(rows: list[list[int]]) -> Tensor:
    """Return ids `[len(rows), longest]`, int64, padded with -1."""
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int64)


def one_hot(ids: Tensor, batch: int, tokens: int, like: Tensor) -> Tensor:
    """Return `[B,n,N]` from ids `[n]` or `[B,n]`; a padded id (-1) has a row of zeros."""
    return F.one_hot(ids.expand(batch, -1) + 1, tokens + 1)[..., 1:].to(like)
