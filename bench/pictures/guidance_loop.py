"""What the published and the stock forms of latent guidance share: layers, step lengths, words, smoothing, the text's
self-attention, and a UNet's weights for the length of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast import schedules
from attnctl_fast._numbers import step_count
from attnctl_fast.attach.layers import Layer, choose, cross_attention_layers
from attnctl_fast.ops.smooth_maps import check_smoothing
from bench.pictures.sampling import PROMPT, Setting, wide_dtype


def read_layers(setting: Setting, method: Any) -> list[Layer]:
    """The layers whose maps the method reads, in order of execution."""
    layers = cross_attention_layers(setting.pipe.unet)
    names = method.default_layers(layers) if method.layers is None else choose(layers, method.layers)
    return [layers[name] for name in names]


def step_sizes(setting: Setting, method: Any) -> list[float]:
    """How far down the gradient the latents move before each of the guided steps."""
    factors = schedules.factors(method.schedule, setting.steps)
    return [method.scale * factor for factor in factors[: step_count(method.steps, setting.steps)]]


def correction_factor(setting: Setting, timestep: Tensor) -> float:
    """What a loss's gradient by the latents is multiplied by to correct a model's prediction, at strength 1.

    With s the noise's share of a flow's latents: `2 (s + 0.001) / (1 - s + 0.001) * s` for a model of v, and alpha
    times that for one of epsilon.
    """
    kept = float(setting.pipe.scheduler.alphas_cumprod[int(timestep)])
    alpha, noise = kept**0.5, (1 - kept) ** 0.5
    share = noise / (alpha + noise)
    factor = 2 * (share + 1e-3) / (1 - share + 1e-3) * share
    return factor if setting.pipe.scheduler.config.prediction_type == "v_prediction" else alpha * factor


def tokens_of(setting: Setting, words: Any) -> list[int]:
    """Positions of words in the prompt, one after the other."""
    return [position for word in words for position in setting.positions(word)]


def kernel(method: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
    """The weights of the method's smoothing `[size,size]`."""
    taps = check_smoothing(grid, grid[0] * grid[1], method.sigma, method.kernel_size)[1]
    axis = torch.tensor(taps, dtype=like.dtype, device=like.device)
    return torch.outer(axis, axis)


def smoother(setting: Setting, method: Any, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """The method's smoothing of maps `[B,n,M]`, all by one convolution."""
    weights = kernel(method, grid, setting.latents.new_empty(0, dtype=wide_dtype(setting.latents.dtype)))
    return lambda maps: smoothed(maps.reshape(-1, *grid), weights).view(maps.shape)


def smoothed(maps: Tensor, weights: Tensor) -> Tensor:
    """Maps `[n,height,width]` under a kernel `[size,size]`, reflected at the borders."""
    padded = F.pad(maps.unsqueeze(1), (len(weights) // 2,) * 4, mode="reflect")
    return F.conv2d(padded, weights[None, None]).squeeze(1)


@contextmanager
def trainable(unet: Any, on: bool) -> Iterator[None]:
    """Within the block, all weights require gradients, or none does."""
    before = [parameter.requires_grad for parameter in unet.parameters()]
    try:
        unet.requires_grad_(on)
        yield
    finally:
        for parameter, required in zip(unet.parameters(), before, strict=True):
            parameter.requires_grad_(required)


def text_similarity(setting: Setting, gamma: float, *, padded: bool) -> Tensor:
    """What T-SAM compares the maps with: the text encoder's self-attention between the prompt's words `[n,n]`, mean
    over layers, heads and encoders, to the power gamma, rows over their sums.

    padded: run the encoder on the context's full length, not only on the prompt's.
    """
    pipe, end = setting.pipe, setting.end()
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    length = pipe.tokenizer.model_max_length if padded else end + 1
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=length, return_tensors="pt").input_ids
    found = [_self_attention(encoder, ids.to(setting.latents.device)) for encoder in encoders if encoder is not None]
    words = torch.stack(found).mean(0)[1:end, 1:end]
    # Over the largest first, so that the power does not underflow.
    words = (words / words.amax(1, keepdim=True)) ** gamma
    return words / words.sum(1, keepdim=True)


def _self_attention(encoder: Any, ids: Tensor) -> Tensor:
    """Mean over layers and heads `[N,N]`, by attention that keeps its maps."""
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = encoder(ids, output_attentions=True).attentions
    finally:
        encoder.set_attn_implementation(before)
    return torch.cat([layer.to(wide_dtype(layer.dtype)) for layer in maps]).mean((0, 1))
