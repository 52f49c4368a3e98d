"""Latent guidance on pipelines: equal to the published loop by hand, on every kind of pipeline, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from guidance_walk import sample
from test_pipeline_kinds import KINDS, OTHER, PROMPT, call
from torch import Tensor

import attnctl_fast as ac

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-9}


class Peaks(ac.LatentGuidance):
    """One minus the highest attention to the least attended of the tokens 1 to 5."""

    layers = ac.by_downsampling(2)

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return (1 - maps[:, 1:6].amax(2)).amax(1)


def guided(pipe: Any, method: ac.LatentGuidance, **options: Any) -> Tensor:
    with ac.control(pipe, method):
        return call(pipe, **options)


LAYERS = ["down_blocks.1.attentions.0.transformer_blocks.0.attn2"] + [
    f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)
]
SCHEDULERS = [
    ("DDIMScheduler", 1e-9),
    ("DPMSolverMultistepScheduler", 1e-9),
    ("PNDMScheduler", 1e-9),
    ("UniPCMultistepScheduler", 1e-9),
    ("EulerDiscreteScheduler", 1e-4),
    ("HeunDiscreteScheduler", 1e-4),
]


@pytest.mark.parametrize("late_check", [True, False])
@pytest.mark.parametrize("name, tolerance", SCHEDULERS)
def test_equal_to_the_loop_by_hand(name: str, tolerance: float, late_check: bool) -> None:
    pipe = tiny.pipeline(scheduler=tiny.scheduler(name)).to(torch.float64)
    steps, guided_steps, bounds = 6, 4, {1: 0.5}
    method = Peaks(
        scale=5.0,
        schedule=ac.schedules.constant(),
        steps=guided_steps,
        refinement=bounds,
        max_refinements=3,
        late_check=late_check,
    )
    sizes = [5.0] * guided_steps
    ours = guided(pipe, method, num_inference_steps=steps)
    theirs, losses = sample(
        pipe,
        PROMPT,
        tiny.latents(),
        layers=LAYERS,
        loss=lambda maps: (1 - maps[:, 1:6].amax(2)).amax(1).sum(),
        sizes=sizes,
        steps=steps,
        bounds=bounds,
        late_check=late_check,
        max_refinements=3,
    )
    print(losses)
    assert (ours - call(pipe, num_inference_steps=steps)).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
