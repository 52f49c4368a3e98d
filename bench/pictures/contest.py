"""Forms of methods against plain sampling: whether they draw the same picture, and what they add to a step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.timing import first_line
from bench.pictures import diffusers_forms, ours, published, stock
from bench.pictures.sampling import Drawn, Form, Setting, call
from bench.pictures.still import Still
from bench.pictures.stopwatch import Stopwatch, Timed

RIVALS: dict[str, Mapping[str, Form]] = {
    "published": published.FORMS,
    "diffusers": diffusers_forms.FORMS,
    "stock": stock.FORMS,
}
PLAIN = "plain"
# Of the pictures whose cost is told.
STEPS = 50
# A result may be as far from ours as this share of what the method changes, or as roundings may take it, of the largest
# latent. A descent's losses are compared instead where it is chaotic.
SAME, SAME_LOSS_PERCENT = 0.02, 1.0
ROUNDINGS = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
LEAST, MOST = 2, 60
# A draw is of as many steps as fill so many seconds.
DRAW_SECONDS, MOST_STEPS = 1.0, 10
# The first round is a warm-up, unless it took so long that it need not be one.
LONG = 10.0
# As released, these are not compiled: they put Python in front of every layer.
NEVER_COMPILED = ("published", "diffusers")
# One UNet is compiled for the processors, batch sizes and weights of every form; an arm that exceeds this fails.
RECOMPILATIONS: dict[str, Any] = {
    "recompile_limit": 256,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
}


class Added(NamedTuple):
    """Seconds that a form adds: to a step in which its method is at work, to one in which it rests, and to the call
    beside its steps."""

    edited: float
    resting: float
    once: float


@dataclass(eq=False)
class Arm:
    """One form of one method, what was found when it was checked, and what it added, round by round.

    steps: how many edited ones it draws next. touched: names of the attention layers that it touches; None where whole
    evaluations are timed. extra_mb: beyond plain sampling's, on a GPU.
    """

    method: str
    form: str
    draw: Form
    steps: int = 1
    touched: frozenset[str] | None = None
    difference: dict[str, float | None] | None = None
    failed: str | None = None
    added: list[Added] = field(default_factory=list)
    extra_mb: float | None = None


def plain_arm() -> Arm:
    return Arm(PLAIN, PLAIN, lambda setting: Drawn(call(setting)))


def arms(setting: Setting, methods: Sequence[str], forms: Sequence[str]) -> list[list[Arm]]:
    """By method, every form that there is.

    Raises:
        ValueError: there is none.
    """
    left_out = ("diffusers",) if diffusers_forms.objection(setting) else ()
    found = []
    for method in methods:
        draws = {form: RIVALS[form].get(method) if form in RIVALS else partial(ours.draw, method) for form in forms}
        found.append([Arm(method, x, draw) for x, draw in draws.items() if draw is not None and x not in left_out])
    if not any(found):
        raise ValueError(f"there is no form {' or '.join(forms)} of {' or '.join(methods)} here; name others")
    return found


class Contest:
    """What arms are checked and timed with, within `running`.

    still: nothing computes but what a form touches; else every evaluation is whole. plain: seconds of whole steps of
    plain sampling.
    """

    def __init__(self, setting: Setting, *, still: bool) -> None:
        self.setting = setting
        self.plain: list[float] = []
        self._compiled = setting.pipe.unet._compiled_call_impl is not None
        self._still = Still(setting.pipe) if still else None
        self._watch = Stopwatch(setting.pipe, setting.latents.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        limits = torch._dynamo.config.patch(RECOMPILATIONS) if self._compiled else nullcontext()
        with self._watch.running(), limits:
            yield

    def time_plain(self) -> None:
        arm = plain_arm()
        if self._still is None:
            self._timed(arm)
        else:
            self._still.record(replace(self.setting, steps=1))
        for _ in range(3):
            self.plain += self._timed(arm).steps

    def check(self, group: Sequence[Arm], setting: Setting) -> None:
        """Have every form of a method draw one step of the same picture; one that draws another picture fails."""
        setting = replace(setting, steps=1, edited=1)
        plain = self._watch.draw(plain_arm().draw, setting)
        own = next((arm for arm in group if arm.form == "ours"), None)
        own = own or Arm(group[0].method, "ours", partial(ours.draw, group[0].method))
        reference = self._checked(own, setting)
        for arm in group:
            drawn = None if arm is own else self._checked(arm, setting)
            if reference is None:
                arm.failed = arm.failed or f"has nothing to be compared with, as ours failed: {own.failed}"
            elif drawn is not None:
                arm.difference = difference(drawn, reference, plain)
                if not same(arm.difference, reference.latents, setting.latents.dtype):
                    arm.failed = "draws another picture: " + ", ".join(f"{k} {v}" for k, v in arm.difference.items())

    def _checked(self, arm: Arm, setting: Setting) -> Timed | None:
        drawn: list[Timed] = []

        def draw() -> None:
            drawn.append(self._draw(arm, setting))

        try:
            # What looks for our losses would be compiled too.
            own = (arm.method, arm.form) == ("AttentionRegulation", "ours")
            with uncompiled(setting) if own else nullcontext(), ours.regulation_losses() as losses:
                if self._still is None:
                    draw()
                else:
                    arm.touched = self._still.touched(draw, 2 * setting.batch)
        except Exception as error:
            arm.failed = first_line(error)
            return None
        return drawn[0]._replace(losses=losses) if own else drawn[0]

    def race(self, group: Sequence[Arm], until: float) -> None:
        """Time forms that touch the same, plain sampling beside them, in turns: `LEAST` rounds, and more until that
        `time.monotonic()`. What fails does not compete any more."""
        touched = group[0].touched
        with nullcontext() if self._still is None or touched is None else self._still.around(touched):
            took = self._round(group, 0)
            if took < LONG or self._compiled:
                # That was a warm-up, and said how many steps make a draw; compiled code needs another.
                for _ in range(self._compiled):
                    self._round(group, 0)
                for arm in group:
                    arm.added.clear()
            for index in range(1, MOST):
                alive = [arm for arm in group if arm.failed is None]
                if not alive or (len(alive[0].added) >= LEAST and time.monotonic() + took > until):
                    break
                took = self._round(group, index)

    def _round(self, group: Sequence[Arm], index: int) -> float:
        """Draw once by each, in the order of the round before reversed; returns the seconds that it took."""
        start, drawn = time.monotonic(), {}
        plain = plain_arm()
        plain.steps = max(arm.steps for arm in group)
        for arm in [plain, *group][:: -1 if index % 2 else 1]:
            if arm.failed is None:
                try:
                    drawn[arm.form] = self._timed(arm)
                except Exception as error:
                    arm.failed = first_line(error)
        if plain.failed is not None:
            raise RuntimeError(f"plain sampling failed: {plain.failed}")
        base = drawn[PLAIN]
        step = statistics.fmean(base.steps)
        for arm in group:
            if arm.failed is None:
                one = drawn[arm.form]
                edited, resting = one.steps[: arm.steps], one.steps[arm.steps :]
                rest = statistics.fmean(resting) - step if resting else 0.0
                arm.added.append(Added(statistics.fmean(edited) - step, rest, one.once - base.once))
                if one.megabytes is not None and base.megabytes is not None:
                    arm.extra_mb = one.megabytes - base.megabytes
                arm.steps = min(max(int(DRAW_SECONDS / max(edited)), 2 if self._compiled else 1), MOST_STEPS)
        return time.monotonic() - start

    def _timed(self, arm: Arm) -> Timed:
        """Draw steps in which the method is at work, and as many in which it rests if it does so in whole pictures."""
        rests = arm.form != PLAIN and ours.edited_steps(arm.method, STEPS) < STEPS
        return self._draw(arm, replace(self.setting, steps=arm.steps * (1 + rests), edited=arm.steps))

    def _draw(self, arm: Arm, setting: Setting) -> Timed:
        with uncompiled(setting) if arm.form in NEVER_COMPILED else nullcontext():
            return self._watch.draw(arm.draw, setting)


@contextmanager
def uncompiled(setting: Setting) -> Iterator[None]:
    """Have a compiled UNet run uncompiled within the block."""
    unet = setting.pipe.unet
    compiled = unet._compiled_call_impl
    unet._compiled_call_impl = None
    try:
        yield
    finally:
        unet._compiled_call_impl = compiled


def difference(one: Timed, own: Timed, plain: Timed) -> dict[str, float | None]:
    """How far a form's result is from ours: the largest difference of a latent, None where it is not finite, and that
    of ours from plain sampling's; or, where pictures of correct forms may differ, that of the losses in percent."""
    if one.losses is not None or own.losses is not None:
        pairs = [(_loss(x), _loss(y)) for x, y in zip(one.losses or (), own.losses or (), strict=False)]
        return {"loss_percent": max((100 * abs(x - y) / max(abs(y), 1e-12) for x, y in pairs), default=None)}
    return {"latent": _off(one.latents, own.latents), "effect": _off(own.latents, plain.latents)}


def _loss(losses: Tensor) -> float:
    """The lowest of a descent, mean over heads and samples."""
    return float(losses.mean(2).amin(0).mean())


def _off(latents: Tensor, others: Tensor) -> float | None:
    largest = float((latents - others).abs().max())
    return largest if math.isfinite(largest) else None


def same(off: Mapping[str, float | None], latents: Tensor, dtype: torch.dtype) -> bool:
    """Whether a difference is that of another order of operations."""
    if "loss_percent" in off:
        return off["loss_percent"] is not None and off["loss_percent"] <= SAME_LOSS_PERCENT
    if off["latent"] is None or off["effect"] is None:
        return False
    return off["latent"] <= max(SAME * off["effect"], ROUNDINGS[dtype] * float(latents.abs().max()))
