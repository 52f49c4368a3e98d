"""Whether cross-attention says where an object is: maps of the UNet's layers, a training loss and a measure of them.

The loss is the token loss of TokenCompose (Wang et al., arXiv 2312.03626), with the renderer's masks in place of a
segmentation model's. The measure is the area under the ROC curve of a noun's map, own object against other object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .data import grid_masks, word_positions
from .drawing import render
from .model import cross_attention_layers, encode_prompts
from .scene import scene_for_seed

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


class RecordingProcessor:
    """Plain cross-attention that keeps its head-averaged probabilities, `probabilities [B, M, N]`, with gradients."""

    def __init__(self) -> None:
        self.probabilities: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, source in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).float().softmax(dim=-1)
        self.probabilities = probabilities.mean(dim=1)
        out = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def record_attention(unet: UNet2DConditionModel, layers: tuple[str, ...]) -> Iterator[dict[str, RecordingProcessor]]:
    """Record the probabilities of the named cross-attention modules at each forward pass; restore them on leaving."""
    previous = unet.attn_processors
    recorders = {layer: RecordingProcessor() for layer in layers}
    unknown = [layer for layer in layers if f"{layer}.processor" not in previous]
    if unknown:
        known = [name.removesuffix(".processor") for name in previous]
        raise ValueError(f"no attention layers named {unknown}: the UNet has {known}")
    processors: dict[str, Any] = dict(previous)
    processors.update({f"{layer}.processor": recorder for layer, recorder in recorders.items()})
    unet.set_attn_processor(processors)
    try:
        yield recorders
    finally:
        unet.set_attn_processor(dict(previous))


def localisation_loss(
    maps: torch.Tensor, token_ids: torch.Tensor, masks: torch.Tensor, sample_weight: torch.Tensor
) -> torch.Tensor:
    """Return the weighted mean over words of `(1 - share of the word's attention inside its object)^2`, a scalar.

    Args:
        maps: head-averaged probabilities `[B, M, N]`.
        token_ids: the text position of every word `[B, W]`, int64, -1 for none.
        masks: where each word's object is `[B, W, M]`, 0 or 1.
        sample_weight: `[B]`.
    """
    real = (token_ids >= 0).to(maps.dtype) * sample_weight[:, None]
    columns = maps.gather(2, token_ids.clamp(min=0)[:, None, :].expand(-1, maps.shape[1], -1)).transpose(1, 2)
    inside = (columns * masks).sum(-1) / columns.sum(-1).clamp(min=1e-8)
    return ((1 - inside) ** 2 * real).sum() / real.sum().clamp(min=1e-8)


def area_under_curve(positives: torch.Tensor, negatives: torch.Tensor) -> float:
    """Return the area under the ROC curve.

    It is the probability that a positive exceeds a negative, ties counted half.

    Args:
        positives: a one-dimensional sample, not empty.
        negatives: another one.
    """
    if not len(positives) or not len(negatives):
        raise ValueError("the area under the ROC curve needs at least one positive and one negative")
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return float((below + not_above).double().mean() / 2 / len(ordered))


@torch.no_grad()
def localisation_table(
    pipe: StableDiffusionPipeline, seeds: Sequence[int], *, timestep: int = 500, batch_size: int = 32
) -> dict[str, dict[str, float]]:
    """Measure how well the maps tell the objects apart on real two-object renders, noised to `timestep`.

    Returns:
        For every cross-attention layer the mean area under the ROC curve of a word's head-averaged map, over pictures
        and words: `noun` and `colour` (cells of the word's own object against cells of the other object), `noun_rest`
        and `colour_rest` (own object against all cells that it does not touch). A cell of the 16x16 grid is an object's
        if at least half covered.
    """
    layers = cross_attention_layers()
    areas: dict[str, dict[str, list[float]]] = {layer: {} for layer in layers}
    for start in range(0, len(seeds), batch_size):
        chunk = seeds[start : start + batch_size]
        scenes = [scene_for_seed(seed, 2) for seed in chunk]
        drawn = [render(scene, seed) for scene, seed in zip(scenes, chunk, strict=True)]
        images = torch.stack([torch.from_numpy(np.array(item.image)).permute(2, 0, 1) for item in drawn])
        latents = (
            pipe.vae.encode(images.to(pipe.device, pipe.dtype) / 127.5 - 1).latent_dist.mean
            * pipe.vae.config.scaling_factor
        )
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(start)).to(latents)
        times = torch.full((len(chunk),), timestep, device=pipe.device)
        noisy = pipe.scheduler.add_noise(latents, noise, times)
        context = encode_prompts(pipe, [scene.prompt for scene in scenes])
        with record_attention(pipe.unet, layers) as recorders:
            pipe.unet(noisy, times, context)
            for layer, recorder in recorders.items():
                assert recorder.probabilities is not None
                for scene, item, maps in zip(scenes, drawn, recorder.probabilities.float().cpu(), strict=True):
                    covered = torch.from_numpy(grid_masks(item.masks)).flatten(1)
                    for word, positions in zip(("colour", "noun"), word_positions(scene), strict=True):
                        for own, position in enumerate(positions):
                            values, mine = maps[:, position], covered[own] >= 0.5
                            for name, other in ((word, covered[1 - own] >= 0.5), (f"{word}_rest", covered[own] == 0)):
                                areas[layer].setdefault(name, []).append(area_under_curve(values[mine], values[other]))
    return {layer: {name: float(np.mean(values)) for name, values in table.items()} for layer, table in areas.items()}
