"""Velocity guidance in plain PyTorch at its best: FOCUS.

The conditional rows of the denoising step are evaluated by themselves, with gradients to the latents alone; stock fused
attention everywhere but in the layers that the loss reads. The loss is in closed form, for all samples and subjects at
once, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.pictures import ours
from bench.pictures.guidance_loop import correction_factor, read_layers, smoother, tokens_of, trainable
from bench.pictures.sampling import Drawn, Form, Setting, Text, evaluate, guided, sample, wide_dtype
from bench.pictures.stock.guidance import reading


def _divergence(maps: Tensor, weights: Tensor) -> Tensor:
    """Of sets of maps `[B,n,M]`, by the share of each in a set `[S,n]`; `[B,S]`, not over the logarithm."""
    shares = maps**3
    shares = shares / shares.sum(2, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    mean = weights @ shares
    return (weights @ (shares * (shares + 1e-10).log()) - mean * (mean + 1e-10).log()).sum(2)


def _focus(setting: Setting) -> Drawn:
    method = ours.method("FOCUS", setting)
    layers = read_layers(setting, method)
    grid, wide = layers[0].grid(setting.grid), wide_dtype(setting.latents.dtype)
    groups = [tokens_of(setting, group) for group in method.groups]
    tokens = [token for group in groups for token in group]
    like = setting.latents.new_empty(0, dtype=wide)
    smooth, ids = smoother(setting, method, grid), torch.tensor(tokens, device=setting.latents.device)
    within = like.new_tensor([[(token in group) / len(group) for token in tokens] for group in groups])
    logarithms = like.new_tensor([max(len(group), 2) for group in groups]).log()
    several = max(sum(len(group) > 1 for group in groups), 1)
    across = like.new_full((1, len(groups)), 1 / len(groups))

    def loss(maps: Tensor) -> Tensor:
        chosen = smooth(maps.index_select(1, ids))
        apart = (_divergence(chosen, within) / logarithms).sum(1) / several
        between = _divergence(within @ chosen, across)[:, 0] / like.new_tensor(len(groups)).log()
        return (apart + 1 - between) / 2

    def predict(latents: Tensor, step: int, timestep: Tensor, negative: Text, positive: Text) -> Tensor:
        if step >= setting.edited:
            return guided(setting, latents, step, timestep, negative, positive)
        with torch.enable_grad():
            leaf = latents.detach().clone().requires_grad_()
            with reading(layers, whole=True) as maps:
                with_text = evaluate(setting, leaf, timestep, positive)
            (gradient,) = torch.autograd.grad(loss(torch.stack(maps).mean(0).mT).sum(), leaf)
        without = evaluate(setting, latents, timestep, negative)
        noise = without + setting.guidance_scale * (with_text.detach() - without)
        return noise + (method.strength * correction_factor(setting, timestep) * gradient).to(noise.dtype)

    with trainable(setting.pipe.unet, False):
        return Drawn(sample(setting, predict=predict))


FORMS: dict[str, Form] = {"FOCUS": _focus}
