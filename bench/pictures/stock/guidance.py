"""Latent guidance in plain PyTorch at its best: Attend-and-Excite, T-SAM, SynGen and CONFORM.

Stock fused attention everywhere but in the layers that the loss reads, frozen weights, a backward pass to the latents
alone, and an evaluation of all conditional rows that ends within the last layer read, before its output. The losses are
closed forms without loops over samples or pairs, and without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast.attach.layers import Layer
from bench.ops.rivals import plain_similarity_loss
from bench.pictures import ours
from bench.pictures.attention_layers import heads, heads_to_channels, queries, replaced
from bench.pictures.guidance_loop import read_layers, smoother, step_sizes, text_similarity, tokens_of, trainable
from bench.pictures.sampling import Drawn, Form, Setting, Text, evaluate, sample, wide_dtype

# [B] of maps [B,N,M].
Loss = Callable[[Tensor], Tensor]


class _Done(Exception):
    """The last map has been read."""


class _Processor:
    """Attention whose maps, mean over heads, go to `maps`; the last layer ends the evaluation, unless it is whole."""

    def __init__(self, maps: list[Tensor], last: bool) -> None:
        self._maps, self._last = maps, last

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, k = queries(attn, hidden_states), heads(attn, attn.to_k(encoder_hidden_states))
        if attn.upcast_attention:
            q, k = q.float(), k.float()
        probabilities = (attn.scale * q @ k.mT).softmax(-1, dtype=wide_dtype(q.dtype))
        self._maps.append(probabilities.mean(1))
        if self._last:
            raise _Done
        v = heads(attn, attn.to_v(encoder_hidden_states))
        return attn.to_out[1](attn.to_out[0](heads_to_channels(probabilities.to(v.dtype) @ v)))


@contextmanager
def reading(layers: list[Layer], whole: bool = False) -> Iterator[list[Tensor]]:
    """Within the block an evaluation gives the maps of these layers, and ends with the last unless it is whole."""
    maps: list[Tensor] = []
    read = {layer.name: layer for layer in layers}
    processors = {layer.name: _Processor(maps, layer is layers[-1] and not whole) for layer in layers}
    with replaced(read, processors), suppress(_Done), torch.compiler.set_stance("force_eager"):
        yield maps


def _draw(name: str, make_loss: Callable[[Setting, Any, tuple[int, int]], Loss], setting: Setting) -> Drawn:
    method = ours.method(name, setting)
    sizes, layers = step_sizes(setting, method), read_layers(setting, method)
    loss = make_loss(setting, method, layers[0].grid(setting.grid))

    def guide(latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        if step >= len(sizes):
            return latents
        with torch.enable_grad():
            leaf = latents.detach().to(wide_dtype(latents.dtype), copy=True).requires_grad_()
            with reading(layers) as maps:
                evaluate(setting, leaf.to(latents.dtype), timestep, text)
            mean = torch.stack(maps).mean(0).mT
            (gradient,) = torch.autograd.grad(loss(mean).sum(), leaf)
        return (leaf.detach() - sizes[step] * gradient).to(latents.dtype)

    with trainable(setting.pipe.unet, False):
        return Drawn(sample(setting, before=guide))


def _max_attention(setting: Setting, method: Any, grid: tuple[int, int]) -> Loss:
    """The softmax over the tokens is formed for the targets alone."""
    targets = torch.tensor(tokens_of(setting, method.targets), device=setting.latents.device)
    smooth = smoother(setting, method, grid)

    def loss(maps: Tensor) -> Tensor:
        scores = method.sharpness * maps[:, 1:-1]
        shares = (scores.index_select(1, targets - 1) - scores.logsumexp(1, keepdim=True)).exp()
        return (1 - smooth(shares).amax(2)).clamp_min(0).amax(1)

    return loss


def _similarity(setting: Setting, method: Any, grid: tuple[int, int]) -> Loss:
    text, end = text_similarity(setting, method.gamma, padded=False), setting.end()
    text = text.to(wide_dtype(setting.latents.dtype)).expand(setting.batch, -1, -1)
    return lambda maps: plain_similarity_loss(maps[:, 1:end], text, grid)


def _binding(setting: Setting, method: Any, grid: tuple[int, int]) -> Loss:
    """A weighted sum over pairs of sum (p_i - p_j) (log p_i - log p_j) / 2 is p . (G log p), with G the Laplacian of
    the symmetric weights: one product for all pairs.

    Raises:
        ValueError: a word of several tokens, whose largest divergence is no weighted sum.
    """
    end = setting.end()
    weights = torch.zeros(end - 1, end - 1, dtype=torch.float64)
    for group in method.pairs:
        places = [setting.positions(word) for word in group]
        if any(len(place) > 1 for place in places):
            raise ValueError(f"{group!r} has a word of several tokens; use words that the tokenizer knows as one")
        *modifiers, noun = (place[0] - 1 for place in places)
        others = [token for token in range(end - 1) if token not in (*modifiers, noun)]
        for modifier in modifiers:
            weights[modifier, noun] += 1
            weights[modifier, others] -= 1 / (2 * len(others))
            weights[noun, others] -= 1 / (2 * len(others))
    weights = (weights + weights.mT) / 2
    laplacian = (weights.sum(1).diag() - weights).to(setting.latents.device, wide_dtype(setting.latents.dtype))

    def loss(maps: Tensor) -> Tensor:
        words = maps[:, 1:end]
        p = words / words.sum(2, keepdim=True)
        # The Laplacian does not see the factor, which keeps the logarithms small.
        logs = p.clamp_min(torch.finfo(p.dtype).eps).mul(p.shape[2]).log()
        return (p * (laplacian @ logs)).sum((1, 2))

    return loss


def _contrast(setting: Setting, method: Any, grid: tuple[int, int]) -> Loss:
    """NT-Xent of all pairs from one product; of the step before, the unit vectors are kept."""
    device = setting.latents.device
    groups = [tokens_of(setting, group) for group in method.groups]
    tokens = torch.tensor([token for group in groups for token in group], device=device)
    numbers = torch.tensor([number for number, group in enumerate(groups) for _ in group], device=device)
    smooth = smoother(setting, method, grid)
    kept: list[Tensor] = []
    pairs = [_pairs(numbers.repeat(times), wide_dtype(setting.latents.dtype)) for times in (1, 2)]

    def loss(maps: Tensor) -> Tensor:
        unit = F.normalize(smooth(maps.index_select(1, tokens)), dim=2)
        both = torch.cat([unit, *kept], 1)
        same, share = pairs[len(kept)]
        if method.remember:
            kept[:] = [unit.detach()]
        similarity = both @ both.mT / method.temperature
        others = similarity.masked_fill(same, torch.finfo(both.dtype).min).logsumexp(2, keepdim=True)
        return (F.softplus(others - similarity) * share).sum((1, 2))

    return loss


def _pairs(numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which tokens are of one group `[n,n]`, and the share of each positive pair in the mean."""
    same = numbers[:, None] == numbers
    positive = same & ~torch.eye(len(numbers), dtype=torch.bool, device=numbers.device)
    return same, positive.to(dtype) / positive.sum().clamp_min(1)


FORMS: dict[str, Form] = {
    "AttendAndExcite": partial(_draw, "AttendAndExcite", _max_attention),
    "TSAM": partial(_draw, "TSAM", _similarity),
    "SynGen": partial(_draw, "SynGen", _binding),
    "CONFORM": partial(_draw, "CONFORM", _contrast),
}
