"""What a pipeline hands to its scheduler, seen and changed in the middle of a call."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

_NEEDED = ("scale_model_input", "step")


def check_scheduler(pipe: Any) -> None:
    """Raise ValueError unless latent guidance can follow the pipeline's scheduler."""
    scheduler = getattr(pipe, "scheduler", None)
    missing = [name for name in _NEEDED if not hasattr(scheduler, name)]
    if missing:
        raise ValueError(
            f"the scheduler of {type(pipe).__name__}, {type(scheduler).__name__}, has no {' and no '.join(missing)}, "
            "which latent guidance needs; use a diffusers scheduler such as DDIMScheduler"
        )


class SchedulerTap:
    """Wraps a scheduler for the length of a pipeline call: notes the latents before they are scaled, and has the step
    start from others.

    latents: what `scale_model_input` was last given; None before. fresh: it was called since the UNet last ran. guided:
    what the next `step` starts from, once.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.latents: Tensor | None = None
        self.fresh = False
        self.guided: Tensor | None = None
        self._removed = False
        self._before = {name: scheduler.__dict__[name] for name in _NEEDED if name in scheduler.__dict__}
        self._scale, step = scheduler.scale_model_input, scheduler.step

        @functools.wraps(self._scale)
        def scale_model_input(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.latents, self.guided, self.fresh = sample, None, True
            return self._scale(sample, *args, **kwargs)

        @functools.wraps(step)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if self.guided is not None:
                if "sample" in kwargs:
                    kwargs["sample"] = self.guided.to(kwargs["sample"].dtype)
                else:
                    args = (*args[:2], self.guided.to(args[2].dtype), *args[3:])
                self.guided = None
            return step(*args, **kwargs)

        self._ours: dict[str, Any] = {"scale_model_input": scale_model_input, "step": stepped}
        for wrapper in self._ours.values():
            wrapper._attnctl_tap = self
        scheduler.__dict__.update(self._ours)

    def scaled(self, latents: Tensor, timestep: Any) -> Tensor:
        """The model's input for these latents."""
        return self._scale(latents, timestep)

    def remove(self) -> None:
        """Take the wrappers off; one that something else has wrapped meanwhile stays, and does nothing."""
        self._removed, self.latents, self.guided = True, None, None
        for name, method in self._ours.items():
            if self.scheduler.__dict__.get(name) is method:
                del self.scheduler.__dict__[name]
                before = self._left(name)
                if before is not None:
                    self.scheduler.__dict__[name] = before

    def _left(self, name: str) -> Any:
        """What stood in the place of our wrapper, past the wrappers of taps that were removed since."""
        before = self._before.get(name)
        tap = getattr(before, "_attnctl_tap", None)
        return tap._left(name) if tap is not None and tap._removed else before
