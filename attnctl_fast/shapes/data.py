"""The training set: drawn scenes, their captions, and their objects' masks on the attention grid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .autoencoder import LATENT_SIZE
from .captions import Caption, caption
from .drawing import SIZE, render
from .scene import MAX_OBJECTS, Scene, scene_for_seed

# Renders of evaluation and tests use seeds from 0 upwards; training must not have seen them.
TRAINING_SEEDS = 1_000_000
_OBJECTS_OF_TEN = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)


class Examples(NamedTuple):
    """Images uint8 `[n,3,64,64]`, captions, and the cells of the 16x16 grid that each object touches, `[n,3,256]`."""

    images: torch.Tensor
    captions: list[Caption]
    masks: torch.Tensor


def grid_masks(masks: np.ndarray) -> np.ndarray:
    """Return the share of every latent cell that pixel masks `[n,64,64]` cover, float64 `[n,16,16]`."""
    cell = SIZE // LATENT_SIZE
    return masks.reshape(-1, LATENT_SIZE, cell, LATENT_SIZE, cell).mean(axis=(2, 4))


def training_scene(index: int) -> Scene:
    """Return the scene of a training example: one, two or three objects in 50, 40 and 10 % of the examples."""
    return scene_for_seed(TRAINING_SEEDS + index, _OBJECTS_OF_TEN[index % 10])


def make_examples(count: int, *, progress: bool = True) -> Examples:
    """Draw the first `count` training examples."""
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    masks = torch.zeros(count, MAX_OBJECTS, LATENT_SIZE**2, dtype=torch.bool)
    captions = []
    for index in tqdm(range(count), desc="drawing", disable=not progress):
        scene = training_scene(index)
        drawn = render(scene, TRAINING_SEEDS + index)
        images[index] = torch.from_numpy(np.array(drawn.image)).permute(2, 0, 1)
        touched = torch.from_numpy(grid_masks(drawn.masks) > 0)
        masks[index, : len(scene.objects)] = touched.flatten(1)
        captions.append(caption(scene, TRAINING_SEEDS + index))
    return Examples(images, captions, masks)
