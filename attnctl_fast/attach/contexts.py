"""Contexts that layers move on, each for the next one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Site


class Cascade:
    """A context that layers move on, `[.., N, C]`.

    It is changed in place where nothing is differentiated, so that a compiled model keeps its memory; else it becomes a
    new tensor.
    """

    def __init__(self, like: Tensor) -> None:
        # At the precision of the context a small step would be rounded away.
        wide = torch.promote_types(like.dtype, torch.float32)
        self._buffer = torch.empty(like.shape, dtype=wide, device=like.device)
        self._value = self._buffer

    def reset(self, source: Tensor) -> None:
        if torch.is_grad_enabled():
            self._value = source.to(self._buffer.dtype)
        else:
            self._buffer.copy_(source)

    def read(self) -> Tensor:
        return self._value if torch.is_grad_enabled() else self._buffer

    def add(self, increment: Tensor) -> None:
        if torch.is_grad_enabled():
            self._value = self._value + increment
        else:
            self._buffer.add_(increment)


def moving_mask(call: Call) -> Tensor | None:
    """Return which places of the image move contexts, `[samples,1,height,width]`: the mask of the call.

    Raises:
        ValueError: it has not the proportions of the picture.
    """
    if call.mask is not None:
        height, width = call.mask.shape[2:]
        if height * call.latents[1] != width * call.latents[0]:
            raise ValueError(
                f"mask is {height}x{width}, which has not the proportions of the picture (latents "
                f"{call.latents[0]}x{call.latents[1]}); draw it at the picture's size"
            )
    return call.mask


def at_site(mask: Tensor | None, site: Site, like: Tensor) -> Tensor | None:
    """Return the mask at a layer's grid, `[samples,M]`, at least float32, or None for the whole image.

    It is the same in every frame of a video.
    """
    if mask is None:
        return None
    wide = torch.promote_types(like.dtype, torch.float32)
    own = F.interpolate(mask.float(), size=site.grid).flatten(1).to(like.device, wide)
    return own.repeat(1, math.prod(site.frames))
