"""Composable Diffusion: the predictions for several prompts, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

from .._numbers import check_number

Prompts: TypeAlias = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class ComposableDiffusion:
    """Composable Diffusion (arXiv 2206.01714, ECCV 2022): conjunction and negation of prompts.

    The conditional prediction becomes `e + sum_i w_i (e_i - e)`, with e the unconditional prediction and e_i that for
    the i-th prompt; the pipeline's guidance scale multiplies the sum as it always does. These prompts take the place of
    the one that the pipeline is called with, which is not evaluated; its negative prompt stays. All prompts and the
    unconditional one run through the UNet as one batch. It does not go together with other methods.

    Args:
        prompts: one or more texts, the same for every image; or one list of as many texts per prompt of the call.
        weights: of the prompts; a negative one takes away what its prompt says. None for 1 each.

    Raises:
        ValueError: an empty prompt, or weights that are not one finite number per prompt. Lists of texts whose number
            is not that of the call's prompts, and calls without guidance, are reported when the pipeline is called.
    """

    prompts: Prompts
    weights: Sequence[float] | None = None
    _: KW_ONLY

    def __post_init__(self) -> None:
        given = self.prompts
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"prompts is {given!r}; pass a list of texts, or one list of texts per prompt")
        nested = [not isinstance(item, str) for item in given]
        if any(nested) and not all(nested):
            raise ValueError(f"prompts is {given!r}; pass texts, or lists of texts, not a mix")
        rows = [tuple(row) for row in given] if all(nested) else [tuple(given)]
        for row in rows:
            for text in row or [""]:
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"prompts holds {text!r}; every prompt must say what to add or to take away")
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"prompts holds lists of {sorted({len(row) for row in rows})} texts; make them as long")
        object.__setattr__(self, "prompts", tuple(rows) if all(nested) else rows[0])
        weights = (1.0,) * len(rows[0]) if self.weights is None else tuple(self.weights)
        if len(weights) != len(rows[0]):
            raise ValueError(f"weights holds {len(weights)} numbers for {len(rows[0])} prompts; pass one for each")
        for weight in weights:
            check_number("a weight", weight, -float("inf"))
        object.__setattr__(self, "weights", weights)

    def texts(self, count: int) -> list[str]:
        """The prompts in turn, each for all of `count` prompts of a call.

        Raises:
            ValueError: lists of texts for another number of prompts.
        """
        rows = (self.prompts,) * count if isinstance(self.prompts[0], str) else self.prompts
        if len(rows) != count:
            raise ValueError(f"prompts holds {len(rows)} lists, but the call has {count} prompts; pass one per prompt")
        return [text for column in zip(*rows, strict=True) for text in column]
