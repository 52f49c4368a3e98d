"""Velocity guidance: corrections equal to plain autograd's by hand, and everything put back."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny
from tests.support.graphs import counted_graphs
from tests.support.guidance_walk import maps_of
from tests.support.pipelines import (
    FEW_KINDS,
    LAYERS,
    OTHER,
    PROMPT,
    Stop,
    built,
    call,
    guided,
    peaks,
    snapshot,
    stop_at,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
EXACT = {"rtol": 0, "atol": 1e-8}


class Peaks(ac.VelocityGuidance):
    layers = ac.by_downsampling(2)
    strength = 3.0

    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return peaks(maps)


class Other(Peaks):
    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return maps.square().mean((1, 2)) * 50


def double(name: str = "DDIMScheduler", **config: Any) -> Any:
    scheduler = tiny.scheduler(name)
    return tiny.pipeline(scheduler=type(scheduler).from_config(scheduler.config, **config)).to(torch.float64)


def by_hand(pipe: Any, steps: int, strength: float) -> Tensor:
    """The latents of `PROMPT`, with velocities corrected in all steps."""
    scheduler = pipe.scheduler
    texts = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    scheduler.set_timesteps(steps)
    latents = tiny.latents().to(texts[0]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = corrected(pipe, scheduler.scale_model_input(latents, t), t, *texts, strength)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents


def corrected(pipe: Any, x: Tensor, t: Any, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """What a UNet is to predict of an input `alpha picture + sigma noise`, guided towards the text."""
    unet, kind, kept = pipe.unet, pipe.scheduler.config.prediction_type, float(pipe.scheduler.alphas_cumprod[int(t)])
    alpha, sigma = math.sqrt(kept), math.sqrt(1 - kept)
    # As a flow: z = (1 - s) picture + s noise.
    z, s = (x / (alpha + sigma)).requires_grad_(), sigma / (alpha + sigma)
    with torch.enable_grad():
        maps = maps_of(unet, LAYERS, lambda: unet((alpha + sigma) * z, t, encoder_hidden_states=positive))
        (gradient,) = torch.autograd.grad(peaks(maps).sum(), z)
    with torch.no_grad():
        both = unet(torch.cat([x] * 2), t, encoder_hidden_states=torch.cat([negative, positive])).sample
    without, with_text = both.chunk(2)
    output = without + 7.5 * (with_text - without)
    noise, picture = output, output
    if kind == "epsilon":
        picture = (x - sigma * noise) / alpha
    elif kind == "sample":
        noise = (x - alpha * picture) / sigma
    else:
        noise, picture = sigma * x + alpha * output, alpha * x - sigma * output
    velocity = noise - picture + strength * 2 * (s + 1e-3) / (1 - s + 1e-3) * s * gradient
    picture, noise = z.detach() - s * velocity, z.detach() + (1 - s) * velocity
    return {"epsilon": noise, "sample": picture, "v_prediction": alpha * noise - sigma * picture}[kind]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_equal_to_the_correction_by_hand(name: str, prediction: str) -> None:
    pipe = double(name, prediction_type=prediction, timestep_spacing="leading")
    plain, before = call(pipe), snapshot(pipe)
    found = guided(pipe, Peaks())
    assert snapshot(pipe) == before
    size = float(plain.abs().max())
    assert (found - plain).abs().max() > 1e-3 * size
    # Euler's table of sigmas is float32.
    tolerance = 1e-9 if name == "DDIMScheduler" else 1e-5
    torch.testing.assert_close(found, by_hand(pipe, 4, 3.0), rtol=0, atol=tolerance * size)


class Still(ac.LatentGuidance):
    """Looks at the maps, and moves nothing."""

    layers = ac.by_downsampling(2)
    scale = 0.0
    steps = 1.0

    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return peaks(maps)


def losses(pipe: Any, method: Any, **options: Any) -> list[float]:
    """The losses at the steps of a call."""
    seen: list[float] = []

    def watch(_: Any, maps: Tensor, context: Any) -> None:
        seen.append(float(peaks(maps)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "after_step", watch)
        with contextlib.suppress(Stop):
            guided(pipe, method, **options)
    return seen


def test_the_loss_falls() -> None:
    """Where steps are short, each one that is corrected ends at a lower loss than one that is not."""
    pipe = double()
    short: dict[str, Any] = {"num_inference_steps": 200, "callback_on_step_end": stop_at(3)}
    plain, ours = losses(pipe, Still(), **short), losses(pipe, Peaks(strength=0.5), **short)
    assert ours[0] == pytest.approx(plain[0], abs=1e-9)
    drops = [other - one for one, other in zip(ours, plain, strict=True)]
    assert all(drop > 0 for drop in drops[1:]), drops


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_kind_of_pipeline(kind: str) -> None:
    one = built(kind)
    before = snapshot(one.pipe)
    found = guided(one.pipe, Peaks(strength=30.0), **one.options)
    assert snapshot(one.pipe) == before
    assert (found - one.plain).abs().max() > 1e-3
    # Nothing is taken apart where nothing is corrected.
    assert torch.equal(guided(one.pipe, Peaks(strength=0.0), **one.options), one.plain)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_batch_of_prompts_equals_each_alone(guidance: float) -> None:
    pipe, prompts = double(), [PROMPT, OTHER]
    batch = guided(pipe, Peaks(), prompt=prompts, num_images_per_prompt=2, count=4, guidance_scale=guidance)
    for index, prompt in enumerate(prompts):
        latents = tiny.latents(4)[2 * index : 2 * index + 1]
        alone = guided(pipe, Peaks(), prompt=prompt, latents=latents, guidance_scale=guidance)
        torch.testing.assert_close(batch[2 * index], alone[0], **EXACT)


def test_inference_mode_and_caller_gradients() -> None:
    pipe = tiny.pipeline()
    expected = guided(pipe, Peaks())
    with torch.inference_mode():
        assert torch.equal(guided(pipe, Peaks()), expected)
    with torch.enable_grad():
        assert not guided(pipe, Peaks()).requires_grad
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_the_first_steps_only() -> None:
    pipe = double()
    assert len(losses(pipe, Peaks(steps=2))) == 2
    assert len(losses(pipe, Peaks(steps=0.25))) == 1
    # Heun's method evaluates the model twice in all steps but the last.
    assert len(losses(double("HeunDiscreteScheduler"), Peaks(steps=2))) == 4


def test_together_with_other_methods() -> None:
    pipe = double()
    regulation, energy = ac.AttentionRegulation(["bag", "apple"]), ac.EnergyContext(0.02, 0.03)
    for other in (regulation, energy, Still()):
        alone, both = guided(pipe, other), guided(pipe, other, Peaks())
        assert (both - alone).abs().max() > 1e-3
        torch.testing.assert_close(guided(pipe, other, Peaks(strength=1e-12)), alone, **EXACT)


def test_two_corrections_add_up() -> None:
    pipe = double()
    one = guided(pipe, Peaks(steps=1), num_inference_steps=2)
    two = guided(pipe, Peaks(steps=1), Other(steps=1), num_inference_steps=2)
    assert (one - two).abs().max() > 1e-4
    # At a single step everything is linear in the corrections.
    plain = call(pipe, num_inference_steps=1)
    first, second = (guided(pipe, method, num_inference_steps=1) for method in (Peaks(), Other()))
    both = guided(pipe, Peaks(), Other(), num_inference_steps=1)
    torch.testing.assert_close(both - plain, first - plain + (second - plain), **EXACT)


def test_a_compiled_unet() -> None:
    """The unconditional rows run compiled, those that need a gradient do not."""
    pipe = tiny.pipeline()
    expected = guided(pipe, Peaks(), num_inference_steps=2)
    with counted_graphs(pipe) as graphs:
        found = guided(pipe, Peaks(), num_inference_steps=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(graphs) == 1


def test_a_lora() -> None:
    peft = pytest.importorskip("peft")
    pipe = double()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    ours = guided(pipe, Peaks())
    assert any(parameter.requires_grad for parameter in pipe.unet.parameters())
    pipe.unet.fuse_lora()
    torch.testing.assert_close(guided(pipe, Peaks()), ours, **EXACT)


class Broken(Peaks):
    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return peaks(maps) * torch.tensor([1.0, torch.nan], dtype=maps.dtype)


def test_corrections_that_are_not_finite_are_left_out_and_reported() -> None:
    pipe = double()
    prompts: dict[str, Any] = {"prompt": [PROMPT] * 2, "count": 2, "num_inference_steps": 2}
    with pytest.warns(RuntimeWarning, match="Broken left out 2 moves"):
        found = guided(pipe, Broken(), **prompts)
    torch.testing.assert_close(found[:1], guided(pipe, Peaks(), **prompts)[:1], **EXACT)
    torch.testing.assert_close(found[1:], call(pipe, **prompts)[1:], **EXACT)


def test_restored_after_an_exception() -> None:
    class Raising(Peaks):
        def loss(self, maps: Tensor, context: Any) -> Tensor:
            raise KeyboardInterrupt

    one = built("sd2")
    before = snapshot(one.pipe)
    with pytest.raises(KeyboardInterrupt):
        guided(one.pipe, Raising(), **one.options)
    assert snapshot(one.pipe) == before
    assert torch.equal(call(one.pipe, **one.options), one.plain)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="strength is -1"):
        Peaks(strength=-1)
    with pytest.raises(ValueError, match=r"EDMEulerScheduler takes the model's output for epsilon.*use a scheduler of"):
        ac.enable(tiny.pipeline(scheduler=tiny.scheduler("EDMEulerScheduler")), Peaks())
    with pytest.raises(ValueError, match="perturbs some rows"):
        ac.enable(tiny.pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["down_blocks.1"]), Peaks())
    pipe = tiny.pipeline()
    pipe.unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        guided(pipe, Peaks())
