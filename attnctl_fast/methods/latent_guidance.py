"""Latent guidance: before a denoising step, the latents move down the gradient of a loss on cross-attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from .. import schedules
from .._layers import LayerChoice, by_downsampling, check_choice, choose
from .._numbers import check_count, check_number, check_steps

if TYPE_CHECKING:
    from .._layers import Layer
    from .._tokens import Prompts
    from ._base import Call

Bounds: TypeAlias = Mapping[int, float | None] | tuple[tuple[int, float | None], ...]


@dataclass
class GuidanceContext:
    """What a guidance loss knows besides the maps.

    call: the pipeline call: prompts, images per prompt, current step. token_ids: the tokens of the maps, `[B,n]` int64
    on the maps' device, padded with -1 where a sample has fewer (its maps are zero there). grid: (height, width) of the
    maps. prepared: what the method's `prepare` returned.
    """

    call: Call
    token_ids: Tensor
    grid: tuple[int, int]
    prepared: Any = None


@dataclass(frozen=True)
class LatentGuidance:
    """Guidance of the latents by a loss on cross-attention maps; subclass it and give `loss`.

    Before each of the first steps of a call, the part of the UNet up to the last layer that the loss reads is evaluated
    on the conditional rows, and the latents take a step `scale * schedule` down the gradient of their loss. Losses,
    latents and steps are float32, whatever the dtype of the pipeline; each sample moves as if it were alone. A sample
    whose loss or gradient is not finite stays where it is, and a RuntimeWarning says so after the call. Other methods
    rest during the evaluation and see the moved latents afterwards.

    Args:
        layers: name prefixes, or `by_downsampling(n)`: cross-attention layers of one grid, whose maps are averaged.
            None takes `by_downsampling(4)`, 16x16 for Stable Diffusion at 512x512.
        steps: the first steps to guide; an int counts them, a float is a share of the steps that the call runs, rounded
            down. Where a second-order scheduler (Heun) evaluates the UNet twice in a step, both are guided, as the
            published loops do; the second one changes little.
        scale: length of the step on the latents.
        schedule: its factor over the call, as in `attnctl_fast.schedules`.
        refinement: at which steps (int, from 0) the latents are moved again and again until the loss is at most a
            bound, or `max_refinements` times; always so often where the bound is None. The host waits for the loss
            of every such move that has a bound, and once at the end of the call.
        max_refinements: see there.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. What depends on the call (a refinement at a step that it does not run,
            layers of different grids) is reported when the pipeline is called, before its first step.
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
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_choice(self.layers))
        object.__setattr__(self, "schedule", schedules.check_schedule(self.schedule))
        check_steps("steps", self.steps)
        check_number("scale", self.scale, 0.0)
        object.__setattr__(self, "refinement", check_bounds("refinement", self.refinement))
        check_count("max_refinements", self.max_refinements, 1)

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return choose(layers, by_downsampling(4))

    def bounds(self, steps: int) -> dict[int, float | None]:
        """At which steps of a call of so many the latents are refined, and the largest loss that is good enough (None:
        none is).

        Raises:
            ValueError: a step that such a call does not run.
        """
        return sampled("refinement", dict(self.refinement), steps)

    def tokens(self, prompts: Prompts) -> list[list[int]] | None:
        """Positions of the tokens whose maps the loss reads, one list per prompt; None for every token of the context.

        Raises:
            ValueError: the method's words do not fit the prompts.
        """
        return None

    def prepare(self, call: Call) -> Any:
        """What the loss needs to know of the call, worked out before its first step, without gradients.

        Raises:
            ValueError: the method does not fit the call.
        """
        return None

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        """The loss `[B]` of attention maps `[B,n,M]`, float32, mean over heads and layers."""
        raise NotImplementedError(f"{type(self).__name__} has no loss(maps, context); a latent guidance needs one")

    def after_step(self, maps: Tensor, context: GuidanceContext) -> None:
        """Called at the end of each guided evaluation with the last maps `[B,n,M]` that were computed, detached."""


def check_bounds(name: str, bounds: Bounds) -> tuple[tuple[int, float | None], ...]:
    """A mapping from steps to numbers or None in hashable form, as pairs.

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
    """`bounds`, all of whose steps a call of so many steps runs; where they are the default, those that it runs.

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
