"""What a method that edits cross-attention is to the engine that drives it, and checks that methods share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from .._layers import Layer, LayerChoice
    from .._tokens import Prompts


@dataclass
class Call:
    """One call of a pipeline, as methods see it.

    prompts: the prompts and their tokens. images: images per prompt; samples come prompt by prompt. evaluation: index
    of the UNet evaluation. step, steps: index of the sampling step it belongs to, and how many the schedule has from
    the call's first one on. latents: (height, width) of the latents.
    """

    prompts: Prompts
    images: int
    evaluation: int = -1
    step: int = -1
    steps: int = 0
    latents: tuple[int, int] = (0, 0)

    @property
    def samples(self) -> int:
        return self.prompts.count * self.images


class Edited(NamedTuple):
    """out: attention `[B,H,M,d]`. bias `[B,H,T,M]`, target_ids, pinned_ids: the edit behind it, as in
    `ops.merge_targets`."""

    out: Tensor
    bias: Tensor
    target_ids: Tensor
    pinned_ids: Tensor


class Edit(Protocol):
    """A method at work during one pipeline call."""

    def active(self) -> bool:
        """Whether it edits at the call's current step; where it does not, the pipeline's own processor runs."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Edited:
        """Attention of the conditional rows, q `[B,H,M,d]`, k and v `[B,H,N,d]`."""


class Method(Protocol):
    """A method that edits cross-attention: immutable, and the same for every call."""

    @property
    def layers(self) -> LayerChoice: ...

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        """The layers to edit where the user names none, from all cross-attention layers in order of execution."""

    def start(self, call: Call) -> Edit:
        """Begin a pipeline call, before its first step; raises ValueError where the prompts do not fit the method."""


def check_number(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high], or in (low, high] with `open_low`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        limits = f"{'above' if open_low else 'at least'} {low:g}" + (
            "" if high == math.inf else f" and at most {high:g}"
        )
        raise ValueError(f"{name} is {value!r}; it must be a number {limits}")


def check_count(name: str, value: int, low: int) -> None:
    """Raise ValueError unless `value` is an int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; it must be an int of at least {low}")


def check_steps(name: str, value: int | float) -> None:
    """Raise ValueError unless `value` is a count (int >= 0) or a share of the schedule (float in 0..1)."""
    if isinstance(value, float):
        check_number(name, value, 0.0, 1.0)
    else:
        check_count(name, value, 0)


def step_count(value: int | float, steps: int) -> int:
    """`value` as a number of steps: a count as it is, a share rounded down (but any share above zero is at least one
    step)."""
    if isinstance(value, int):
        return value
    return max(math.floor(value * steps + 1e-6), int(value > 0))
