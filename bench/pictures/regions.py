"""What a task is to DenseDiffusion, for the forms that do not use ours: its masks, its words, and when it edits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast._numbers import step_count
from bench.pictures import ours
from bench.pictures.sampling import PROMPT, Setting, Text, encode, nothing, wide_dtype


class Dense:
    """method: ours. masks: `[R,height,width]` of zeros and ones at the latents' size. positions: of the phrases'
    tokens. texts: negative and positive, in which the phrases' tokens are as they are encoded by themselves. active,
    time: of this step; t/T as a tensor."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.method = setting, ours.method("DenseDiffusion", setting)
        (row,) = self.method.masks
        masks = torch.stack([mask.tensor() for _, mask in row])
        self.masks = F.interpolate(masks[:, None], size=setting.grid)[:, 0].to(setting.latents.device)
        phrases = [phrase for targets, _ in row for phrase in targets]
        self.positions = [setting.positions(phrase) for phrase in phrases]
        with torch.no_grad():
            positive = encode(setting, PROMPT)
            context = positive.context.clone()
            for phrase, places in zip(phrases, self.positions, strict=True):
                context[:, places] = encode(setting, phrase).context[:, 1 : 1 + len(places)]
            self.texts = nothing(setting), Text(context, positive.added)
        self.active = False
        self.time = setting.latents.new_zeros((), dtype=wide_dtype(setting.latents.dtype))

    def at(self, grid: tuple[int, int]) -> Tensor:
        """`[R,M]`, each mask at a layer's grid."""
        return F.interpolate(self.masks[:, None], size=grid).flatten(1)

    def before(self, latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        self.active = step < step_count(self.method.edit_steps, self.setting.steps)
        self.time = timestep / self.setting.pipe.scheduler.config.num_train_timesteps
        return latents
