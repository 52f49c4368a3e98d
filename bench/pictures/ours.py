"""Our methods on the task of `sampling`, with the steps of the released codes, and the costs that papers report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import attnctl_fast as ac
from attnctl_fast import ops
from attnctl_fast._numbers import step_count
from bench.pictures.sampling import EDIT, NOUNS, PAIRS, PHRASES, PROMPT, Drawn, Setting, call

SOURCE = "arXiv 2403.06381, Table 1: SD 2, 512x512, 50 steps, A4000"
# Percent of extra time over plain sampling that papers report. The other methods' papers are silent or could not be
# read.
PUBLISHED = {
    "AttentionRegulation": 48.8,
    "DenseDiffusion": 79.3,
    "ComposableDiffusion": 119.5,
    "SynGen": 378.0,
    "AttendAndExcite": 414.6,
}


def _guidance(setting: Setting) -> dict[str, Any]:
    """Without refinement: how often it moves the latents depends on the weights."""
    return {"steps": setting.edited, "layers": setting.layers}


def _masks(setting: Setting) -> Any:
    """One phrase on the left, the other on the right."""
    height, width = setting.pixels
    right = (torch.arange(width) >= width // 2).float().expand(height, -1)
    return dict(zip(PHRASES, (1 - right, right), strict=True))


# By method, the most important first.
_MAKE: dict[str, Callable[[Setting], Any]] = {
    "AttentionRegulation": lambda x: ac.AttentionRegulation(list(NOUNS), edit_steps=x.edited),
    "EnergyContext": lambda x: ac.EnergyContext.official(),
    "Composition": lambda x: ac.Composition([ac.Edit(EDIT, 0.5)]),
    "NAG": lambda x: ac.NAG(EDIT),
    "AttendAndExcite": lambda x: ac.AttendAndExcite(list(NOUNS), thresholds={}, **_guidance(x)),
    "DenseDiffusion": lambda x: ac.DenseDiffusion(_masks(x), edit_steps=x.edited),
    "ComposableDiffusion": lambda x: ac.ComposableDiffusion([PROMPT, *PHRASES], [1.0, 0.5, 0.5]),
    "SynGen": lambda x: ac.SynGen(PAIRS, **_guidance(x)),
    "TSAM": lambda x: ac.TSAM(refinement={}, **_guidance(x)),
    "CONFORM": lambda x: ac.CONFORM(PAIRS, refinement={}, **_guidance(x)),
    "FOCUS": lambda x: ac.FOCUS(PAIRS, **_guidance(x)),
}
METHODS = tuple(_MAKE)


def method(name: str, setting: Setting) -> Any:
    """One of `METHODS` for this task."""
    return _MAKE[name](setting)


def edited_steps(name: str, steps: int) -> int:
    """In how many of so many steps a method is at work by default."""
    kind: Any = getattr(ac, name)
    share = kind.edit_steps if hasattr(kind, "edit_steps") else getattr(kind, "steps", 1.0)
    return step_count(share, steps)


def draw(name: str, setting: Setting) -> Drawn:
    with ac.control(setting.pipe, method(name, setting)):
        return Drawn(call(setting))


@contextmanager
def regulation_losses() -> Iterator[list[torch.Tensor]]:
    """The losses of every descent of attention regulation within the block, `[steps,B,H]`."""
    found: list[torch.Tensor] = []
    regulate: Any = ops.regulate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = regulate(*args, **kwargs)
        found.append(result.losses)
        return result

    ops.regulate = recorded
    try:
        yield found
    finally:
        ops.regulate = regulate
