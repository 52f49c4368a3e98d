"""Whether attention says where an object is: two training losses and a measure of it.

The losses are the token loss and the pixel loss of TokenCompose (Wang et al., arXiv 2312.03626), with the renderer's
masks in place of a segmentation model's. The measure is the area under the ROC curve of a noun's map, own object
against other object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .captions import prompt
from .data import grid_masks
from .denoiser import Denoiser, denoised
from .drawing import render
from .scene import scene_for_seed


def token_loss(maps: Tensor, words: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean over words of `(1 - share of the word's attention inside its object)^2`, a scalar.

    Args:
        maps: head-averaged probabilities `[B, M, N]`.
        words: the text column and the object of every word, int64 `[B, W, 2]`, -1 for none.
        masks: where the objects are `[B, O, M]`, 0 or 1.
        weight: of the samples, `[B]`.
    """
    attention, own, real = _attention(maps, words, masks.shape[1])
    inside = (attention * (own @ masks)).sum(-1) / attention.sum(-1).clamp(min=1e-8)
    real = real * weight[:, None]
    return ((1 - inside) ** 2 * real).sum() / real.sum().clamp(min=1e-8)


def pixel_loss(maps: Tensor, words: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean binary cross entropy of the attention to an object against where it is, a scalar.

    The attention to an object is that to its words together. With this loss a map is as high as it is likely that the
    object is there.

    Args:
        maps: as for `token_loss`.
        words: as for `token_loss`; an object without words takes no part.
        masks: as for `token_loss`.
        weight: as for `token_loss`.
    """
    attention, own, _ = _attention(maps, words, masks.shape[1])
    attention = (own.mT @ attention).clamp(1e-4, 1 - 1e-4)
    entropy = -(masks * attention.log() + (1 - masks) * (1 - attention).log()).mean(-1)
    named = own.any(1) * weight[:, None]
    return (entropy * named).sum() / named.sum().clamp(min=1e-8)


def _attention(maps: Tensor, words: Tensor, objects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return words' maps `[B, W, M]`, which object is a word's `[B, W, O]` and which words there are `[B, W]`."""
    columns, owners = words.unbind(-1)
    real = (columns >= 0).to(maps.dtype)
    own = torch.nn.functional.one_hot(owners.clamp(min=0), objects) * real[..., None]
    chosen = maps.mT.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, maps.shape[1]))
    return chosen * real[..., None], own, real


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
    denoiser: Denoiser, pipe: Any, seeds: Sequence[int], *, level: float = 0.5, batch_size: int = 32
) -> dict[str, dict[str, float]]:
    """Measure how well the maps tell the objects apart on real two-object renders, noised to `level`.

    Returns:
        For every recorder of the denoiser the mean area under the ROC curve of a word's head-averaged map, over
        pictures and words: `noun` and `colour` (cells of the word's own object against cells of the other object),
        `noun_rest` and `colour_rest` (own object against all cells that it does not touch). A cell of the 16x16 grid is
        an object's if at least half covered.
    """
    model = denoised(pipe)
    areas: dict[str, dict[str, list[float]]] = {}
    for start in range(0, len(seeds), batch_size):
        chunk = seeds[start : start + batch_size]
        scenes = [scene_for_seed(seed, 2) for seed in chunk]
        drawn = [render(scene, seed) for scene, seed in zip(scenes, chunk, strict=True)]
        images = torch.stack([torch.from_numpy(np.array(item.image)).permute(2, 0, 1) for item in drawn])
        latents = pipe.vae.encode(images.to(pipe.device, pipe.dtype) / 127.5 - 1).latent_dist.mean
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(start)).to(latents)
        tokens = denoiser.tokens([scene.prompt for scene in scenes]).to(pipe.device)
        with denoiser.record(model) as recorders:
            denoiser.errors(model, latents, tokens, noise, torch.full((len(chunk),), level, device=pipe.device))
        for layer, recorder in recorders.items():
            assert recorder.probabilities is not None
            for scene, item, maps in zip(scenes, drawn, recorder.probabilities.float().cpu(), strict=True):
                covered = torch.from_numpy(grid_masks(item.masks)).flatten(1)
                for word in prompt(scene).words:
                    values, mine = maps[:, 1 + word.place], covered[word.object] >= 0.5
                    kind = "noun" if word.noun else "colour"
                    others = {kind: covered[1 - word.object] >= 0.5, f"{kind}_rest": covered[word.object] == 0}
                    for name, other in others.items():
                        areas.setdefault(layer, {}).setdefault(name, []).append(
                            area_under_curve(values[mine], values[other])
                        )
    return {layer: {name: float(np.mean(values)) for name, values in table.items()} for layer, table in areas.items()}
