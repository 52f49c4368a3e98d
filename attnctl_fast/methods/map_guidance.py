"""Map guidance: a loss on maps of attention to the text, whose gradient by the latents a method makes use of."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import KW_ONLY, FrozenInstanceError, dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import check_steps
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import family_of
from ..attach.guidance import check_guidable
from ..attach.intercept import check_uncached
from ..attach.layers import (
    Layer,
    LayerChoice,
    both_streams,
    by_downsampling,
    check_choice,
    choose,
    of_transformer,
)
from ..attach.prompts import Prompts, padded
from ..attach.protocol import Method, Run
from ..attach.scheduler import check_scheduler


@dataclass
class GuidanceContext:
    """The facts that a guidance loss may use besides the maps.

    Of a video every frame is a sample: an image of its prompt like any other.

    Attributes:
        call: the pipeline call: prompts, images per prompt (of a video all their frames), current step.
        token_ids: the tokens of the maps, `[B,n]` int64 on the maps' device, padded with -1 where a sample has fewer
            (its maps are zero there).
        grid: (height, width) of the maps.
        prepared: the result of the method's `prepare`.
        joint: the maps are of joint attention (SD 3, FLUX), where those of a place add up to less than one.
    """

    call: Call
    token_ids: Tensor
    grid: tuple[int, int]
    prepared: Any = None
    joint: bool = False


@dataclass(frozen=True)
class MapGuidance(Method):
    """Make use of the gradient of a loss on attention maps; what `LatentGuidance` and `VelocityGuidance` share.

    Args:
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, whose maps are averaged.
            None takes `by_downsampling(4)`, 16x16 for Stable Diffusion at 512x512, and of a transformer all blocks
            with text but those of a single stream.
        steps: the first steps to guide; an int counts them, a float is a share of the steps that the call runs, rounded
            down.
    """

    _: KW_ONLY
    layers: LayerChoice = None
    steps: int | float = 0.5

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `layers = [...]` in the body of a subclass is its default, with or without an annotation.
        base = {one.name: one for one in fields(cls) if one.kw_only}
        own = cls.__dict__.get("__annotations__", {})
        plain = [name for name in base if name in cls.__dict__ and name not in own]
        cls.__annotations__ = {**own, **{name: base[name].type for name in plain}}
        for name in plain:
            # Not as a default: a list may not be one.
            setattr(cls, name, field(default_factory=partial(copy, cls.__dict__[name]), kw_only=True))

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if "__dataclass_fields__" not in cls.__dict__:
            # A subclass without the decorator.
            dataclass(frozen=True)(cls)
            cls.__setattr__ = set_own  # type: ignore[assignment, method-assign]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_choice(self.layers))
        check_steps("steps", self.steps)

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return both_streams(layers) if of_transformer(layers) else choose(layers, by_downsampling(4))

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        check_scheduler(pipe)
        check_guidable(family_of(pipe).model_of(pipe))
        if len({layer.factor for layer in layers}) > 1:
            raise ValueError(
                f"the layers of {type(self).__name__}, {', '.join(layer.name for layer in layers)}, have different "
                "grids, so their maps cannot be averaged; choose layers of one grid, as by_downsampling(4) does"
            )

    def tokens(self, prompts: Prompts) -> list[list[int]] | None:
        """Return the positions of the tokens whose maps the loss reads, one list per prompt; None for every token.

        Raises:
            ValueError: the method's words do not fit the prompts.
        """
        return None

    def prepare(self, call: Call) -> Any:
        """Return what the loss needs to know of the call, worked out before its first step, without gradients.

        Raises:
            ValueError: the method does not fit the call.
        """
        return None

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        """Return the loss `[B]` of attention maps `[B,n,M]`, float32, mean over heads and layers."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(maps, context); a guidance needs one")

    def after_step(self, maps: Tensor, context: GuidanceContext) -> None:
        """Look, at the end of each guided evaluation, at the last maps `[B,n,M]` that were computed, detached."""


def set_own(method: MapGuidance, name: str, value: Any) -> None:
    """Set an attribute of a subclass's own; the fields stay."""
    if name in {one.name for one in fields(method)}:
        raise FrozenInstanceError(f"cannot assign to field {name!r}; make another {type(method).__name__}")
    object.__setattr__(method, name, value)


MapGuidance.__setattr__ = set_own  # type: ignore[assignment, method-assign]


class Point(NamedTuple):
    """A place of the latents: loss `[B]`, of a video the frames' mean, its gradient, and the maps that it is of."""

    loss: Tensor
    gradient: Tensor
    maps: Tensor


class MapRun(Run):
    """A map guidance at work during one pipeline call."""

    def __init__(self, method: MapGuidance, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self.sites = method, call, sites
        positions = method.tokens(call.prompts)
        self._every = positions is None
        rows = [list(range(call.prompts.length))] * call.prompts.count if positions is None else positions
        # Tensors of inference mode cannot be kept for a gradient.
        with torch.inference_mode(False), torch.no_grad():
            self._token_ids = padded(rows)
            self._context = self._of(call)
        self._ids: dict[tuple[int, ...], Tensor] = {}
        self._skipped: Tensor | None = None

    def _of(self, call: Call) -> GuidanceContext:
        """Return what the loss is told of a call."""
        ids = self._token_ids.repeat_interleave(call.images, 0)
        return GuidanceContext(call, ids, (0, 0), self.method.prepare(call), bool(self.sites[0].layer.text))

    def begin(self, evaluation: Evaluation) -> Tensor | None:
        """Return the tokens whose maps an evaluation is to give, `[B,n]`, or None for every token."""
        check_uncached(evaluation.model, type(self.method).__name__)
        call, site, device = self.call, self.sites[0], evaluation.latents.device
        own = replace(call, images=call.images * site.frames[0]) if site.frames else call
        if self._context.call.images != own.images:
            # How many frames a video has is known from here on.
            with torch.inference_mode(False), torch.no_grad():
                self._context = self._of(own)
        context = self._context
        context.call, context.grid = own, site.grid
        with torch.inference_mode(False):
            context.token_ids = context.token_ids.to(device)
            samples = tuple(evaluation.samples)
            if samples not in self._ids:
                self._ids[samples] = self._token_ids.repeat_interleave(call.images, 0)[list(samples)].to(device)
        return None if self._every else self._ids[samples]

    def _views(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Return the maps `[samples,n,M]` that the loss is asked for one after the other; a frame is a sample.

        A pipeline that denoises several views at a time (panorama) has more rows than samples.
        """
        views = maps.split(self.call.samples)
        if not (frames := self.sites[0].frames):
            return views
        return tuple(view.unflatten(2, (*frames, -1)).movedim(2, 1).flatten(0, 1) for view in views)

    def point(self, latents: Tensor, maps: Tensor, *, keep: bool = False) -> Point:
        """Return the loss of the maps and its gradient by the latents that they came from; `keep` keeps the graph."""
        method, views = self.method, self._views(maps)
        name = type(method).__name__
        with _full_precision(latents.device.type):
            losses = [method.loss(view, self._context) for view in views]
        for loss, view in zip(losses, views, strict=True):
            if not isinstance(loss, Tensor) or loss.shape != (len(view),):
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"the loss of {name} is {shape}; it must be one number per sample, [{len(view)}]")
            if not loss.requires_grad:
                raise ValueError(f"the loss of {name} does not depend on the maps, so it cannot guide the latents")
        loss = losses[0] if len(losses) == 1 else torch.cat(losses)
        # Every frame moves as a picture would, by the gradient of its own loss.
        (gradient,) = torch.autograd.grad(loss.sum(), latents, retain_graph=keep)
        return Point(loss.detach().unflatten(0, (len(maps), -1)).mean(1), gradient, maps.detach())

    def finite(self, point: Point) -> Tensor:
        """Return which samples have a finite loss and gradient, `[B]`; the others are counted."""
        finite = point.loss.isfinite() & point.gradient.flatten(1).isfinite().all(1)
        lost = (~finite).sum()
        self._skipped = lost if self._skipped is None else self._skipped + lost
        return finite

    @torch.no_grad()
    def look(self, point: Point) -> None:
        """Have the method look at the last maps of a step."""
        for view in self._views(point.maps):
            self.method.after_step(view, self._context)

    def end(self) -> None:
        """Warn (RuntimeWarning) of moves that were left out."""
        skipped, self._skipped = self._skipped, None
        if skipped is not None and (count := int(skipped)):
            warnings.warn(
                f"{type(self.method).__name__} left out {count} moves of the latents whose loss or gradient was not "
                "finite; a smaller scale, or float32 for the pipeline, may help",
                RuntimeWarning,
                stacklevel=2,
            )


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Turn the caller's autocast off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
