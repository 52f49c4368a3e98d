"""Latent guidance: before a denoising step, the latents move down the gradient of a loss on attention maps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import KW_ONLY, FrozenInstanceError, dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import schedules
from .._numbers import check_count, check_number, check_steps, step_count
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import family_of
from ..attach.guidance import check_guidable, reading
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

Bounds: TypeAlias = Mapping[int, float | None] | tuple[tuple[int, float | None], ...]
Read: TypeAlias = Callable[[Tensor], Tensor]


@dataclass
class GuidanceContext:
    """The facts that a guidance loss may use besides the maps.

    Attributes:
        call: the pipeline call: prompts, images per prompt, current step.
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
class LatentGuidance(Method):
    """Guide the latents by a loss on maps of attention to the text; subclass it and give `loss`.

    Before each of the first steps of a call, the model is evaluated up to the last layer that the loss reads, on the
    conditional rows, and the latents take a step `scale * schedule` down the gradient of their loss. Losses,
    latents and steps are float32, whatever the dtype of the pipeline; each sample moves as if it were alone. A sample
    whose loss or gradient is not finite stays where it is, and a RuntimeWarning says so after the call. Other methods
    rest during the evaluation and see the moved latents afterwards.

    Args:
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, whose maps are averaged.
            None takes `by_downsampling(4)`, 16x16 for Stable Diffusion at 512x512, and of a transformer all blocks
            with text but those of a single stream.
        steps: the first steps to guide; an int counts them, a float is a share of the steps that the call runs, rounded
            down. Where a second-order scheduler (Heun) evaluates the model twice in a step, both are guided, as the
            published loops do; the second one changes little.
        scale: length of the step on the latents.
        schedule: its factor over the call, as in `attnctl_fast.schedules`.
        refinement: at which steps (int, from 0) the latents are moved again and again until the loss is at most a
            bound, or `max_refinements` times; always so often where the bound is None. The host waits for the loss
            of every such move that has a bound, and once at the end of the call.
        max_refinements: how often at most.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. Layers of different grids are reported when it is put on a pipeline, what
            depends on the call (a refinement at a step that it does not run) by that, before its first step.
    """

    _: KW_ONLY
    layers: LayerChoice = None
    steps: int | float = 0.5
    scale: float = 20.0
    schedule: schedules.ScheduleLike = field(default_factory=lambda: schedules.root(0.5))
    refinement: Bounds = ()
    max_refinements: int = 20
    late_check: bool = True
    truncate: bool = True
    freeze: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # `layers = [...]` in the body of a subclass is its default, with or without an annotation.
        base = {one.name: one for one in fields(LatentGuidance)}
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
            cls.__setattr__ = LatentGuidance.__setattr__  # type: ignore[method-assign]
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_choice(self.layers))
        object.__setattr__(self, "schedule", schedules.check_schedule(self.schedule))
        check_steps("steps", self.steps)
        check_number("scale", self.scale, 0.0)
        object.__setattr__(self, "refinement", check_bounds("refinement", self.refinement))
        check_count("max_refinements", self.max_refinements, 1)

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

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Guiding(self, call, sites)

    def bounds(self, steps: int) -> dict[int, float | None]:
        """Return at which of so many steps the latents are refined, and the loss that is good enough (None: none).

        Raises:
            ValueError: a step that such a call does not run.
        """
        return sampled("refinement", dict(self.refinement), steps)

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
        raise NotImplementedError(f"{type(self).__name__} has no loss(maps, context); a latent guidance needs one")

    def after_step(self, maps: Tensor, context: GuidanceContext) -> None:
        """Look, at the end of each guided evaluation, at the last maps `[B,n,M]` that were computed, detached."""


def _set(method: LatentGuidance, name: str, value: Any) -> None:
    """Set an attribute of a subclass's own; the fields stay."""
    if name in {one.name for one in fields(method)}:
        raise FrozenInstanceError(f"cannot assign to field {name!r}; make another {type(method).__name__}")
    object.__setattr__(method, name, value)


LatentGuidance.__setattr__ = _set  # type: ignore[assignment, method-assign]


class _Point(NamedTuple):
    """A place of the latents: loss `[B]`, its gradient, and the maps that it was computed from."""

    loss: Tensor
    gradient: Tensor
    maps: Tensor


class _Guiding(Run):
    """One method at work during one pipeline call."""

    def __init__(self, method: LatentGuidance, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        positions = method.tokens(call.prompts)
        self._every = positions is None
        rows = [list(range(call.prompts.length))] * call.prompts.count if positions is None else positions
        # Tensors of inference mode cannot be kept for a gradient.
        with torch.inference_mode(False), torch.no_grad():
            self._context = GuidanceContext(call, padded(rows).repeat_interleave(call.images, 0), (0, 0))
            self._context.prepared = method.prepare(call)
        self._context.joint = bool(sites[0].layer.text)
        self._ids: dict[tuple[int, ...], Tensor] = {}
        self._sizes: list[float] | None = None
        self._bounds: dict[int, float | None] = {}
        self._skipped: Tensor | None = None

    def before_denoiser(self, evaluation: Evaluation) -> None:
        """Move the latents, where this step is guided.

        Raises:
            ValueError: a schedule or a refinement that does not fit the number of steps.
        """
        call = self.call
        if self._sizes is None:
            factors = schedules.factors(self.method.schedule, call.steps)
            self._sizes = [self.method.scale * factor for factor in factors]
            self._bounds = self.method.bounds(call.steps)
        guided = call.step < step_count(self.method.steps, call.steps)
        refined = call.step in self._bounds and not call.repeated
        if evaluation.moved or not evaluation.rows.conditional or not (guided or refined):
            return
        size = self._sizes[min(call.step, len(self._sizes) - 1)]
        latents = evaluation.latents.detach()
        context = self._context
        with torch.inference_mode(False):
            context.token_ids = context.token_ids.to(latents.device)
            samples = tuple(evaluation.samples)
            if samples not in self._ids:
                self._ids[samples] = context.token_ids[list(samples)]
            ids = None if self._every else self._ids[samples]
        context.grid = self._sites[0].grid
        method = self.method
        # Around the backward passes too: under gradient checkpointing they run the layers again.
        with reading(evaluation, self._sites, ids, truncate=method.truncate, freeze=method.freeze) as read:
            latents = latents.clone().to(torch.promote_types(latents.dtype, torch.float32))
            point = self._at(latents, read)
            if refined:
                latents, point = self._refined(latents, point, self._bounds[call.step], size, read)
            if guided:
                latents = self._moved(latents, point, size)
            with torch.no_grad():
                for view in point.maps.split(call.samples):
                    method.after_step(view, context)
        evaluation.latents = latents

    def _refined(
        self, latents: Tensor, point: _Point, bound: float | None, size: float, read: Read
    ) -> tuple[Tensor, _Point]:
        """Return the latents moved until the loss is at most `bound`, or as often as the method says."""
        checked, above = point, torch.ones_like(point.loss, dtype=torch.bool)
        for _ in range(self.method.max_refinements):
            if bound is not None:
                above = above & (checked.loss > bound)
                if not above.any():
                    break
            before = point
            latents = self._moved(latents, before, size, above)
            point = self._at(latents, read)
            checked = before if self.method.late_check else point
        return latents, point

    def _moved(self, latents: Tensor, point: _Point, size: float, chosen: Tensor | None = None) -> Tensor:
        """Return the latents a step down the gradient, of the chosen samples whose loss and gradient are finite."""
        finite = point.loss.isfinite() & point.gradient.flatten(1).isfinite().all(1)
        lost = (~finite).sum()
        self._skipped = lost if self._skipped is None else self._skipped + lost
        moving = finite if chosen is None else finite & chosen
        return torch.where(moving.reshape(-1, *[1] * (latents.ndim - 1)), latents - size * point.gradient, latents)

    def _at(self, latents: Tensor, read: Read) -> _Point:
        latents = latents.detach().requires_grad_()
        maps = read(latents)
        name, samples = type(self.method).__name__, self.call.samples
        # A pipeline that denoises several views at a time (panorama) has more rows than samples.
        views = [maps] if len(maps) == samples else maps.split(samples)
        with _full_precision(latents.device.type):
            losses = [self.method.loss(view, self._context) for view in views]
        for loss, view in zip(losses, views, strict=True):
            if not isinstance(loss, Tensor) or loss.shape != (len(view),):
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"the loss of {name} is {shape}; it must be one number per sample, [{len(view)}]")
            if not loss.requires_grad:
                raise ValueError(f"the loss of {name} does not depend on the maps, so it cannot guide the latents")
        loss = losses[0] if len(losses) == 1 else torch.cat(losses)
        (gradient,) = torch.autograd.grad(loss.sum(), latents)
        return _Point(loss.detach(), gradient, maps.detach())

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


def check_bounds(name: str, bounds: Bounds) -> tuple[tuple[int, float | None], ...]:
    """Return a mapping from steps to numbers or None in hashable form, as pairs.

    Raises:
        ValueError: not a mapping, a step that is not a count, a number that is not finite.
    """
    pairs = tuple(bounds.items()) if isinstance(bounds, Mapping) else bounds
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name} is {bounds!r}; pass a mapping from steps to numbers, such as {{0: 0.95, 10: 0.5}}")
    for step, bound in pairs:
        check_count(f"a step of {name}", step, 0)
        if bound is not None:
            check_number(f"{name}[{step}]", bound, -math.inf)
    return pairs


def sampled(
    name: str, bounds: dict[int, float | None], steps: int, default: Mapping[int, float | None] | None = None
) -> dict[int, float | None]:
    """Return `bounds`, all of whose steps a call of so many steps runs.

    Where they are the default, those that it runs are returned.

    Raises:
        ValueError: one that it does not run.
    """
    if bounds == default:
        return {step: bound for step, bound in bounds.items() if step < steps}
    for step in bounds:
        if step >= steps:
            raise ValueError(
                f"{name} names step {step}, but the call runs steps 0..{steps - 1}; leave it out or raise "
                "num_inference_steps"
            )
    return bounds
