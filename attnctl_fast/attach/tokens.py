"""One text encoder's part of the text that a model attends to: its tokens, and where words stand among them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any, Literal

# What a tokenizer marks: the end of words (CLIP), their start (sentence pieces: T5, Gemma), that one goes on (Bert), or
# the space before one, among characters that stand for bytes (Qwen, GLM, Mistral).
WORD_END, WORD_START, WORD_GOES_ON, SPACE_BYTE = "</w>", "▁", "##", "Ġ"


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompt.

    Ids, and the strings that the tokenizer has for them, both with special tokens, unpadded. begin: the position of the
    prompt's first own token. end: of what follows its last one, the end-of-text token where the tokenizer adds one.
    text: the prompt. cut: the ids of the text that the tokenizer cut off. padding: how many of the first ones are
    padding, where that stands in front.
    """

    ids: tuple[int, ...]
    strings: tuple[str, ...]
    text: str
    begin: int
    end: int
    cut: tuple[int, ...] = ()
    padding: int = 0


@dataclass(frozen=True)
class Segment:
    """A stretch of the columns that a model attends to: what one text encoder, or two side by side, made of prompts.

    Attributes:
        name: of the kind of encoder.
        tokenizer: its tokenizer; None without.
        texts: the prompts as it reads them; None where they are unknown (embeddings were given).
        start: the first column.
        length: how many columns.
        limit: how many tokens it keeps of a text.
        second: what another encoder of the same tokens reads, where that differs; its channels lie beside.
        opening: how many special tokens it puts before a text.
        closing: how many it puts behind.
        marks: how it marks the limits of words.
        instruction: a text that the pipeline puts before the prompt.
        behind: a text that the pipeline puts behind the prompt.
        left_out: from which token to which one there are no columns.
        padding: the side of the text that is padded.
        converted: what the pipeline makes of a text before it is tokenised.
        encoders: the pipeline's components that encode it.
        masked: the encoders do not attend to padding.
    """

    name: str
    tokenizer: Any
    texts: Sequence[str] | None
    start: int
    length: int
    limit: int
    second: Sequence[str] | None = None
    opening: int = 1
    closing: int = 1
    marks: str = WORD_END
    instruction: str = ""
    behind: str = ""
    left_out: tuple[int, int] = (0, 0)
    padding: Literal["right", "left"] = "right"
    converted: Callable[[str], str] = str
    encoders: tuple[str, ...] = ()
    masked: bool = False

    @property
    def aligned(self) -> bool:
        """Whether the columns are those of the tokens.

        Pipelines that encode long prompts piece by piece give a longer context, and words then stand elsewhere.
        """
        return bool(self.instruction) or self.padding == "left" or self.length == self.limit

    def tokenise(self, text: str) -> Tokens:
        """Return the tokens of a prompt that have columns."""
        tokenizer, special = self.tokenizer, bool(self.opening or self.closing)
        read = self.instruction + self.converted(text) + self.behind
        ids = list(tokenizer(read, max_length=self.limit, truncation=True, add_special_tokens=special).input_ids)
        if self.closing and tokenizer.eos_token_id in ids[1:]:
            ids = ids[: ids.index(tokenizer.eos_token_id, 1) + 1]
        behind = len(tokenizer(self.behind, add_special_tokens=False).input_ids) if self.behind else 0
        cut: tuple[int, ...] = ()
        if len(ids) == self.limit:
            own = tokenizer(read, add_special_tokens=False, verbose=False).input_ids
            kept = len(ids) - self.opening - self.closing
            cut = tuple(own[kept : len(own) - behind])
            behind = max(0, behind - max(0, len(own) - kept))
        begin, (first, last) = self.opening, self.left_out
        if self.instruction:
            before = list(tokenizer(self.instruction, add_special_tokens=special).input_ids)
            # Its last token may have become one with the prompt's first.
            shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False))))
            begin = max(first, shared - (last - first))
        ids = [*ids[:first], *ids[last:]]
        padding = max(0, self.length - len(ids)) if self.padding == "left" else 0
        ids = [tokenizer.pad_token_id] * padding + ids
        strings = tuple(tokenizer.convert_ids_to_tokens(ids))
        end = len(ids) - self.closing - behind
        return Tokens(tuple(ids), strings, text, min(begin + padding, end), end, cut, padding)

    def words(self, tokens: Tokens) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt and their positions, without special tokens."""
        learned = self.tokenizer.get_added_vocab()
        found = []
        for word in self._grouped(tokens.strings[tokens.begin : tokens.end]):
            word = [tokens.begin + i for i in word]
            # Of a word of several learned vectors (textual inversion) the first has the name.
            named = [tokens.ids[i] for i in word if i == word[0] or tokens.strings[i] not in learned]
            # Of a token that it does not know, T5's tokenizer makes nothing.
            spelled = "".join(self.bare(tokens.strings[i]) for i in word)
            found.append((self.tokenizer.decode(named).strip() or spelled, word))
        return found

    def places(self, phrase: str, tokens: Tokens) -> list[list[int]]:
        """Return the positions of every occurrence of a word or phrase, compared as the tokenizer spells words.

        Letters' case does not matter.
        """
        return [place for place in self._places(phrase, tokens) if place[-1] < tokens.end]

    def lost(self, phrase: str, tokens: Tokens) -> bool:
        """Return whether the phrase stands in what the tokenizer cut off."""
        return any(place[-1] >= tokens.end for place in self._places(phrase, tokens))

    def _places(self, phrase: str, tokens: Tokens) -> list[list[int]]:
        ids = list(self.tokenizer(self.converted(phrase.strip()), add_special_tokens=False).input_ids)
        # What the tokenizer does not know could be anything.
        if not ids or self.tokenizer.unk_token_id in ids:
            return []
        wanted = [word for word, _ in self._spelled(self.tokenizer.convert_ids_to_tokens(ids))]
        rest = self.tokenizer.convert_ids_to_tokens(list(tokens.cut))
        words = self._spelled([*tokens.strings[tokens.begin : tokens.end], *rest])
        starts = range(len(words) - len(wanted) + 1)
        return [
            [tokens.begin + i for _, word in words[start : start + len(wanted)] for i in word]
            for start in starts
            if [word for word, _ in words[start : start + len(wanted)]] == wanted
        ]

    def _spelled(self, strings: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Return the words that strings of tokens spell, and where these are."""
        return [(self._spell([strings[i] for i in word]), word) for word in self._grouped(strings)]

    def _spell(self, strings: Sequence[str]) -> str:
        if self.marks == SPACE_BYTE:
            # Parts of a character differ, although none of them is one.
            return self.bare("".join(strings), "surrogateescape").casefold()
        spelled = "".join(map(self.bare, strings))
        # CLIP's are lower case already, and stand for bytes.
        return spelled if self.marks == WORD_END else spelled.casefold()

    def bare(self, string: str, errors: str = "replace") -> str:
        """Return a token's string without its mark; errors: what becomes of parts of a character."""
        if self.marks == WORD_END:
            return string.removesuffix(WORD_END)
        string = string.removeprefix(self.marks)
        alphabet = _bytes()
        if self.marks != SPACE_BYTE or not alphabet.keys() >= set(string):
            return string
        return bytes(alphabet[character] for character in string).decode("utf-8", errors)

    def _grouped(self, strings: Sequence[str]) -> list[list[int]]:
        """Return which of a text's tokens make up each word."""
        learned = self.tokenizer.get_added_vocab()
        marked = any(string.endswith(WORD_END) for string in strings)
        words: list[list[int]] = []
        for i, string in enumerate(strings):
            before = strings[i - 1] if i else ""
            # Textual inversion calls the further vectors of a word <word>_1, <word>_2.
            further = bool(words) and string == f"{strings[words[-1][0]]}_{len(words[-1])}"
            if self.marks == WORD_END:
                inside = marked and not before.endswith(WORD_END) and before not in learned
            elif self.marks == WORD_GOES_ON:
                inside = string.startswith(WORD_GOES_ON)
            elif self.marks == SPACE_BYTE:
                # A character has up to four bytes, which may be as many tokens.
                word = "".join(strings[j] for j in words[-1]) if words else ""
                goes_on = _one_word(self.bare(word), self.bare("".join(strings[i : i + 4])))
                within = _bytes().get(string[0], 0) & 0xC0 == 0x80
                inside = within or (goes_on and not string.startswith(SPACE_BYTE))
            else:
                inside = not string.startswith(WORD_START) and _one_word(self.bare(before), string)
            if words and (further or inside):
                words[-1].append(i)
            else:
                words.append([i])
        return words

    def shown(self, tokens: Tokens) -> str:
        """Return the tokens with their positions; those that are no text by themselves (Chinese, emoji) as a word."""
        tokenizer = self.tokenizer
        # Not the pipeline's own words around the prompt.
        within = self.behind or (self.instruction and not self.left_out[1])
        first, last = (tokens.begin, tokens.end) if within else (tokens.padding, len(tokens.ids))
        words = [[i] for i in range(first, tokens.begin)] + [positions for _, positions in self.words(tokens)]
        shown = []
        for positions in words + [[i] for i in range(tokens.end, last)]:
            each = [self.bare(tokenizer.decode([tokens.ids[i]]).strip()) or tokens.strings[i] for i in positions]
            if any("\ufffd" in text for text in each):
                word = tokenizer.decode([tokens.ids[i] for i in positions]).strip()
                shown.append(f"{self.start + positions[0]}-{self.start + positions[-1]} {word!r}")
            else:
                shown.extend(f"{self.start + i} {text!r}" for i, text in zip(positions, each, strict=True))
        return ", ".join(shown)


@cache
def _bytes() -> dict[str, int]:
    """Return the byte that each character stands for in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _one_word(before: str, after: str) -> bool:
    """Return whether a sentence piece goes on with the word of the one before: of letters, in a script with spaces."""
    if not before or not after:
        return True
    edges = before[-1], after[0]
    wide = any(unicodedata.east_asian_width(edge) in "FW" for edge in edges)
    return not wide and all(unicodedata.category(edge)[0] in "LMN" for edge in edges)
