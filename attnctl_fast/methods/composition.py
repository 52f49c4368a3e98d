"""Composition of contexts: edit prompts added to the prompt, or taken away from it, in every cross-attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, TypeAlias

from .._layers import LayerChoice, check_choice
from .._numbers import check_number, check_steps, step_count
from ..ops.composed_attention import check_weights

if TYPE_CHECKING:
    from .._layers import Layer

Texts: TypeAlias = str | Sequence[str]


@dataclass(frozen=True)
class Edit:
    """One edit prompt of a `Composition`.

    Args:
        prompt: the text, or a list of one text per prompt.
        weight: how much it counts; the prompt itself has weight 1.
        direction: +1 adds what the text says (conjunction), -1 takes it away (negation).
        gamma_attn, gamma_norm: steps of its own context update, as in `EnergyContext`, by the released code's
            convention and from the masked part of an inpainting call's picture; 4e-4 to 1e-3 is typical.
        start: the step from which on it counts; an int counts steps, a float is a share of them, rounded down (but any
            share above zero is at least one step). Earlier starts change the picture's composition, later ones its
            details.

    Raises:
        ValueError: an empty prompt or an argument out of range.
    """

    prompt: Texts
    weight: float = 1.0
    _: KW_ONLY
    direction: int = 1
    gamma_attn: float = 0.0
    gamma_norm: float = 0.0
    start: int | float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            if not isinstance(self.prompt, Sequence) or not self.prompt:
                raise ValueError(f"the edit prompt is {self.prompt!r}; pass a text, or a list of one text per prompt")
            object.__setattr__(self, "prompt", tuple(self.prompt))
        for text in self.texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the edit prompt is {text!r}; it must say what to add or to take away")
        check_number("weight", self.weight, 0.0)
        if self.direction not in (1, -1):
            raise ValueError(f"direction is {self.direction!r}; it must be +1 (add) or -1 (take away)")
        check_number("gamma_attn", self.gamma_attn, 0.0)
        check_number("gamma_norm", self.gamma_norm, 0.0)
        check_steps("start", self.start)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    def runs(self, steps: int) -> list[bool]:
        """Whether it counts at each of so many steps."""
        first = step_count(self.start, steps)
        return [index >= first for index in range(steps)]


@dataclass(frozen=True)
class Composition:
    """Compositional averaging of cross-attention outputs, CACAO (arXiv 2306.09869, NeurIPS 2023; MATH.md
    section 2).

    The attention of the conditional rows becomes the weighted mean of the attention to the prompt (weight 1) and to
    every edit's text (direction times weight). Edits with gammas move their own contexts from layer to layer, and the
    unconditional rows then see one more context, moved by the edits' mean, as published. Without guidance there are no
    unconditional rows.

    Args:
        edits: one or more `Edit`.
        layers: name prefixes, or `by_downsampling(n)`. None for every cross-attention layer.

    Raises:
        ValueError: no edit, or weights that cancel each other with the prompt's: their sum is the mean's denominator.
            Edits that start at different steps are checked for every step before the first one of a call. A list of
            texts whose length is not the number of prompts is reported when the pipeline is called.
    """

    edits: Sequence[Edit]
    _: KW_ONLY
    layers: LayerChoice = None

    def __post_init__(self) -> None:
        edits = (self.edits,) if isinstance(self.edits, Edit) else self.edits
        if isinstance(edits, str) or not isinstance(edits, Sequence) or not edits:
            raise ValueError(f"edits is {self.edits!r}; pass a list of at least one Edit('what to add')")
        for edit in edits:
            if not isinstance(edit, Edit):
                raise ValueError(f"edits holds {edit!r}; pass Edit('what to add') instances")
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "layers", check_choice(self.layers))
        self.shares([True] * len(edits))

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return list(layers)

    def shares(self, runs: Sequence[bool]) -> list[float]:
        """The normalised weights of the prompt and of every edit, while the edits in `runs` count.

        Raises:
            ValueError: they sum to (nearly) zero.
        """
        signed = [edit.direction * edit.weight * run for edit, run in zip(self.edits, runs, strict=True)]
        return check_weights([1.0, *signed], 1 + len(signed))
