"""What a method is to the engine that drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from .._layers import Layer, LayerChoice
    from .._tokens import Prompts

Encode: TypeAlias = Callable[[list[str]], tuple[Tensor, Tensor | None]]


@dataclass
class Call:
    """One call of a pipeline, as methods see it.

    pipe: the pipeline. prompts: the prompts and their tokens. images: images per prompt; samples come prompt by
    prompt. evaluation: index of the UNet evaluation. step, steps: index of the sampling step it belongs to, and how
    many the schedule has from the call's first one on. repeated: it is the step's second evaluation (Heun).
    latents: (height, width) of the latents. mask: of an inpainting call, `[samples, 1, height, width]` at the
    latents' size, 1 where the picture is new; None elsewhere. encode: contexts `[n,N,C]` and pooled embeddings (or
    None) of n texts, as the pipeline encodes prompts in this call. timesteps: the schedule, one entry per
    evaluation; known from the first one on.
    """

    pipe: Any
    prompts: Prompts
    images: int
    encode: Encode
    evaluation: int = -1
    step: int = -1
    repeated: bool = False
    steps: int = 0
    latents: tuple[int, int] = (0, 0)
    mask: Tensor | None = None
    timesteps: Tensor | None = None

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


class Modulated(NamedTuple):
    """out: attention `[B,H,M,d]`. logits: what the edit makes of a head's scaled logits `[B,M,N]`."""

    out: Tensor
    logits: Callable[[Tensor], Tensor]


class Editing(Protocol):
    """A method at work during one pipeline call."""

    def active(self) -> bool:
        """Whether it edits at the call's current step; where it does not, the pipeline's own processor runs."""

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Edited | Modulated:
        """Attention of the conditional rows, q `[B,H,M,d]`, k and v `[B,H,N,d]`."""


@runtime_checkable
class RewritesText(Protocol):
    """An `Editing` that changes the text's context as well."""

    def rewritten(self, embeddings: Tensor) -> Tensor:
        """The prompts' contexts `[samples,N,C]` for the whole call; the given ones are left as they are."""


class Method(Protocol):
    """A method that acts on cross-attention: immutable, and the same for every call."""

    @property
    def layers(self) -> LayerChoice: ...

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        """The layers to act on where the user names none, from all that it may act on, in order of execution."""


@runtime_checkable
class EditingMethod(Method, Protocol):
    """A method that edits the attention of the conditional rows, each layer by itself.

    Cross-attention, but where it has a method `reaches(layer) -> bool`: the layers for which that is true.
    """

    def start(self, call: Call) -> Editing:
        """Begin a pipeline call, before its first step; raises ValueError where the prompts do not fit the method."""
