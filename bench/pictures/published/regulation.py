"""Attention regulation as its released code does it (arXiv 2403.06381), written from the equations.

What is kept of that code's structure: hooks that run the edited layers a second time and throw the first output away;
the logits of both halves in memory, and a softmax of them for the columns to be put back; Gaussians made anew on the
host for every layer and step; a full zero tensor that the bias is written into in every step of the descent, autograd
with anomaly detection through the softmax of all columns, and a comparison of losses on the host; the biases of the
last step kept on the CPU, first in, first out. What is not: the cast to float16 on other pipelines, and one best step
for the whole batch, where ours are chosen sample by sample.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast.attach.layers import Layer, last_down_first_up
from attnctl_fast.methods.attention_regulation import initial_theta
from attnctl_fast.ops._objective import DEFAULT_MASS_WEIGHT, DEFAULT_PENALTY
from attnctl_fast.ops.gaussian_bias import basis_axes
from bench.pictures import ours
from bench.pictures.attention_layers import flat_heads, flat_logits, flat_output, layers_of, wide
from bench.pictures.guidance_loop import tokens_of
from bench.pictures.sampling import NOUNS, Drawn, Setting, Text, sample


class _Regulation:
    """The descents of one drawing; `losses`: the lowest one of each, as it runs."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.method = setting, ours.method("AttentionRegulation", setting)
        self.target_ids = tokens_of(setting, NOUNS)
        self.step = 0
        self.averages: list[Tensor] = []
        self.losses: list[Tensor] = []
        self._hooks: list[Any] = []

    def hook(self) -> None:
        layers = layers_of(self.setting.pipe, cross=True)
        for name in last_down_first_up(layers):
            again = partial(self._attend, layers[name])
            self._hooks.append(layers[name].module.register_forward_hook(again, with_kwargs=True))

    def unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def before(self, latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        self.step = step
        # The released code's callback takes them off one step late.
        if step > self.method.edit_steps:
            self.unhook()
        return latents

    def _attend(self, layer: Layer, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        q, k, v = flat_heads(attn, args[0], kwargs["encoder_hidden_states"])
        logits = flat_logits(attn, q, k)
        plain, end = logits.softmax(-1), self.setting.end()
        first, last = plain[..., 0], plain[..., end]
        del plain
        if self.step < self.method.edit_steps:
            half = len(logits) // 2
            logits[half:] = self._edited(layer, attn.heads, logits[half:]).to(logits.dtype)
        probabilities = logits.softmax(-1)
        probabilities[..., 0], probabilities[..., end] = first, last
        return flat_output(attn, probabilities, v) / attn.rescale_output_factor

    def _edited(self, layer: Layer, heads: int, given: Tensor) -> Tensor:
        """The logits `[B*H,M,N]` with the bias of the best step added to the targets' columns."""
        method, batch = self.method, self.setting.batch
        height, width = layer.grid(self.setting.grid)
        logits = wide(given).view(-1, height, width, given.shape[-1])
        ids = torch.tensor(self.target_ids, device=logits.device)
        axis_y, axis_x, sigma_y, sigma_x = basis_axes((height, width), method.sigma, method.convention)
        y = torch.arange(height, dtype=logits.dtype)[:, None]
        x = torch.arange(width, dtype=logits.dtype)
        maps = [
            torch.exp(-((y - i) ** 2) / (2 * sigma_y**2) - (x - j) ** 2 / (2 * sigma_x**2))[None]
            for i in axis_y
            for j in axis_x
        ]
        gaussians = torch.cat(maps).to(logits.device)[None, ..., None].requires_grad_()
        theta = initial_theta(method.seed, layer.name, self.step, heads, len(ids), (len(axis_y), len(axis_x)))
        theta = theta.to(logits).flatten(2).mT.repeat(batch, 1, 1)
        with torch.enable_grad(), torch.autograd.set_detect_anomaly(True):
            weights = theta.requires_grad_()[:, :, None, None]
            before = self.averages.pop(0).to(logits.device) if self.step else (gaussians * weights).sum(1).detach()
            bias = torch.zeros_like(logits)
            best, lowest = [bias.detach()] * batch, [float("inf")] * batch
            for _ in range(method.steps):
                bias[..., ids] = (gaussians * weights).sum(1)
                losses = self._losses((logits + bias).softmax(-1)[..., ids], weights)
                for index, loss in enumerate(losses.detach()):
                    if loss < lowest[index]:
                        lowest[index] = float(loss)
                        best[index] = bias.detach().unflatten(0, (batch, heads))[index].clone()
                (gradient,) = torch.autograd.grad(losses.mean(), weights)
                weights = weights - len(logits) * method.step_size * gradient
        self.losses.append(torch.tensor(lowest).view(1, -1, 1))
        kept = torch.cat(best)
        self.averages.append(kept[..., ids].cpu())
        kept[..., ids] = before * method.ema + kept[..., ids] * (1 - method.ema)
        return (logits + method.strength * method.decay**self.step * kept).flatten(1, 2)

    def _losses(self, maps: Tensor, weights: Tensor) -> Tensor:
        """Of every sample `[B]`: maps `[B*H,height,width,T]`, weights `[B*H,r,1,1,T]`."""
        method, targets = self.method, maps.shape[-1]
        share = min(1.0, 0.2 * targets) / targets if method.mass is None else method.mass
        high = (torch.quantile(maps.flatten(1, 2), method.quantile, dim=1) - method.level) ** 2
        mass = (maps.mean((1, 2)) - share) ** 2
        mass_weight = DEFAULT_MASS_WEIGHT if method.mass_weight is None else method.mass_weight
        penalty = DEFAULT_PENALTY["official"] if method.penalty is None else method.penalty
        by_head = high.mean(1) + mass_weight * mass.mean(1) + penalty * (weights**2).mean((1, 2, 3, 4))
        return by_head.view(self.setting.batch, -1).mean(1)


def attention_regulation(setting: Setting) -> Drawn:
    """See the top of this file."""
    regulation = _Regulation(setting)
    regulation.hook()
    try:
        images = sample(setting, before=regulation.before)
    finally:
        regulation.unhook()
    return Drawn(images, regulation.losses)
