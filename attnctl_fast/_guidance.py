"""Latent guidance during one pipeline call: what is evaluated, and how the latents move."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import schedules
from ._cut import cut_after, frozen
from ._numbers import step_count
from ._processors import GuidedProcessor
from ._tokens import padded
from ._unet_call import arguments, with_rows
from .methods.latent_guidance import GuidanceContext

if TYPE_CHECKING:
    from ._layers import Layer
    from ._scheduler import SchedulerTap
    from .methods import LatentGuidance
    from .methods._base import Call


def check_offload(unet: Any) -> None:
    """Raise ValueError where weights leave the device before a backward pass could use them."""
    for module in unet.modules():
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            raise ValueError(
                "the UNet is under group offloading, which takes its weights away before the latents' gradient needs "
                "them; use pipe.enable_model_cpu_offload() instead"
            )


class _Point(NamedTuple):
    """Where the latents are: loss `[B]`, its gradient, and the maps that it was computed from."""

    loss: Tensor
    gradient: Tensor
    maps: Tensor


class Evaluation:
    """One evaluation of the UNet as the pipeline asked for it, which can be repeated on other latents.

    Args:
        call, unet, tap: the call, its UNet (uncompiled) and the tap on its scheduler.
        first: the first conditional row.
        args, kwargs: of the UNet.
    """

    def __init__(
        self, call: Call, unet: Any, tap: SchedulerTap, first: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._unet, self._tap = unet, tap
        self._given = arguments(unet, args, kwargs)
        sample = self._given["sample"]
        self._rows, self._first, self._samples = len(sample), first, call.samples
        self.timestep = self._given["timestep"]
        # An earlier guidance of this step has moved them.
        latents = tap.latents if tap.guided is None else tap.guided
        channels = unet.config.out_channels if latents is None else latents.shape[1]
        self._latents = sample[:, :channels] if latents is None else latents
        self._fixed = sample[:, channels:]

    @property
    def latents(self) -> Tensor:
        """The latents of all samples before scaling, `[B,C,height,width]`."""
        return self._latents[-self._samples :]

    def moved_to(self, latents: Tensor) -> dict[str, Any]:
        """The UNet's arguments with these latents in all rows; the scheduler's next step starts from there."""
        self._tap.guided = latents
        rows = torch.cat([self._input(latents)] * (self._rows // self._samples))
        return {**self._given, "sample": torch.cat([rows, self._fixed], 1)}

    def conditional(self, latents: Tensor, block: str) -> dict[str, Any]:
        """The arguments of the conditional rows alone with these latents, for a UNet that ends with `block`."""
        given = {name: self._sliced(value) for name, value in self._given.items() if name != "sample"}
        if block.startswith("down_blocks") and given.get("mid_block_additional_residual") is not None:
            # ControlNet's residuals are added after the down blocks.
            given["mid_block_additional_residual"] = given["down_block_additional_residuals"] = None
        return {**given, "sample": torch.cat([self._input(latents), self._sliced(self._fixed)], 1)}

    def _input(self, latents: Tensor) -> Tensor:
        return self._tap.scaled(latents.to(self._fixed.dtype), self.timestep)

    def _sliced(self, value: Any) -> Any:
        """The conditional rows of all tensors within, as tensors that autograd may keep."""
        return with_rows(value, self._rows, lambda x: _kept(x[self._first :]))


def _kept(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


class Guidance:
    """One method at work during one pipeline call.

    Raises:
        ValueError: the method does not fit the call, or its layers have different grids.
    """

    def __init__(self, method: LatentGuidance, layers: list[Layer], call: Call, unet: Any) -> None:
        self.method, self.call = method, call
        self._layers, self._unet = layers, unet
        if len({layer.level for layer in layers}) > 1:
            raise ValueError(
                f"the layers of {type(method).__name__}, {', '.join(layer.name for layer in layers)}, have different "
                "grids, so their maps cannot be averaged; choose layers of one grid, as by_downsampling(4) does"
            )
        if any(parameter.is_inference() for parameter in unet.parameters()):
            raise ValueError(
                "the UNet was loaded under torch.inference_mode(), so nothing can be differentiated through it; load "
                "the pipeline outside of it (it may be called within)"
            )
        positions = method.tokens(call.prompts)
        self._every = positions is None
        rows = [list(range(call.prompts.length))] * call.prompts.count if positions is None else positions
        # Tensors of inference mode cannot be kept for a gradient.
        with torch.inference_mode(False), torch.no_grad():
            self._context = GuidanceContext(call, padded(rows).repeat_interleave(call.images, 0), (0, 0))
            self._context.prepared = method.prepare(call)
        self._sizes: list[float] = []
        self._bounds: dict[int, float | None] = {}
        self._skipped: Tensor | None = None

    def plan(self) -> None:
        """Once the number of steps is known, before the first one.

        Raises:
            ValueError: a schedule or a refinement that does not fit it.
        """
        steps = self.call.steps
        self._sizes = [self.method.scale * factor for factor in schedules.factors(self.method.schedule, steps)]
        self._bounds = self.method.bounds(steps)

    def guide(self, evaluation: Evaluation) -> Tensor | None:
        """The latents moved, float32; None where this step is not guided."""
        step = self.call.step
        guided = step < step_count(self.method.steps, self.call.steps)
        refined = step in self._bounds and not self.call.repeated
        if not guided and not refined:
            return None
        size = self._sizes[min(step, len(self._sizes) - 1)]
        latents = evaluation.latents.detach()
        context = self._context
        context.token_ids = context.token_ids.to(latents.device)
        context.grid = self._layers[0].grid(self.call.latents)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if self.method.freeze:
                stack.enter_context(frozen(self._unet))
            latents = latents.clone().to(torch.promote_types(latents.dtype, torch.float32))
            point = self._at(latents, evaluation)
            if refined:
                latents, point = self._refined(latents, point, self._bounds[step], size, evaluation)
            if guided:
                latents = self._moved(latents, point, size)
            with torch.no_grad():
                self.method.after_step(point.maps, context)
        return latents

    def _refined(
        self, latents: Tensor, point: _Point, bound: float | None, size: float, evaluation: Evaluation
    ) -> tuple[Tensor, _Point]:
        """Moved until the loss is at most `bound`, or as often as the method says."""
        checked, above = point, torch.ones_like(point.loss, dtype=torch.bool)
        for _ in range(self.method.max_refinements):
            if bound is not None:
                above = above & (checked.loss > bound)
                if not above.any():
                    break
            before = point
            latents = self._moved(latents, before, size, above)
            point = self._at(latents, evaluation)
            checked = before if self.method.late_check else point
        return latents, point

    def _moved(self, latents: Tensor, point: _Point, size: float, chosen: Tensor | None = None) -> Tensor:
        """A step down the gradient, of the chosen samples whose loss and gradient are finite."""
        finite = point.loss.isfinite() & point.gradient.flatten(1).isfinite().all(1)
        lost = (~finite).sum()
        self._skipped = lost if self._skipped is None else self._skipped + lost
        moving = finite if chosen is None else finite & chosen
        return torch.where(moving[:, None, None, None], latents - size * point.gradient, latents)

    def _at(self, latents: Tensor, evaluation: Evaluation) -> _Point:
        latents = latents.detach().requires_grad_()
        # Around the backward pass too: under gradient checkpointing it runs the layers again.
        with self._reading() as maps_of_layers:
            maps = self._maps(latents, evaluation, maps_of_layers)
            with _full_precision(latents.device.type):
                loss = self.method.loss(maps, self._context)
            name = type(self.method).__name__
            if not isinstance(loss, Tensor) or loss.shape != (len(latents),):
                shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"the loss of {name} is {shape}; it must be one number per sample, [{len(latents)}]")
            if not loss.requires_grad:
                raise ValueError(f"the loss of {name} does not depend on the maps, so it cannot guide the latents")
            (gradient,) = torch.autograd.grad(loss.sum(), latents)
        return _Point(loss.detach(), gradient, maps.detach())

    @contextmanager
    def _reading(self) -> Iterator[list[Tensor]]:
        """Within the block the UNet ends where it may, and its layers add their maps to the list."""
        maps: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.method.truncate:
                stack.enter_context(cut_after(self._unet, self._layers[-1].block))
            token_ids = None if self._every else self._context.token_ids
            stack.enter_context(_recorded(self._layers, token_ids, maps))
            yield maps

    def _maps(self, latents: Tensor, evaluation: Evaluation, maps: list[Tensor]) -> Tensor:
        """Attention of the conditional rows, mean over heads and layers, `[B,n,M]`."""
        last = self._layers[-1].block if self.method.truncate else ""
        self._unet(**evaluation.conditional(latents, last))
        return maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)

    def finish(self) -> None:
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
    """Without the caller's autocast."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


@contextmanager
def _recorded(layers: list[Layer], token_ids: Tensor | None, maps: list[Tensor]) -> Iterator[None]:
    """Within the block, these layers add their maps to `maps`."""
    before = [layer.module.processor for layer in layers]
    try:
        for layer, processor in zip(layers, before, strict=True):
            layer.module.set_processor(GuidedProcessor(processor, layer, token_ids, maps))
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.module.set_processor(processor)
