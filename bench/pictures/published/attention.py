"""The methods that edit attention, and conjunction, as their released codes do them: eager, and one after the other.

Every form is written from the equations, with the operations of the released code: what that is stands in each
docstring and at the top of the files of the first three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl_fast.attach.layers import Layer
from bench.pictures import ours
from bench.pictures.attention_layers import flat_heads, flat_logits, flat_output, layers_of, replaced
from bench.pictures.published.energy import composition, energy_context
from bench.pictures.published.nag import nag
from bench.pictures.published.regulation import attention_regulation
from bench.pictures.regions import Dense
from bench.pictures.sampling import Drawn, Form, Setting, Text, encode, evaluate, nothing, sample


class _Dense:
    """A layer of DenseDiffusion's: full logits of all rows at every step; masks, extremes and both pulls as tensors of
    their size while it edits."""

    def __init__(self, layer: Layer, plan: _DensePlan) -> None:
        self.layer, self.plan = layer, plan

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        plan, own = self.plan, encoder_hidden_states is None
        context = hidden_states if own else plan.text
        q, k, v = flat_heads(attn, hidden_states, context)
        if plan.active:
            logits = flat_logits(attn, q, k)
            half, grid = len(logits) // 2, self.layer.grid(plan.setting.grid)
            low = logits[half:].min(-1)[0].unsqueeze(-1)
            high = logits[half:].max(-1)[0].unsqueeze(-1)
            shared = (plan.own if own else plan.cross)[grid].repeat(attn.heads, 1, 1)
            size = plan.sizes[grid].repeat(attn.heads, 1, 1)
            weight = plan.method.strength(self.layer) * plan.time**plan.method.decay
            logits[half:] += (shared > 0) * size * weight * (high - logits[half:])
            logits[half:] -= ~(shared > 0) * size * weight * (logits[half:] - low)
            probabilities = logits.softmax(-1).to(q.dtype)
        else:
            probabilities = attn.get_attention_scores(q, k)
        return flat_output(attn, probabilities, v) / attn.rescale_output_factor


class _DensePlan(Dense):
    """own, cross, sizes by a layer's grid: which keys of self- and of cross-attention share a mask with an image token,
    `[B,M,M]` and `[B,M,N]`, and 1 - area * S `[B,M,1]`. text: the context of both halves."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.layers, batch = layers_of(setting.pipe), setting.batch
        self.text = torch.cat([text.context for text in self.texts])
        self.own: dict[tuple[int, int], Tensor] = {}
        self.cross: dict[tuple[int, int], Tensor] = {}
        self.sizes: dict[tuple[int, int], Tensor] = {}
        for grid in {layer.grid(setting.grid) for layer in self.layers.values()}:
            masks = self.at(grid)
            own = (masks[:, None] * masks[:, :, None]).sum(0)
            self.own[grid] = own.repeat(batch, 1, 1)
            self.sizes[grid] = (1 - self.method.area * own.sum(-1, keepdim=True) / len(own)).repeat(batch, 1, 1)
            cross = masks.new_zeros(masks.shape[1], self.text.shape[1])
            for mask, places in zip(masks, self.positions, strict=True):
                cross[:, places] = mask[:, None]
            self.cross[grid] = cross.repeat(batch, 1, 1)


def dense_diffusion(setting: Setting) -> Drawn:
    """DenseDiffusion (arXiv 2308.12964): all attention of the UNet, the image's own too, with its maps in memory, at
    every step; the context is the method's own, whatever the UNet hands to the layers."""
    plan = _DensePlan(setting)
    processors = {name: _Dense(layer, plan) for name, layer in plan.layers.items()}
    with replaced(plan.layers, processors):
        return Drawn(sample(setting, before=plan.before, texts=plan.texts))


def composable_diffusion(setting: Setting) -> Drawn:
    """Composable Diffusion (arXiv 2206.01714): one evaluation of the UNet per prompt, and one without."""
    method = ours.method("ComposableDiffusion", setting)
    with torch.no_grad():
        without, texts = nothing(setting), [encode(setting, prompt) for prompt in method.prompts]
    weights = setting.latents.new_tensor(method.weights).view(-1, 1, 1, 1, 1) * setting.guidance_scale

    def predict(latents: Tensor, step: int, timestep: Tensor, negative: Text, positive: Text) -> Tensor:
        found = torch.stack([evaluate(setting, latents, timestep, text) for text in [negative, *texts]])
        return found[0] + (weights * (found[1:] - found[:1])).sum(0)

    return Drawn(sample(setting, predict=predict, texts=(without, texts[0])))


FORMS: dict[str, Form] = {
    "AttentionRegulation": attention_regulation,
    "EnergyContext": energy_context,
    "Composition": composition,
    "DenseDiffusion": dense_diffusion,
    "ComposableDiffusion": composable_diffusion,
    "NAG": nag,
}
