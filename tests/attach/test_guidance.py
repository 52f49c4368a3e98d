"""Latent guidance on pipelines: equal to the published loop by hand, on every kind, and nothing left behind."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny
from tests.support.guidance_walk import sample
from tests.support.marks import full
from tests.support.pipelines import (
    FEW_KINDS,
    KINDS,
    LAYERS,
    OTHER,
    PROMPT,
    Peaks,
    Stop,
    built,
    call,
    guided,
    peaks,
    snapshot,
    stop_at,
)
from tests.support.rounding import RandomRounding

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-9}  # in float64


def double(**parts: Any) -> Any:
    return tiny.pipeline(**parts).to(torch.float64)


SCHEDULERS = {
    # A loss that is reached after a few moves.
    "DDIMScheduler": 0.738,
    "PNDMScheduler": 0.738,
    "DPMSolverMultistepScheduler": 0.785,
    "UniPCMultistepScheduler": 0.785,
    "EulerDiscreteScheduler": 0.7987,
    "HeunDiscreteScheduler": 0.745,
}


@pytest.mark.parametrize(
    ("name", "late_check"),
    [
        (name, late) if late or name in ("DDIMScheduler", "HeunDiscreteScheduler") else full(name, late)
        for name, late in itertools.product(SCHEDULERS, (True, False))
    ],
)
def test_equal_to_the_loop_by_hand(name: str, late_check: bool) -> None:
    """With a refinement at the second step, whose loss is checked one move late or at once."""
    bound = SCHEDULERS[name]
    pipe = double(scheduler=tiny.scheduler(name))
    steps, first = 6, 3
    method = Peaks(
        scale=5.0, schedule=ac.schedules.constant(), steps=first, refinement={1: bound}, late_check=late_check
    )
    ours = guided(pipe, method, num_inference_steps=steps)
    theirs, losses = sample(
        pipe,
        PROMPT,
        tiny.latents(),
        layers=LAYERS,
        loss=lambda maps: peaks(maps).sum(),
        sizes=[5.0] * first,
        steps=steps,
        bounds={1: bound},
        late_check=late_check,
    )
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert (ours - call(pipe, num_inference_steps=steps)).abs().max() > 0.02
    order = pipe.scheduler.order
    refined = losses[order : len(losses) - (first - 1) * order + 1]
    met = next(index for index, value in enumerate(refined) if value <= bound)
    assert met > 0
    assert len(refined) - 1 == met + late_check


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_kind_of_pipeline(kind: str) -> None:
    """Guided, repeatable, the same without the cut, and the plain picture bit for bit with no step and after use."""
    pipe, options, plain = built(kind)
    before = snapshot(pipe)
    result = guided(pipe, Peaks(), **options)
    assert torch.isfinite(result).all()
    assert (result - plain).abs().max() > 0.05
    assert torch.equal(guided(pipe, Peaks(truncate=False, freeze=False), **options), result)
    assert torch.equal(guided(pipe, Peaks(scale=0.0), **options), plain)
    assert torch.equal(guided(pipe, Peaks(steps=0), **options), plain)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe, **options), plain)


@pytest.mark.parametrize("layers", ["down_blocks.1", "mid_block", "up_blocks.1.attentions.0"])
@pytest.mark.parametrize("kind", ["sd1", "controlnet", "controlnet, guess mode"])
def test_wherever_the_unet_is_cut(kind: str, layers: str) -> None:
    build, options = KINDS[kind]
    pipe = tiny.pipeline(**build)
    result = guided(pipe, Peaks(layers=[layers]), **options)
    assert (result - call(pipe, **options)).abs().max() > 0.05
    assert torch.equal(guided(pipe, Peaks(layers=[layers], truncate=False), **options), result)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_a_batch_of_prompts_equals_each_alone(guidance: float) -> None:
    """Two prompts, two images each, refined a different number of times."""
    pipe = double()
    method = ac.AttendAndExcite(
        [["bag"], ["red ball", "dog", "cat"]],
        layers=ac.by_downsampling(2),
        scale=60.0,
        steps=3,
        thresholds={0: 0.06},
        max_refinements=4,
    )
    options = {"guidance_scale": guidance}
    batch = guided(pipe, method, prompt=[PROMPT, OTHER], count=4, num_images_per_prompt=2, **options)
    plain = call(pipe, prompt=[PROMPT, OTHER], count=4, num_images_per_prompt=2, **options)
    assert ((batch - plain).flatten(1).abs().amax(1) > 0.05).all()
    for index in range(4):
        which = index // 2
        alone = guided(
            pipe,
            ac.AttendAndExcite(
                method.targets[which],
                layers=method.layers,
                scale=60.0,
                steps=3,
                thresholds={0: 0.06},
                max_refinements=4,
            ),
            prompt=[PROMPT, OTHER][which],
            latents=tiny.latents(1, seed=index),
            **options,
        )
        torch.testing.assert_close(batch[index], alone[0], **EXACT)


@pytest.mark.parametrize("size", [(32, 48), (36, 32)])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_sizes_that_are_not_square(kind: str, size: tuple[int, int]) -> None:
    pipe = tiny.pipeline(**KINDS[kind][0])
    grids = []

    class Noting(Peaks):
        def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
            grids.append((context.grid, maps.shape[2], tuple(context.token_ids.shape)))
            return super().loss(maps, context)

    options = {"height": size[0] * tiny.SCALE, "width": size[1] * tiny.SCALE, "size": size}
    result = guided(pipe, Noting(layers=ac.by_downsampling(2)), **options)
    grid = (size[0] // 2, size[1] // 2)
    assert set(grids) == {(grid, grid[0] * grid[1], (1, tiny.LENGTH))}
    assert (result - call(pipe, **options)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("sd1", torch.float16),
        ("sd2", torch.bfloat16),
        full("sd1", torch.bfloat16),
        full("sd2", torch.float16),
    ],
)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """One step is as near to that of the same weights in float64 as if the published loop were rounded at random, the
    loss is float32, and the latents keep the pipeline's dtype."""
    seen = set()

    class Smooth(ac.LatentGuidance):
        layers = ac.by_downsampling(2)

        def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
            seen.add(maps.dtype)
            return smooth(maps)

    def smooth(maps: Tensor) -> Tensor:
        return -maps[:, 1:6].square().sum((1, 2))

    def by_hand(pipe: Any, rounding: RandomRounding | None = None) -> Tensor:
        how: dict[str, Any] = {"layers": LAYERS, "loss": lambda maps: smooth(maps).sum(), "sizes": [1.0], "steps": 1}
        return sample(pipe, PROMPT, tiny.latents().to(dtype), rounding=rounding, **how)[0]

    pipe = tiny.pipeline(**KINDS[kind][0]).to(dtype)
    wide = copy.deepcopy(pipe).to(torch.float64)
    exact = by_hand(wide)
    once = {"num_inference_steps": 1, "latents": tiny.latents().to(dtype)}
    result = guided(pipe, Smooth(steps=1, scale=1.0), **once)
    assert seen == {torch.float32}
    assert result.dtype == dtype
    drawn = [(by_hand(pipe, RandomRounding(seed)) - exact).square().sum() for seed in range(8)]
    error = (result - exact).norm()
    assert error < 2 * torch.stack(drawn).mean().sqrt()
    assert error < (exact - call(wide, **once)).norm() / 2


def test_embeddings_of_any_length() -> None:
    pipe = double()
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    same = guided(pipe, Peaks(), prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative)
    torch.testing.assert_close(same, guided(pipe, Peaks()), **EXACT)
    longer = {"prompt_embeds": positive.repeat(1, 2, 1), "negative_prompt_embeds": negative.repeat(1, 2, 1)}
    assert (guided(pipe, Peaks(), prompt=None, **longer) - call(pipe, prompt=None, **longer)).abs().max() > 0.05


def test_latents_that_a_callback_changes_are_those_that_move() -> None:
    pipe = double()

    def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 0 if index == 1 else tensors["latents"]}

    ended = guided(pipe, Peaks(steps=2), callback_on_step_end=callback)
    assert torch.equal(ended, call(pipe, callback_on_step_end=callback))
    moved = guided(pipe, Peaks(steps=3), callback_on_step_end=callback)
    assert (moved - ended).abs().max() > 0.02


def test_inference_mode_and_caller_gradients() -> None:
    pipe = tiny.pipeline()
    expected = guided(pipe, Peaks())
    with torch.inference_mode():
        assert torch.equal(guided(pipe, Peaks()), expected)


@pytest.mark.parametrize("place", ["wrapped", full("in place"), "blocks"])
def test_a_compiled_unet(place: str) -> None:
    """The guidance pass runs outside the graph, which stays one."""
    from torch._dynamo.testing import CompileCounterWithBackend

    pipe = tiny.pipeline()
    plain, expected = call(pipe), guided(pipe, Peaks())
    unet = pipe.unet
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    if place == "wrapped":
        pipe.unet = torch.compile(unet, backend=counter, fullgraph=True)
    elif place == "in place":
        unet.compile(backend=counter, fullgraph=True)
    else:
        for block in unet.mid_block.attentions[0].transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
    assert torch.equal(call(pipe), plain)
    frames = counter.frame_count
    before = snapshot(pipe)
    assert torch.equal(guided(pipe, Peaks()), expected)
    assert counter.frame_count == frames == 1
    assert snapshot(pipe) == before
    torch._dynamo.reset()


def test_lora_offload_and_ip_adapter() -> None:
    pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    from peft import LoraConfig

    pipe = double()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False))
    ours = guided(pipe, Peaks())
    assert any(parameter.requires_grad for parameter in pipe.unet.parameters())
    pipe.unet.fuse_lora()
    torch.testing.assert_close(guided(pipe, Peaks()), ours, **EXACT)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    before = snapshot(pipe)
    torch.testing.assert_close(guided(pipe, Peaks()), ours, **EXACT)
    assert snapshot(pipe) == before
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.is_meta

    pipe = double()
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe)])
    pipe.to(torch.float64)
    images = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)]
    before = snapshot(pipe)
    moved = guided(pipe, Peaks(), ip_adapter_image_embeds=images)
    assert (moved - call(pipe, ip_adapter_image_embeds=images)).abs().max() > 0.02
    assert snapshot(pipe) == before
    pipe.set_ip_adapter_scale(0.0)
    without = guided(pipe, Peaks(), ip_adapter_image_embeds=images)
    pipe.unload_ip_adapter()
    torch.testing.assert_close(guided(pipe, Peaks()), without, **EXACT)


def test_gradient_checkpointing() -> None:
    pipe = double()
    expected = guided(pipe, Peaks())
    pipe.unet.enable_gradient_checkpointing()
    torch.testing.assert_close(guided(pipe, Peaks()), expected, **EXACT)


class Failing(Peaks):
    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        if context.call.step == 1:
            raise Stop
        return super().loss(maps, context)


def test_restored_after_an_exception() -> None:
    """In the loss, in the middle of the cut UNet, and in the pipeline between two steps."""
    pipe = tiny.pipeline()
    before, plain, expected = snapshot(pipe), call(pipe), guided(pipe, Peaks())
    weights = [id(parameter) for parameter in pipe.unet.parameters()]
    children = {name: list(map(id, module._modules.values())) for name, module in pipe.unet.named_modules()}
    with pytest.raises(Stop):
        guided(pipe, Failing(layers=ac.by_downsampling(2)))
    with pytest.raises(Stop):
        guided(pipe, Peaks(), callback_on_step_end=stop_at(1))
    hook = pipe.unet.up_blocks[1].attentions[1].register_forward_pre_hook(_stop_with_gradients)
    with pytest.raises(Stop):
        guided(pipe, Peaks())
    hook.remove()
    assert snapshot(pipe) == before
    assert [id(parameter) for parameter in pipe.unet.parameters()] == weights
    assert {name: list(map(id, m._modules.values())) for name, m in pipe.unet.named_modules()} == children
    assert torch.equal(call(pipe), plain)
    with ac.control(pipe, Peaks()):
        with pytest.raises(Stop):
            call(pipe, callback_on_step_end=stop_at(0))
        assert torch.equal(call(pipe), expected)
    assert snapshot(pipe) == before


def _stop_with_gradients(module: Any, args: Any) -> None:
    if torch.is_grad_enabled():
        raise Stop


def test_a_scheduler_whose_methods_were_set_keeps_them() -> None:
    pipe = tiny.pipeline()
    expected, steps = guided(pipe, Peaks()), []
    step = pipe.scheduler.step

    def mine(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return step(*args, **kwargs)

    pipe.scheduler.step = mine
    assert torch.equal(guided(pipe, Peaks()), expected)
    assert pipe.scheduler.step is mine
    assert len(steps) == 4
    other = tiny.scheduler("PNDMScheduler")
    with ac.control(pipe, Peaks()):
        pipe.scheduler = other
        call(pipe)
    assert "step" not in vars(other)


def test_disabled_within_a_call() -> None:
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    handle = ac.enable(pipe, Peaks(steps=4))

    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        handle.disable()
        return tensors

    image = call(pipe, callback_on_step_end=callback)
    assert snapshot(pipe) == before
    assert torch.equal(image, guided(pipe, Peaks(steps=1)))


def test_together_with_other_methods() -> None:
    """The guidance pass sees plain attention; the other methods and captures see the moved latents."""
    pipe = double()
    regulation = ac.AttentionRegulation(["bag", "apple"], strength=0.0)
    alone = guided(pipe, Peaks())
    torch.testing.assert_close(guided(pipe, Peaks(), regulation), alone, **EXACT)
    energy = ac.EnergyContext(0.02, 0.03)
    both = guided(pipe, Peaks(), energy)
    assert (both - alone).abs().max() > 0.02
    assert (both - guided(pipe, energy)).abs().max() > 0.02
    torch.testing.assert_close(guided(pipe, Peaks(scale=0.0), energy), guided(pipe, energy), **EXACT)
    with ac.control(pipe, Peaks()), ac.control(pipe, energy), ac.capture(pipe, layers=LAYERS) as maps:
        nested = call(pipe)
    assert torch.equal(nested, both)
    assert {tuple(maps[name].shape) for name in maps} == {(4, 1, tiny.LENGTH, 16, 16)}


def test_two_guidances_move_one_after_the_other() -> None:
    """As two losses, each evaluated where the one before has left the latents."""
    pipe = double()
    first, second = Peaks(steps=1), Peaks(steps=1, layers=["mid_block"], scale=200.0)
    together = guided(pipe, first, second)
    with ac.control(pipe, first), ac.control(pipe, second):
        assert torch.equal(call(pipe), together)
    assert (together - guided(pipe, first)).abs().max() > 0.02
    assert (together - guided(pipe, second)).abs().max() > 0.02


class Broken(Peaks):
    """The first sample's gradient is not finite at the second step."""

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        loss = super().loss(maps, context)
        if context.call.step == 1:
            loss = loss * torch.tensor([torch.inf] + [1.0] * (len(loss) - 1))
        return loss


def test_moves_that_are_not_finite_are_left_out_and_reported() -> None:
    pipe = double()
    method = Broken(layers=ac.by_downsampling(2), steps=2)
    with pytest.warns(RuntimeWarning, match="Broken left out 1 moves"):
        both = guided(pipe, method, prompt=[PROMPT, OTHER], count=2)
    torch.testing.assert_close(both[0], guided(pipe, Peaks(steps=1))[0], **EXACT)
    alone = guided(pipe, Peaks(steps=2), prompt=OTHER, latents=tiny.latents(1, seed=1))
    torch.testing.assert_close(both[1], alone[0], **EXACT)


class Constant(Peaks):
    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return torch.zeros(len(maps))


class Summed(Peaks):
    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return maps.sum()


TWO = ac.by_downsampling(2)
BAD = {
    "no loss": (ac.LatentGuidance(layers=TWO), NotImplementedError, "LatentGuidance has no loss"),
    "a constant": (Constant(layers=TWO), ValueError, "the loss of Constant does not depend on the maps"),
    "one for all": (
        Summed(layers=TWO),
        ValueError,
        r"the loss of Summed is \(\); it must be one number per sample, \[1",
    ),
    "two grids": (Peaks(layers=["mid_block", "up_blocks"]), ValueError, "have different grids"),
    "no such layer": (Peaks(layers=["nowhere"]), ValueError, "'nowhere' matches no layer with text"),
    "no such grid": (Peaks(layers=ac.by_downsampling(8)), ValueError, "no layer with text divides"),
    "late refinement": (
        Peaks(refinement={4: 0.5}),
        ValueError,
        r"refinement names step 4, but the call runs steps 0..3",
    ),
    "schedule": (Peaks(schedule=[1.0, 2.0]), ValueError, "schedule holds 2 numbers, but the call has 4 steps"),
    "unknown word": (ac.AttendAndExcite("zebra", layers=TWO), ValueError, "'zebra', which is not in the prompt"),
    "start of text": (ac.AttendAndExcite(0, layers=TWO), ValueError, "targets holds the token id 0, but"),
    "late threshold": (
        ac.AttendAndExcite("bag", layers=TWO, thresholds={0: 0.5, 9: 0.5}),
        ValueError,
        "thresholds names step 9, but the call runs steps 0..3; leave it out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case: str) -> None:
    pipe = tiny.pipeline()
    method, error, message = BAD[case]
    before, stepped = snapshot(pipe), []
    with pytest.raises(error, match=message):
        guided(pipe, method, callback_on_step_end=lambda *_: stepped.append(1))
    assert not stepped
    assert snapshot(pipe) == before


def test_bad_methods() -> None:
    for arguments, message in (
        ({"scale": -1.0}, "scale is -1.0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"refinement": {-1: 0.5}}, "a step of refinement is -1"),
        ({"refinement": {0: torch.nan}}, r"refinement\[0\] is nan"),
        ({"refinement": [0, 1]}, r"refinement is \[0, 1\]; pass a mapping"),
        ({"max_refinements": 0}, "max_refinements is 0"),
        ({"layers": []}, r"layers is \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Peaks(**arguments)
    for arguments, message in (
        ({"thresholds": {0: 1.5}}, r"thresholds\[0\] is 1.5"),
        ({"refinement": {0: 0.5}}, "AttendAndExcite takes thresholds="),
        ({"sharpness": 0.0}, "sharpness is 0.0"),
        ({"kernel_size": 2}, "kernel_size is 2; it must be odd"),
        ({"sigma": 0.0}, "sigma is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.AttendAndExcite("bag", **arguments)


class NoScheduler:
    pass


def test_a_scheduler_that_cannot_be_followed() -> None:
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    vars(pipe)["scheduler"] = NoScheduler()
    with pytest.raises(ValueError, match="scheduler of StableDiffusionPipeline, NoScheduler, has no step"):
        ac.enable(pipe, Peaks())
    vars(pipe)["scheduler"] = tiny.scheduler()
    assert snapshot(pipe) == before


def test_a_subclass_is_a_value() -> None:
    assert Peaks(steps=3) == Peaks(steps=3)
    assert Peaks().scale == 30.0
    assert Peaks(scale=2).scale == 2
    assert hash(Peaks()) != hash(Peaks(steps=3))
    assert ac.AttendAndExcite.official(["bag"]) == ac.AttendAndExcite(["bag"])
    assert not ac.AttendAndExcite.paper(["bag"]).late_check


def test_a_second_evaluation_at_a_timestep_starts_from_the_moved_latents() -> None:
    """As pipelines do that evaluate the UNet twice in a step: the latents move once."""
    pipe = double()
    latents = tiny.latents().double()
    with ac.control(pipe, Peaks(steps=2)) as handle, torch.no_grad():
        text, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
        handle.begin(prompt=PROMPT, prompt_embeds=text)
        pipe.scheduler.set_timesteps(4)
        for t in pipe.scheduler.timesteps:
            scaled = pipe.scheduler.scale_model_input(latents, t)
            first, noise = (pipe.unet(scaled, t, encoder_hidden_states=text).sample for _ in range(2))
            assert torch.equal(first, noise)
            latents = pipe.scheduler.step(noise, t, latents).prev_sample
    torch.testing.assert_close(latents, guided(pipe, Peaks(steps=2), guidance_scale=1.0), **EXACT)
