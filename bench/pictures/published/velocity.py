"""Velocity guidance as its authors' code runs it: FOCUS.

Written from the paper's equations with the structure of operations of the released code for SD 3 (ericbill21/FOCUS): a
whole evaluation of the conditional rows more, with weights that require gradients, in which the layers that the loss
reads compute full maps beside their fused attention; the loss goes through samples and subjects in Python. The sign is
the one that descends the loss. On a UNet the correction is what a velocity's is to the model's prediction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.pictures import ours
from bench.pictures.attention_layers import heads_to_channels, keys_values, queries, replaced
from bench.pictures.guidance_loop import correction_factor, kernel, read_layers, smoothed, tokens_of, trainable
from bench.pictures.sampling import Drawn, Form, Setting, Text, evaluate, guided, sample, wide_dtype


class _Processor:
    """Fused attention, and full maps beside it where somebody collects them."""

    collected: list[Tensor] | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, (k, v) = queries(attn, hidden_states), keys_values(attn, encoder_hidden_states)
        if self.collected is not None:
            scores = q @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])
            self.collected.append(torch.softmax(scores, dim=-1).mean(dim=1).transpose(-1, -2))
        return attn.to_out[1](attn.to_out[0](heads_to_channels(F.scaled_dot_product_attention(q, k, v))))


def _divergence(maps: Tensor) -> Tensor:
    """Of the maps `[T,M]` of some tokens or subjects."""
    shares = maps**3
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    mean = shares.mean(dim=0, keepdim=True)
    return (shares * ((shares + 1e-10).log() - (mean + 1e-10).log())).sum(dim=-1).mean() / math.log(len(maps))


def _loss(maps: Tensor, groups: list[list[int]]) -> Tensor:
    """Of one sample's maps `[N,M]`."""
    within, subjects = maps.new_zeros(()), []
    for group in groups:
        own = maps[group]
        if len(group) > 1:
            within = within + _divergence(own)
        subjects.append(own.mean(dim=0))
    within = within / max(sum(len(group) > 1 for group in groups), 1)
    return (within + 1 - _divergence(torch.stack(subjects))) / 2


def _focus(setting: Setting) -> Drawn:
    method, unet = ours.method("FOCUS", setting), setting.pipe.unet
    layers = read_layers(setting, method)
    grid = layers[0].grid(setting.grid)
    groups = [tokens_of(setting, group) for group in method.groups]
    weights = kernel(method, grid, setting.latents.new_empty(0, dtype=wide_dtype(setting.latents.dtype)))

    def predict(latents: Tensor, step: int, timestep: Tensor, negative: Text, positive: Text) -> Tensor:
        if step >= setting.edited:
            return guided(setting, latents, step, timestep, negative, positive)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            leaf = latents.detach().clone().requires_grad_()
            _Processor.collected = []
            try:
                evaluate(setting, leaf, timestep, positive)
                maps = torch.stack(_Processor.collected).to(wide_dtype(latents.dtype)).mean(dim=0)
            finally:
                _Processor.collected = None
            costs = [_loss(smoothed(one.unflatten(1, grid), weights).flatten(1), groups) for one in maps]
            unet.zero_grad()
            torch.stack(costs).sum().backward()
        assert leaf.grad is not None
        noise = guided(setting, latents, step, timestep, negative, positive)
        return noise + method.strength * correction_factor(setting, timestep) * leaf.grad

    read = {layer.name: layer for layer in layers}
    try:
        with replaced(read, {name: _Processor() for name in read}), trainable(unet, True):
            return Drawn(sample(setting, predict=predict))
    finally:
        unet.zero_grad()


FORMS: dict[str, Form] = {"FOCUS": _focus}
