"""Composable Diffusion on pipelines: equal to predictions one by one, in one UNet call per step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny
from tests.support.marks import full
from tests.support.pipelines import FEW_KINDS, KINDS, OTHER, PROMPT, call, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-9}  # in float64
PROMPTS, WEIGHTS = ["a red ball", "two dog", "the black cat"], [1.0, 0.7, -0.4]


def composed(pipe: Any, prompts: Any = PROMPTS, weights: Any = WEIGHTS, **options: Any) -> Tensor:
    with ac.control(pipe, ac.ComposableDiffusion(prompts, weights)):
        return call(pipe, **options)


def by_hand(
    pipe: Any, prompts: list[str], weights: list[float], latents: Tensor, guidance: float, steps: int
) -> Tensor:
    """One UNet call for each prompt and for none."""
    encoded = [pipe.encode_prompt(prompt, "cpu", 1, True) for prompt in prompts]
    pipe.scheduler.set_timesteps(steps)
    latents = latents.double()
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            without = pipe.unet(latents, t, encoder_hidden_states=encoded[0][1]).sample
            noise = without.clone()
            for weight, (text, _) in zip(weights, encoded, strict=True):
                noise += guidance * weight * (pipe.unet(latents, t, encoder_hidden_states=text).sample - without)
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def test_equal_to_predictions_one_by_one() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    rows = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    ours = composed(pipe, guidance_scale=3.0)
    hook.remove()
    assert rows == [4] * 4
    torch.testing.assert_close(ours, by_hand(pipe, PROMPTS, WEIGHTS, tiny.latents(), 3.0, 4), **EXACT)
    assert (ours - call(pipe, guidance_scale=3.0)).abs().max() > 0.05


def test_a_batch_equals_each_alone() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    prompts = [["a red ball", "two dog"], ["the black cat", "a bag"]]
    batch = composed(pipe, prompts, [1.0, -0.5], prompt=[PROMPT, OTHER], count=4, num_images_per_prompt=2)
    for index in range(4):
        alone = composed(pipe, prompts[index // 2], [1.0, -0.5], latents=tiny.latents(1, seed=index))
        torch.testing.assert_close(batch[index], alone[0], **EXACT)


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_kind_of_pipeline(kind: str) -> None:
    """The prompt itself with weight 1 is the plain picture; others change it; afterwards all is as it was."""
    build, options = KINDS[kind]
    pipe = tiny.pipeline(**build).to(torch.float64)
    options = {("strength" if name == "strength_" else name): value for name, value in options.items()}
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    plain, before = call(pipe, **options), snapshot(pipe)
    torch.testing.assert_close(composed(pipe, [PROMPT], [1.0], **options), plain, rtol=0, atol=1e-8)
    torch.testing.assert_close(composed(pipe, [PROMPT] * 2, [0.7, 0.3], **options), plain, rtol=0, atol=1e-8)
    assert (composed(pipe, **options) - plain).abs().max() > 0.02
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, **options), plain)


@pytest.mark.parametrize("place", ["wrapped", full("in place")])
def test_a_compiled_unet(place: str) -> None:
    pipe = tiny.pipeline()
    expected, unet = composed(pipe), pipe.unet
    torch._dynamo.reset()
    if place == "wrapped":
        pipe.unet = torch.compile(unet, backend="eager", fullgraph=True)
    else:
        unet.compile(backend="eager", fullgraph=True)
    assert torch.equal(composed(pipe), expected)
    torch._dynamo.reset()


BAD_METHODS = {
    "nothing": (([],), "prompts is \\[\\]"),
    "a text": (("a dog",), "prompts is 'a dog'"),
    "empty": ((["a", " "],), "prompts holds ' '"),
    "mixed": ((["a", ["b"]],), "not a mix"),
    "ragged": (([["a"], ["b", "c"]],), r"lists of \[1, 2\] texts"),
    "weights": ((["a", "b"], [1.0]), "weights holds 1 numbers for 2 prompts"),
    "not finite": ((["a"], [torch.inf]), "a weight is inf"),
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_bad_methods(case: str) -> None:
    arguments, message = BAD_METHODS[case]
    with pytest.raises(ValueError, match=message):
        ac.ComposableDiffusion(*arguments)


def test_bad_calls() -> None:
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="2 lists, but the call has 1 prompts"):
        composed(pipe, [["a dog"], ["a cat"]], None)
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        composed(pipe, guidance_scale=1.0)
    with pytest.raises(ValueError, match="does not go together with other methods"):
        ac.enable(pipe, ac.ComposableDiffusion(PROMPTS), ac.EnergyContext(0.1, 0.1))
    with (
        pytest.raises(ValueError, match="does not go together with other methods"),
        ac.capture(pipe),
    ):
        composed(pipe)
    assert snapshot(pipe) == before
