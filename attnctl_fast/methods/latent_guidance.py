"""Latent guidance: before a denoising step, the latents move down the gradient of a loss on attention maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .. import schedules
from .._numbers import check_count, check_number, step_count
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.guidance import reading
from ..attach.protocol import Run
from .map_guidance import MapGuidance, MapRun, Point, set_own

Bounds: TypeAlias = Mapping[int, float | None] | tuple[tuple[int, float | None], ...]
Read: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentGuidance(MapGuidance):
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
    scale: float = 20.0
    schedule: schedules.ScheduleLike = field(default_factory=lambda: schedules.root(0.5))
    refinement: Bounds = ()
    max_refinements: int = 20
    late_check: bool = True
    truncate: bool = True
    freeze: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "schedule", schedules.check_schedule(self.schedule))
        check_number("scale", self.scale, 0.0)
        object.__setattr__(self, "refinement", check_bounds("refinement", self.refinement))
        check_count("max_refinements", self.max_refinements, 1)

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Guiding(self, call, sites)

    def bounds(self, steps: int) -> dict[int, float | None]:
        """Return at which of so many steps the latents are refined, and the loss that is good enough (None: none).

        Raises:
            ValueError: a step that such a call does not run.
        """
        return sampled("refinement", dict(self.refinement), steps)


LatentGuidance.__setattr__ = set_own  # type: ignore[assignment, method-assign]


class _Guiding(MapRun):
    """One method at work during one pipeline call."""

    method: LatentGuidance

    def __init__(self, method: LatentGuidance, call: Call, sites: list[Site]) -> None:
        super().__init__(method, call, sites)
        self._sizes: list[float] | None = None
        self._bounds: dict[int, float | None] = {}

    def before_denoiser(self, evaluation: Evaluation) -> None:
        """Move the latents, where this step is guided.

        Raises:
            ValueError: a schedule or a refinement that does not fit the number of steps.
        """
        call, method = self.call, self.method
        if self._sizes is None:
            factors = schedules.factors(method.schedule, call.steps)
            self._sizes = [method.scale * factor for factor in factors]
            self._bounds = method.bounds(call.steps)
        guided = call.step < step_count(method.steps, call.steps)
        refined = call.step in self._bounds and not call.repeated
        if evaluation.moved or not evaluation.rows.conditional or not (guided or refined):
            return
        size = self._sizes[min(call.step, len(self._sizes) - 1)]
        latents = evaluation.latents.detach()
        ids = self.begin(evaluation)
        # Around the backward passes too: under gradient checkpointing they run the layers again.
        with reading(evaluation, self.sites, ids, truncate=method.truncate, freeze=method.freeze) as read:
            latents = latents.clone().to(torch.promote_types(latents.dtype, torch.float32))
            point = self._at(latents, read)
            if refined:
                latents, point = self._refined(latents, point, self._bounds[call.step], size, read)
            if guided:
                latents = self._moved(latents, point, size)
            self.look(point)
        evaluation.latents = latents

    def _refined(
        self, latents: Tensor, point: Point, bound: float | None, size: float, read: Read
    ) -> tuple[Tensor, Point]:
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

    def _moved(self, latents: Tensor, point: Point, size: float, chosen: Tensor | None = None) -> Tensor:
        """Return the latents a step down the gradient, of the chosen samples whose loss and gradient are finite."""
        finite = self.finite(point)
        moving = finite if chosen is None else finite & chosen
        return torch.where(moving.reshape(-1, *[1] * (latents.ndim - 1)), latents - size * point.gradient, latents)

    def _at(self, latents: Tensor, read: Read) -> Point:
        latents = latents.detach().requires_grad_()
        return self.point(latents, read(latents))


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
