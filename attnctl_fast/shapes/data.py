"""The training set: drawn scenes, their captions as token ids, and their objects' masks on the attention grid."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .drawing import SIZE, render
from .model import LATENT_SIZE
from .scene import MAX_OBJECTS, Scene, scene_for_seed

# Renders of evaluation and tests use seeds from 0 upwards; training must not have seen them.
TRAINING_SEEDS = 1_000_000
_OBJECTS_OF_TEN = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)


class Examples(NamedTuple):
    """`images` uint8 `[n,3,64,64]`, `scenes`, `masks` bool `[n,3,256]`: the cells of the 16x16 grid of each object."""

    images: torch.Tensor
    scenes: list[Scene]
    masks: torch.Tensor


def word_positions(scene: Scene) -> tuple[list[int], list[int]]:
    """Return the text positions of the colours and of the nouns of `scene.prompt`.

    The start token is counted as 0.
    """
    objects = range(len(scene.objects))
    return [2 + 4 * i for i in objects], [3 + 4 * i for i in objects]


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
    scenes = []
    for index in tqdm(range(count), desc="drawing", disable=not progress):
        scene = training_scene(index)
        drawn = render(scene, TRAINING_SEEDS + index)
        images[index] = torch.from_numpy(np.array(drawn.image)).permute(2, 0, 1)
        touched = torch.from_numpy(grid_masks(drawn.masks) > 0)
        masks[index, : len(scene.objects)] = touched.flatten(1)
        scenes.append(scene)
    return Examples(images, scenes, masks)
