"""What DenseDiffusion's phrases and masks say of a task's tokens, for the forms that do not use ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.pictures.sampling import Setting, Text, encode


class Regions(NamedTuple):
    """masks `[R,height,width]` of zeros and ones at the latents' size, positions of the phrases' tokens, and the
    phrases."""

    masks: Tensor
    positions: list[list[int]]
    phrases: list[str]

    @classmethod
    def of(cls, method: Any, setting: Setting) -> Regions:
        (row,) = method.masks
        phrases = [phrase for targets, _ in row for phrase in targets]
        masks = torch.stack([mask.tensor() for _, mask in row])
        resized = F.interpolate(masks[:, None], size=setting.grid)[:, 0].to(setting.latents.device)
        return cls(resized, [setting.positions(phrase) for phrase in phrases], phrases)

    def at(self, grid: tuple[int, int]) -> Tensor:
        """`[R,M]`, each mask at a layer's grid."""
        return F.interpolate(self.masks[:, None], size=grid).flatten(1)

    def rewritten(self, setting: Setting, text: Text) -> Text:
        """The prompt's context with the phrases' tokens as they are encoded by themselves."""
        context = text.context.clone()
        for phrase, places in zip(self.phrases, self.positions, strict=True):
            context[:, places] = encode(setting, phrase).context[:, 1 : 1 + len(places)]
        return Text(context, text.added)
