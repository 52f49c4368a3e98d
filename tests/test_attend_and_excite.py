"""Attend-and-Excite: the loss from its equations, and diffusers' own pipeline, where that is right."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_pipeline_kinds import PROMPT
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast.methods.attend_and_excite import max_attention_loss

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TARGETS = [2, 5]  # bag, apple
LAYERS = ac.by_downsampling(2)
RES = (16, 16)


def by_hand(maps: Tensor, targets: list[int], grid: tuple[int, int], end: int) -> Tensor:
    """One sample, token by token; maps `[N,M]`."""
    shares = (100 * maps[1:end]).softmax(0)
    weights = torch.tensor([np.exp(-((x - 1.0) ** 2)) for x in range(3)], dtype=maps.dtype)
    kernel = torch.outer(weights, weights)
    losses = []
    for target in targets:
        picture = F.pad(shares[target - 1].reshape(1, 1, *grid), (1, 1, 1, 1), mode="reflect")
        losses.append((1 - F.conv2d(picture, (kernel / kernel.sum())[None, None]).max()).clamp_min(0))
    return torch.stack(losses).max()


@pytest.mark.parametrize("grid", [(4, 6), (7, 3)])
def test_loss_and_gradient(grid: tuple[int, int]) -> None:
    """A batch of different targets and ends, padded, equals each sample alone."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 9, grid[0] * grid[1], generator=generator, dtype=torch.float64) / 20
    maps.requires_grad_()
    targets, ends = [[2, 5, 6], [3]], [8, 5]
    padded = torch.tensor([[2, 5, 6], [3, -1, -1]])
    ours = max_attention_loss(maps, padded, grid, ends=torch.tensor(ends))
    theirs = torch.stack([by_hand(maps[i], targets[i], grid, ends[i]) for i in range(2)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), maps, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
    assert gradients[0].abs().amax() > 0


def diffusers_picture(pipe: Any, **options: Any) -> tuple[Tensor, list[float]]:
    """Latents of diffusers' StableDiffusionAttendAndExcitePipeline on the same parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionAttendAndExcitePipeline

        other = StableDiffusionAttendAndExcitePipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    losses: list[float] = []
    compute = other._compute_loss
    other._compute_loss = lambda values: losses.append(float(compute(values))) or compute(values)
    options = {"attn_res": RES, "num_inference_steps": 5, "output_type": "latent"} | options
    result = other(PROMPT, TARGETS, latents=tiny.latents(), **options).images
    return result, losses


def ours(pipe: Any, method: ac.AttendAndExcite, **options: Any) -> Tensor:
    with ac.control(pipe, method):
        options = {"num_inference_steps": 5, "output_type": "latent", "latents": tiny.latents()} | options
        return pipe(PROMPT, **options).images


@pytest.mark.parametrize("thresholds", [{}, {0: 0.05, 2: 0.07}])
@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_the_same_latents_as_diffusers(name: str, thresholds: dict[int, float]) -> None:
    pipe = tiny.pipeline(scheduler=tiny.scheduler(name))
    method = ac.AttendAndExcite(["bag", "apple"], layers=LAYERS, steps=4, thresholds=thresholds, max_refinements=20)
    theirs, losses = diffusers_picture(pipe, max_iter_to_alter=4, thresholds=thresholds)
    print(losses)
    mine = ours(pipe, method)
    assert (mine - ours(pipe, ac.AttendAndExcite(["bag"], layers=LAYERS, scale=0.0))).abs().max() > 0.05
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
