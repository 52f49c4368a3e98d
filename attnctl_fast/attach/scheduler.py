"""The scheduler during a call: its input is seen and changed, and the noise of its steps is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .patching import Patch

# Of Stable Diffusion, whose noise a scheduler without a table of its own is measured by.
_BETAS, _STEPS = (0.00085, 0.012), 1000


def check_scheduler(pipe: Any) -> None:
    """Raise ValueError unless latents that have been moved can be handed to the pipeline's scheduler."""
    scheduler = getattr(pipe, "scheduler", None)
    if not hasattr(scheduler, "step"):
        raise ValueError(
            f"the scheduler of {type(pipe).__name__}, {type(scheduler).__name__}, has no step, which latent guidance "
            "needs; use a diffusers scheduler such as DDIMScheduler"
        )


class SchedulerTap:
    """A wrapper of a scheduler for the length of a pipeline call.

    It notes the latents before they are scaled, and has the step start from others.

    latents: what `scale_model_input` was last given; None before, and where the scheduler has none. moved: what the
    next `step` starts from, once; None for what the pipeline gives. added: what is added to its prediction, likewise.
    steps: how many steps were taken.
    """

    def __init__(self) -> None:
        self.latents: Tensor | None = None
        self.moved: Tensor | None = None
        self.added: Tensor | None = None
        self.steps = 0
        self._patches: dict[str, Patch] = {}

    def put_on(self, scheduler: Any) -> None:
        for name, wrapper in (("scale_model_input", self._scale), ("step", self._step)):
            if hasattr(scheduler, name):
                self._patches[name] = Patch(scheduler, name, wrapper)

    def _scale(self, patch: Patch, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.latents, self.moved, self.added = sample, None, None
        return patch.inner(sample, *args, **kwargs)

    def _step(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        names = ("model_output", "timestep", "sample")[: len(args)]
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.moved is not None:
            given["sample"] = self.moved.to(given["sample"].dtype)
        if self.added is not None:
            given["model_output"] = given["model_output"] + self.added.to(given["model_output"].dtype)
        self.moved = self.added = None
        return patch.inner(*(given.pop(name) for name in names), *args[3:], **given)

    def add(self, correction: Tensor) -> None:
        """Add to the prediction that the next `step` is given."""
        self.added = correction if self.added is None else self.added + correction

    def factor(self, timestep: Any, like: Tensor) -> Tensor | None:
        """Return what the scheduler multiplies latents by to make the model's input of them, a scalar; None for 1."""
        scale = self._patches.get("scale_model_input")
        one = torch.ones(1, 1, 1, 1, dtype=like.dtype, device=like.device)
        scaled = one if scale is None else scale.inner(one, timestep)
        return None if scaled is one else scaled.reshape(())

    def remove(self) -> None:
        """Take the wrappers off."""
        for patch in self._patches.values():
            patch.undo()
        self.latents = self.moved = self.added = None


def prediction_type(scheduler: Any) -> str:
    """Return what a scheduler takes the model's output for: "flow", "v_prediction", "epsilon" or "sample".

    Raises:
        ValueError: something else.
    """
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    kind = "flow" if kind == "flow_prediction" else kind
    if kind not in ("flow", "v_prediction", "epsilon", "sample") or hasattr(scheduler.config, "sigma_data"):
        raise ValueError(
            f"{type(scheduler).__name__} takes the model's output for {kind}, scaled in a way of its own, so it cannot "
            "be corrected; use a scheduler of epsilon, v_prediction or flow_prediction"
        )
    return str(kind)


def noise_shares(scheduler: Any, count: int) -> list[float]:
    """Return sigma / (alpha + sigma) of the last entries of a scheduler's schedule: 1 is noise alone, 0 the picture.

    Args:
        scheduler: a diffusers scheduler whose timesteps are set.
        count: how many entries; at least 1.
    """
    levels = _noise_levels(scheduler)
    if levels is None:
        table = _training_levels(scheduler)
        times = np.asarray(scheduler.timesteps.tolist(), dtype=np.float64)
        levels = np.exp(np.interp(times, np.arange(len(table)), np.log(table)))
    # A flow's sigma is the share itself.
    shares = levels if prediction_type(scheduler) == "flow" else levels / (1 + levels)
    return [float(share) for share in shares[-count:]]


def schedule_times(scheduler: Any, count: int) -> list[float]:
    """Return t/T of the last entries of a scheduler's schedule, by their noise: 1 is the noisiest it was trained on.

    That is the timestep's own share of the training steps where it means them. Schedulers that count in something else
    (EDM's, continuous Euler, IPNDM) are asked for the noise level, which is looked up among those of the training.

    Args:
        scheduler: a diffusers scheduler whose timesteps are set.
        count: how many entries; at least 1.
    """
    whole = getattr(scheduler.config, "num_train_timesteps", _STEPS)
    shares = [float(timestep) / whole for timestep in scheduler.timesteps.tolist()]
    levels = _noise_levels(scheduler)
    # A flow's sigma is the share itself.
    if levels is None or math.isclose(levels[0], shares[0], abs_tol=1e-3):
        return shares[-count:]
    table = _training_levels(scheduler)
    times = np.interp(np.log(np.maximum(levels, 1e-10)), np.log(table), np.arange(len(table)) / len(table))
    return shares[-count:] if abs(shares[0] - times[0]) < 0.02 else times[-count:].tolist()


def _noise_levels(scheduler: Any) -> np.ndarray | None:
    """Return sigma over alpha of every entry of the schedule, or None where the scheduler does not say."""
    count = len(scheduler.timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas", ())
    if sigmas is None and len(alphas) == count + 1:
        sigmas = torch.as_tensor(scheduler.betas) / torch.as_tensor(alphas).clamp_min(1e-10)
    if sigmas is None or len(sigmas) < count:
        return None
    return torch.as_tensor(sigmas).double().cpu().numpy()[:count]


def _training_levels(scheduler: Any) -> np.ndarray:
    """Return sigma over alpha of every training step, rising."""
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        roots = torch.linspace(_BETAS[0] ** 0.5, _BETAS[1] ** 0.5, _STEPS, dtype=torch.float64)
        kept = torch.cumprod(1 - roots**2, 0)
    kept = torch.as_tensor(kept).double().clamp(1e-10, 1 - 1e-10)
    return ((1 - kept) / kept).sqrt().numpy()
