"""Draws whose denoising steps are timed one by one, without encoding and decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl_fast.attach.patching import Patch
from bench.pictures.sampling import Drawn, Form, Setting


class Timed(NamedTuple):
    """steps: seconds of each. once: seconds of the call beside its steps. latents: what was to be decoded. losses: of
    `Drawn`. megabytes: allocated at most on a GPU, else None."""

    steps: list[float]
    once: float
    latents: Tensor
    losses: list[Tensor] | None
    megabytes: float | None


class Stopwatch:
    """Times what is drawn with a pipeline's scheduler, within `running`."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self._pipe, self._gpu = pipe, device.type == "cuda"
        self._marks: list[Any] = []
        self._latents: Tensor
        self._texts: dict[Any, Any] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, the pipeline times its steps, encodes a text once for all draws, and decodes nothing."""
        pipe = self._pipe
        with ExitStack() as stack:

            def patch(owner: Any, name: str, function: Callable[..., Any]) -> None:
                stack.callback(Patch(owner, name, function).undo)

            patch(pipe.scheduler, "set_timesteps", self._begin)
            patch(pipe.scheduler, "step", self._step)
            patch(pipe.vae, "decode", self._decode)
            patch(pipe, "encode_prompt", self._encode)
            yield

    def draw(self, form: Form, setting: Setting) -> Timed:
        """Draw and time; within `running` only."""
        self._marks = []
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        start = self._now()
        drawn: Drawn = form(setting)
        whole = self._now() - start
        pairs = zip(self._marks, self._marks[1:], strict=False)
        steps = [1e-3 * a.elapsed_time(b) if self._gpu else b - a for a, b in pairs]
        peak = 1e-6 * torch.cuda.max_memory_allocated() if self._gpu else None
        return Timed(steps, whole - sum(steps), self._latents, drawn.losses, peak)

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _mark(self) -> None:
        """On a GPU by an event, so that the host need not wait for the step's end."""
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append(event if self._gpu else time.perf_counter())

    def _begin(self, patch: Patch, *args: Any, **kwargs: Any) -> None:
        patch.inner(*args, **kwargs)
        scheduler = self._pipe.scheduler
        if len(scheduler.timesteps) == 1:
            # Of one step, DDIM's is the last, where hardly any noise is left and some methods do nothing.
            scheduler.timesteps = torch.full_like(scheduler.timesteps, scheduler.config.num_train_timesteps // 2)
        self._mark()

    def _step(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        result = patch.inner(*args, **kwargs)
        self._mark()
        return result

    def _decode(self, patch: Patch, latents: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._latents = latents.float().cpu()
        return (latents[:, :3],)

    def _encode(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        key = _value((args, *sorted(kwargs.items())))
        if key not in self._texts:
            self._texts[key] = patch.inner(*args, **kwargs)
        return self._texts[key]


def _value(x: Any) -> Any:
    """Arguments in hashable form."""
    return tuple(map(_value, x)) if isinstance(x, (tuple, list)) else x
