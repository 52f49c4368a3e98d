"""What a guidance method sees of a call, without a UNet: for tests of losses and of what they are prepared with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from attnctl_fast.attach.call import Call
from attnctl_fast.attach.prompts import Prompts, padded
from attnctl_fast.attach.segments import unet_segments
from attnctl_fast.methods import GuidanceContext, LatentGuidance
from tests.support import tiny

GRID = (4, 5)


def prompts(
    pipe: Any, texts: list[str] | None, count: int = 1, length: int = tiny.LENGTH, second: list[str] | None = None
) -> Prompts:
    """As a UNet pipeline's call reads them; `texts` None for embeddings."""
    segments = unet_segments(pipe, {"prompt": texts, "prompt_2": second}, length)
    return Prompts(segments, count if texts is None else len(texts), length)


def call(*texts: str, images: int = 1, pipe: Any = None, second: list[str] | None = None) -> Call:
    """A call with these prompts; without a pipeline only the tokenizer is there."""
    pipe = pipe or SimpleNamespace(tokenizer=tiny.tokenizer())
    return Call(pipe, prompts(pipe, list(texts), second=second), images, lambda _: torch.empty(0))


def embedded(count: int = 1, images: int = 1, pipe: Any = None) -> Call:
    """A call with prompt embeddings."""
    pipe = pipe or SimpleNamespace(tokenizer=tiny.tokenizer())
    return Call(pipe, prompts(pipe, None, count), images, lambda _: torch.empty(0))


def started(method: LatentGuidance, one: Call) -> GuidanceContext:
    """The context as an engine sets it up before the first step."""
    ids = padded(method.tokens(one.prompts) or []).repeat_interleave(one.images, 0)
    return GuidanceContext(one, ids, GRID, method.prepare(one))


def maps_for(context: GuidanceContext, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Maps `[B,n,M]`, those of a sample and a token the same whatever else the batch holds; padded ones are zero."""
    rows = []
    for sample, ids in enumerate(context.token_ids.tolist()):
        generator = torch.Generator().manual_seed(1000 * seed + sample)
        every = torch.rand(tiny.LENGTH, GRID[0] * GRID[1], generator=generator, dtype=torch.float64).pow(3)
        rows.append(torch.stack([every[i] if i >= 0 else torch.zeros_like(every[0]) for i in ids]))
    return torch.stack(rows).to(dtype)


def gradient(method: LatentGuidance, maps: torch.Tensor, context: GuidanceContext) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss `[B]`, and the gradient of its sum."""
    maps = maps.clone().requires_grad_()
    loss = method.loss(maps, context)
    (found,) = torch.autograd.grad(loss.sum(), maps)
    return loss.detach(), found


def smoothed(one: np.ndarray) -> np.ndarray:
    """A map `[M]` smoothed as the released codes do, `[height, width]`: 3x3, reflected, weights exp(-(x / 2 sigma)^2)
    with sigma 0.5."""
    image = one.reshape(GRID)
    weights = np.exp(-(np.arange(-1.0, 2.0) ** 2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    around = np.pad(image, 1, mode="reflect")
    out = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            out[y, x] = (kernel * around[y : y + 3, x : x + 3]).sum()
    return out
