"""Attention regulation at its best in stock PyTorch: sufficient statistics and the closed forms of its gradient.

The logits `[B,H,M,N]` of the edited layers are small (N = 77), so that one softmax of them serves attention and
statistics, instead of a second pass by `scaled_dot_product_attention`. The descent is `rivals.statistics_loop`,
compiled on a GPU. Nothing waits for the device: the initial weights of all steps go there before the first one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast.attach.layers import Layer, last_down_first_up
from attnctl_fast.methods.attention_regulation import initial_theta
from attnctl_fast.ops._objective import DEFAULT_MASS_WEIGHT, DEFAULT_PENALTY
from attnctl_fast.ops.gaussian_bias import axis_basis, basis_axes
from bench.ops import rivals
from bench.pictures import ours
from bench.pictures.attention_layers import finished, keys_values, layers_of, queries, replaced, wide
from bench.pictures.guidance_loop import tokens_of
from bench.pictures.sampling import NOUNS, Drawn, Setting, Text, sample, wide_dtype

_Loop = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def _loop(
    method: Any, grid: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor], _Loop]:
    """The basis and the descent, kept from one drawing to the next so that it is compiled once, whatever the steps."""
    axis_y, axis_x, sigma_y, sigma_x = basis_axes(grid, method.sigma, method.convention)
    like = torch.empty((), dtype=dtype, device=device)
    basis = axis_basis(grid[0], axis_y, sigma_y, like), axis_basis(grid[1], axis_x, sigma_x, like)
    compile = functools.partial(torch.compile, dynamic=False) if device.type == "cuda" else lambda function: function
    run = rivals.statistics_loop(
        grid,
        basis,
        method.steps,
        compile,
        step_size=method.step_size,
        quantile=method.quantile,
        level=method.level,
        mass=method.mass,
        mass_weight=DEFAULT_MASS_WEIGHT if method.mass_weight is None else method.mass_weight,
        penalty=DEFAULT_PENALTY["official"] if method.penalty is None else method.penalty,
    )
    return basis, run


class _Regulation:
    """One drawing; `losses`: of every descent, `[steps,B,H]`, on the device."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.method = setting, ours.method("AttentionRegulation", setting)
        device = setting.latents.device
        self.target_ids = torch.tensor(tokens_of(setting, NOUNS), device=device)
        self.pinned_ids = torch.tensor([0, setting.end()], device=device)
        self.step = 0
        self.losses: list[Tensor] = []
        layers = layers_of(setting.pipe, cross=True)
        self.layers = {name: layers[name] for name in last_down_first_up(layers)}

    def before(self, latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        self.step = step
        return latents


class _Regulated:
    """One layer of it."""

    def __init__(self, inner: Any, layer: Layer, regulation: _Regulation) -> None:
        self.inner, self.regulation = inner, regulation
        setting, method = regulation.setting, regulation.method
        dtype, device = wide_dtype(setting.latents.dtype), setting.latents.device
        self.basis, self.loop = _loop(replace(method, edit_steps=1), layer.grid(setting.grid), dtype, device)
        centres = self.basis[0].shape[1], self.basis[1].shape[1]
        heads, targets = layer.module.heads, len(regulation.target_ids)
        drawn = [initial_theta(method.seed, layer.name, i, heads, targets, centres) for i in range(method.edit_steps)]
        # A copy for every sample: broadcast ones would be compiled for anew.
        thetas = torch.stack(drawn).to(device, dtype)
        self.thetas = thetas[:, None].repeat(1, setting.batch, 1, 1, 1, 1)
        self.previous: Tensor | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Tensor:
        if self.regulation.step >= self.regulation.method.edit_steps:
            return self.inner(attn, hidden_states, encoder_hidden_states, **rest)
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, encoder_hidden_states)
        half = len(q) // 2
        plain = F.scaled_dot_product_attention(q[:half], k[:half], v[:half], scale=attn.scale)
        edited = self._edited(q[half:], k[half:], v[half:], attn.scale)
        return finished(attn, torch.cat([plain, edited.to(plain.dtype)]), hidden_states)

    @torch.compiler.disable
    def _edited(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        regulation = self.regulation
        method, targets, pinned = regulation.method, regulation.target_ids, regulation.pinned_ids
        logits = (scale * wide(q)) @ wide(k).mT
        maps = logits.index_select(3, targets).mT.contiguous()
        rest = logits.index_fill(3, targets, -torch.inf).logsumexp(3)
        theta = self.thetas[regulation.step]
        history, best = self.loop(maps, rest, theta)
        regulation.losses.append(history)
        before = rivals.span(theta, self.basis) if self.previous is None else self.previous
        self.previous = best
        bias = torch.lerp(best, before, method.ema).mul_(method.strength * method.decay**regulation.step)
        everything = torch.cat([maps, rest.unsqueeze(2)], 2).logsumexp(2)
        kept = torch.exp(logits.index_select(3, pinned) - everything.unsqueeze(3))
        probabilities = logits.index_add_(3, targets, bias.mT).softmax(3).index_copy_(3, pinned, kept)
        return probabilities.to(v.dtype) @ v


def attention_regulation(setting: Setting) -> Drawn:
    """See the top of this file."""
    regulation = _Regulation(setting)
    processors = {
        name: _Regulated(layer.module.processor, layer, regulation) for name, layer in regulation.layers.items()
    }
    with replaced(regulation.layers, processors):
        images = sample(setting, before=regulation.before)
    return Drawn(images, regulation.losses)
