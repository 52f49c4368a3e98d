"""One call of a pipeline, as methods see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor

from .scheduler import noise_shares, schedule_times

if TYPE_CHECKING:
    from .layers import Layer
    from .prompts import Prompts


class Encoded(NamedTuple):
    """Other texts, as the pipeline encodes prompts in a call.

    Attributes:
        contexts: `[n,N,C]`.
        pooled: their pooled embeddings `[n,P]`, or None.
        mask: which columns are no padding, `[n,N]`, or None where layers attend without a mask.
        more: what else the model makes the layers' context of (HunyuanDiT: T5's context, and masks), by its arguments.
    """

    contexts: Tensor
    pooled: Tensor | None
    mask: Tensor | None
    more: dict[str, Tensor]


Encode: TypeAlias = Callable[[list[str]], Encoded]


@dataclass
class Call:
    """One call of a pipeline, as methods see it.

    Attributes:
        pipe: the pipeline.
        prompts: the prompts and their tokens.
        images: images per prompt; samples come prompt by prompt.
        encode: a function from n texts to what the pipeline makes of them in this call, an `Encoded`.
        evaluation: index of the model's evaluation, counted by timesteps.
        step: index of the sampling step that it belongs to.
        repeated: it is the step's second evaluation (Heun).
        view: how many evaluations of the prompt came before it at the same timestep (panorama).
        steps: how many sampling steps the call runs.
        latents: (height, width) of the latents.
        frames: (how many,) frames a video's latents have; () of pictures.
        mask: of an inpainting call, `[samples, 1, height, width]` at the latents' size, 1 where the picture is new;
            None elsewhere.
    """

    pipe: Any
    prompts: Prompts
    images: int
    encode: Encode
    evaluation: int = -1
    step: int = -1
    repeated: bool = False
    view: int = 0
    steps: int = 0
    latents: tuple[int, int] = (0, 0)
    frames: tuple[int, ...] = ()
    mask: Tensor | None = None
    _times: list[float] | None = None
    _shares: list[float] | None = None
    # Entries of the scheduler's timesteps from the first one that the call runs (image-to-image starts late).
    _remaining: int = 0

    @property
    def samples(self) -> int:
        return self.prompts.count * self.images

    def time(self) -> float:
        """Return the noise at this evaluation as a share of the training schedule, t/T; read from the device once."""
        if self._times is None:
            self._times = schedule_times(self.pipe.scheduler, self._remaining)
        return self._times[min(self.evaluation, len(self._times) - 1)]

    def noise_share(self) -> float:
        """Return sigma / (alpha + sigma) at this evaluation, the time of a flow; read from the device once."""
        if self._shares is None:
            self._shares = noise_shares(self.pipe.scheduler, self._remaining)
        return self._shares[min(self.evaluation, len(self._shares) - 1)]


class Site:
    """One layer, as a method's run sees it during one call.

    A run may keep attributes of its own here: with a table of them by the layers' names, torch.compile would make a
    graph for every layer.

    Attributes:
        layer: the layer.
        name: its name, as in `named_modules()`.
        chosen: the method was asked to act there.
        grid: (height, width) of its image tokens, of a video's in each frame; known from the first evaluation on.
        frames: (how many,) frames they have, one after the other; () of pictures.
        heads: how many heads it has.
        columns: where in k and v the tokens lie that `more_context` added.
    """

    def __init__(self, layer: Layer, *, chosen: bool = True) -> None:
        self.layer, self.chosen = layer, chosen
        self.name = layer.name
        self.heads: int = layer.module.heads
        self.grid: tuple[int, int] = (0, 0)
        self.frames: tuple[int, ...] = ()
        self.columns: tuple[int, int] = (0, 0)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...
