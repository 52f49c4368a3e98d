"""Attend-and-Excite: the loss from its equations, and diffusers' own pipeline, where that is right."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast.methods.attend_and_excite import max_attention_loss
from tests.support import tiny
from tests.support.guidance_walk import maps_of
from tests.support.pipelines import PROMPT

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
    token = torch.arange(9)
    sharing = (token > 0) & (token < torch.tensor(ends)[:, None])
    ours = max_attention_loss(maps, padded, grid, sharing=sharing)
    theirs = torch.stack([by_hand(maps[i], targets[i], grid, ends[i]) for i in range(2)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), maps, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
    assert gradients[0].abs().amax() > 0


def test_shares_of_joint_attention() -> None:
    """Without sharpness, attention is divided by its sum over the tokens that share."""
    maps = torch.rand(1, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sharing = torch.tensor([[False, True, True, True]])
    found = max_attention_loss(maps, torch.tensor([[1, 3]]), (3, 4), sharing=sharing, sharpness=None, kernel_size=1)
    shares = maps[0, 1:] / maps[0, 1:].sum(0)
    torch.testing.assert_close(found, 1 - torch.stack([shares[0].max(), shares[2].max()]).min()[None])


def diffusers_picture(pipe: Any, **options: Any) -> tuple[Tensor, list[float]]:
    """Latents of diffusers' StableDiffusionAttendAndExcitePipeline on the same parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionAttendAndExcitePipeline

        parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        other = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    losses: list[float] = []
    compute = other._compute_loss

    def noting(max_attention_per_index: list[Tensor]) -> Tensor:
        losses.append(float(compute(max_attention_per_index)))
        return compute(max_attention_per_index)

    other._compute_loss = noting
    options = {"attn_res": RES, "num_inference_steps": 5, "output_type": "latent"} | options
    result = other(PROMPT, TARGETS, latents=tiny.latents().double(), **options).images
    return result, losses


def ours(pipe: Any, method: ac.AttendAndExcite, **options: Any) -> Tensor:
    with ac.control(pipe, method):
        options = {"num_inference_steps": 5, "output_type": "latent", "latents": tiny.latents().double()} | options
        return pipe(PROMPT, **options).images


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
def test_the_same_latents_as_diffusers(name: str) -> None:
    """With refinements: the loss is above its bound at both steps."""
    pipe = tiny.pipeline(scheduler=tiny.scheduler(name)).to(torch.float64)
    thresholds = {0: 0.75, 2: 0.5}
    theirs, losses = diffusers_picture(pipe, max_iter_to_alter=3, thresholds=thresholds)
    method = ac.AttendAndExcite(["bag", "apple"], layers=LAYERS, steps=3, thresholds=thresholds)
    mine = ours(pipe, method)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)
    assert (mine - ours(pipe, ac.AttendAndExcite(["bag"], layers=LAYERS, scale=0.0))).abs().max() > 0.05
    assert len(losses) > len(pipe.scheduler.timesteps) + 2


def test_latents_are_scaled_as_the_scheduler_says() -> None:
    """diffusers' pipeline hands the UNet latents that are not scaled, which is another picture for Euler's scheduler;
    the loss of ours is that of the scaled ones."""
    pipe = tiny.pipeline(scheduler=tiny.scheduler("EulerDiscreteScheduler")).to(torch.float64)
    seen = []

    class Noting(ac.AttendAndExcite):
        def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
            seen.append((maps, super().loss(maps, context)))
            return seen[-1][1]

    ours(pipe, Noting(["bag", "apple"], layers=LAYERS, steps=1, thresholds={}), num_inference_steps=2)
    scheduler = tiny.scheduler("EulerDiscreteScheduler")
    scheduler.set_timesteps(2)
    first = scheduler.timesteps[0]
    latents = tiny.latents().double() * scheduler.init_noise_sigma
    names = [name for name in pipe.unet.attn_processors if "1.attentions" in name and "attn2" in name]
    names = [name.removesuffix(".processor") for name in names]
    text = pipe.encode_prompt(PROMPT, "cpu", 1, True)[0]
    losses = [
        by_hand(
            maps_of(pipe.unet, names, lambda x=x: pipe.unet(x, first, encoder_hidden_states=text))[0], TARGETS, RES, 15
        )
        for x in (scheduler.scale_model_input(latents, first), latents)
    ]
    torch.testing.assert_close(seen[0][1][0], losses[0].detach(), rtol=0, atol=1e-9)
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_height_and_width_keep_their_places() -> None:
    """diffusers' pipeline takes (width, height) for the grid of the maps and smooths across their rows; ours smooths
    the picture."""
    pipe = tiny.pipeline().to(torch.float64)
    grids = []

    class Noting(ac.AttendAndExcite):
        def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
            loss = super().loss(maps, context)
            height, width = grid = context.grid
            expected, swapped = (by_hand(maps[0], TARGETS, sides, 15) for sides in (grid, (width, height)))
            torch.testing.assert_close(loss[0], expected, rtol=0, atol=1e-12)
            grids.append((grid, float((loss[0] - swapped).abs())))
            return loss

    options = {"height": 32 * tiny.SCALE, "width": 48 * tiny.SCALE, "latents": tiny.latents(1, (32, 48)).double()}
    ours(pipe, Noting(["bag", "apple"], layers=LAYERS, steps=2, thresholds={}), num_inference_steps=2, **options)
    assert [grid for grid, _ in grids] == [(16, 24)] * 2
    assert max(difference for _, difference in grids) > 1e-4
