"""What people who do this job have run into: each kind of situation with the right value, or the refusal."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast import methods
from tests.support import tiny
from tests.support.marks import full
from tests.support.pipelines import PROMPT, Peaks, Stop, call, picture, snapshot, stop_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TARGETS = ["bag", "apple"]
LAYERS = ["down_blocks.1", "up_blocks.1"]
EXACT = {"rtol": 0, "atol": 1e-8}  # in float64
MASK = torch.zeros(64, 64)
MASK[16:48, :32] = 1
METHODS: dict[str, Any] = {
    "regulation": ac.AttentionRegulation(TARGETS, layers=LAYERS),
    "energy": ac.EnergyContext(0.02, 0.03),
    "composition": ac.Composition([ac.Edit("a red ball", 0.8, gamma_attn=0.02)]),
    "dense": ac.DenseDiffusion({"bag": MASK, "apple": 1 - MASK}),
    "guidance": ac.AttendAndExcite(TARGETS, layers=LAYERS, thresholds={}),
}
# What the engine does alike for all methods: one that edits attention, and one that moves latents.
TWO_METHODS = [name if name in ("regulation", "guidance") else full(name) for name in METHODS]


def drawn(pipe: Any, *methods: Any, **options: Any) -> torch.Tensor:
    with ac.control(pipe, *methods):
        return call(pipe, **options)


# Weights stored in float8


@pytest.mark.parametrize("method", METHODS)
def test_layerwise_casting(method: str) -> None:
    """The same picture as with weights that were rounded to float8 once."""
    cast, rounded = (tiny.pipeline().to(torch.bfloat16) for _ in range(2))
    cast.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    weights = dict(cast.unet.named_parameters())
    for name, parameter in rounded.unet.named_parameters():
        if weights[name].dtype == torch.float8_e4m3fn:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    plain = call(rounded)
    assert torch.equal(call(cast), plain)
    found = drawn(cast, METHODS[method])
    torch.testing.assert_close(found, drawn(rounded, METHODS[method]), rtol=0, atol=0.1)
    assert (found - plain).abs().max() > 0.3
    assert any(p.dtype == torch.float8_e4m3fn for p in cast.unet.parameters())


# Other libraries' hooks


@pytest.mark.parametrize("method", METHODS)
def test_hooks_find_the_arguments_where_pipelines_put_them(method: str) -> None:
    """In every pass, those of latent guidance too."""
    pipe = tiny.pipeline()
    expected, shapes = drawn(pipe, METHODS[method]), []
    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: shapes.append((args[0].shape[0], args[1].ndim)))
    assert torch.equal(drawn(pipe, METHODS[method]), expected)
    hook.remove()
    assert set(shapes) == ({(2, 0), (1, 0)} if method == "guidance" else {(2, 0)})


# Latents in sigma space, and timesteps that are no training steps

SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_guidance_moves_the_models_input_alike_under_every_scheduler(name: str) -> None:
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl", scheduler=tiny.scheduler(name)).to(torch.float64)
    inputs: list[torch.Tensor] = []
    moves = []
    for scale in (0.0, 20.0):
        inputs.clear()
        hook = pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
        method = ac.AttendAndExcite(TARGETS, layers=LAYERS, scale=scale, thresholds={})
        with pytest.raises(Stop):
            drawn(pipe, method, num_inference_steps=20, callback_on_step_end=stop_at(0))
        hook.remove()
        moves.append(next(x[-1:] for x in inputs if len(x) == 2))
    # DPM-Solver++'s own input at its first step, whose noise is the same.
    assert 0.3 < float((moves[1] - moves[0]).abs().max()) < 3


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("IPNDMScheduler", {}),
    ],
)
def test_dense_diffusion_follows_the_noise_and_not_the_timesteps_number(name: str, config: dict[str, Any]) -> None:
    scheduler = tiny.scheduler(name)
    scheduler = type(scheduler).from_config({**scheduler.config, **config})
    pipe = tiny.pipeline(scheduler=scheduler)
    plain = call(pipe)
    assert (drawn(pipe, METHODS["dense"]) - plain).abs().max() > 1e-3 * plain.abs().max()
    times: list[float] = []

    class Timed(methods.Method):
        def start(self, call: Any, sites: Any) -> Any:
            class Run(methods.Run):
                def before_denoiser(self, evaluation: Any) -> None:
                    times.append(call.time())

            return Run()

    drawn(pipe, Timed(), num_inference_steps=8)
    assert times == sorted(times, reverse=True)
    assert 0.9 < times[0] <= 1 and times[-1] < 0.05


# Other pipelines on the same model


def test_nothing_else_on_the_model_is_edited() -> None:
    """Not after an exception, not after a bare encode_prompt, not by a direct call, not with the very same prompt."""
    import diffusers

    pipe = tiny.pipeline()
    parts = pipe.components | {"scheduler": tiny.scheduler()}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    image = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    for one in (other, image):
        one.set_progress_bar_config(disable=True)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()

    def others() -> list[torch.Tensor]:
        with torch.no_grad():
            direct = pipe.unet(tiny.latents(), 751, encoder_hidden_states=text).sample
        return [call(other), call(other, prompt="a dog"), call(image, image=picture(), strength=0.5), direct]

    plain = others()
    for method in METHODS.values():
        with ac.control(pipe, method), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            edited = call(pipe)
            assert not torch.equal(edited, plain[0])
            with pytest.raises(Stop):
                call(pipe, callback_on_step_end=stop_at(1))
            assert all(torch.equal(a, b) for a, b in zip(others(), plain, strict=True))
            pipe.encode_prompt(PROMPT, "cpu", 1, False)
            assert all(torch.equal(a, b) for a, b in zip(others(), plain, strict=True))
            assert torch.equal(call(pipe), edited)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_two_threads(method: str) -> None:
    """Two pipelines on one model, each under its control, one of them plain: each draws what it draws alone."""
    first = tiny.pipeline()
    second, third = (tiny.pipeline(unet=first.unet) for _ in range(2))
    alone = [drawn(first, METHODS[method]), drawn(second, ac.EnergyContext(0.05, 0.05)), call(third)]
    found: list[Any] = [None] * 3

    def run(index: int, pipe: Any) -> None:
        found[index] = [call(pipe) for _ in range(3)]

    with ac.control(first, METHODS[method]), ac.control(second, ac.EnergyContext(0.05, 0.05)):
        threads = [threading.Thread(target=run, args=(i, pipe)) for i, pipe in enumerate((first, second, third))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for images, expected in zip(found, alone, strict=True):
        assert all(torch.equal(image, expected) for image in images)


# encode_prompt within a call


def test_encode_prompt_in_a_callback_does_not_restart_the_call() -> None:
    """A guidance of two steps runs twice, a capture keeps all steps, and the new text may lack the targets."""
    pipe = tiny.pipeline()
    steps = []

    class Counting(Peaks):
        layers = ac.by_downsampling(2)

        def loss(self, maps: torch.Tensor, context: Any) -> torch.Tensor:
            steps.append(context.call.step)
            return super().loss(maps, context)

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            text, negative = pipe.encode_prompt("the black cat", "cpu", 1, True)
            tensors["prompt_embeds"] = torch.cat([negative, text])
        return tensors

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with ac.capture(pipe, TARGETS) as maps:
        changed = drawn(pipe, Counting(steps=2), ac.AttentionRegulation(TARGETS), num_inference_steps=6, **options)
    assert steps == [0, 1]
    assert {len(maps[name]) for name in maps} == {6}
    assert (
        changed - drawn(pipe, Peaks(steps=2), ac.AttentionRegulation(TARGETS), num_inference_steps=6)
    ).abs().max() > 0
    all_steps = ac.AttentionRegulation(TARGETS, edit_steps=6)
    edited = drawn(pipe, all_steps, num_inference_steps=6, **options)
    early = drawn(pipe, ac.AttentionRegulation(TARGETS, edit_steps=3), num_inference_steps=6, **options)
    assert not torch.equal(edited, early)


# Videos


@pytest.mark.parametrize("kind", ["UNet3DConditionModel", "UNetMotionModel"])
def test_unets_of_videos_are_refused(kind: str) -> None:
    import diffusers

    pipe = tiny.pipeline()
    shape: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
    blocks = {
        "UNet3DConditionModel": ("CrossAttnDownBlock3D", "DownBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"),
        "UNetMotionModel": ("CrossAttnDownBlockMotion", "DownBlockMotion", "UpBlockMotion", "CrossAttnUpBlockMotion"),
    }[kind]
    heads = "motion_num_attention_heads" if kind == "UNetMotionModel" else "attention_head_dim"
    more = {heads: 2} | ({"num_attention_heads": 2} if kind == "UNetMotionModel" else {})
    unet = getattr(diffusers, kind)(down_block_types=blocks[:2], up_block_types=blocks[2:], **shape, **more)
    vars(pipe)["unet"] = unet
    for method in METHODS.values():
        with pytest.raises(ValueError, match=rf"is a {kind}; methods attach to those of images"):
            ac.enable(pipe, method)
    assert "forward" not in vars(unet)


# Nobody told the prompt


def own_text_pipeline() -> Any:
    import diffusers

    class OwnText(diffusers.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, prompt: str) -> torch.Tensor:
            ids = self.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
            text = self.text_encoder(ids)[0]
            latents = tiny.latents()
            self.scheduler.set_timesteps(2)
            for t in self.scheduler.timesteps:
                noise = self.unet(latents, t, encoder_hidden_states=text).sample
                latents = self.scheduler.step(noise, t, latents).prev_sample
            return latents

    return OwnText(**tiny.pipeline().components, requires_safety_checker=False)


def test_a_pipeline_that_encodes_the_text_itself() -> None:
    """Is told once that nothing happens and how to change that; told the prompt, it is controlled."""
    pipe = own_text_pipeline()
    plain = pipe(PROMPT)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    with ac.control(pipe, ac.AttentionRegulation(["no such word"])):
        with pytest.warns(RuntimeWarning, match=r"OwnText did not use encode_prompt.*handle\.begin\(") as told:
            assert torch.equal(pipe(PROMPT), plain)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe(PROMPT)
    with ac.control(pipe, ac.AttentionRegulation(TARGETS)) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.begin(prompt=PROMPT, prompt_embeds=text)
        assert not torch.equal(pipe(PROMPT), plain)
        handle.end()
    handle = ac.enable(pipe, ac.AttentionRegulation(["zebra"]))
    with pytest.raises(ValueError, match="'zebra', which is not in the prompt"):
        handle.begin(prompt=PROMPT, prompt_embeds=text)
    handle.disable()
    assert torch.equal(pipe(PROMPT), plain)


def test_a_loop_that_nobody_told() -> None:
    pipe = tiny.pipeline()
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    with (
        ac.control(pipe, ac.AttentionRegulation(TARGETS)),
        torch.no_grad(),
        pytest.warns(RuntimeWarning, match="the model was called directly.*AttentionRegulation does nothing; tell it"),
    ):
        pipe.unet(tiny.latents(), 751, encoder_hidden_states=text)


class Sampler:
    """A loop in an object that has a scheduler and can be called, as users write them; no pipeline of diffusers."""

    def __init__(self, pipe: Any) -> None:
        self.unet, self.scheduler = pipe.unet, pipe.scheduler

    @torch.no_grad()
    def __call__(self, text: torch.Tensor) -> torch.Tensor:
        latents = tiny.latents().to(text.dtype)
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps:
            noise = self.unet(latents, t, encoder_hidden_states=text).sample
            latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents


@pytest.mark.parametrize("method", METHODS)
def test_a_loop_in_an_object_of_the_users(method: str) -> None:
    """It is told from other pipelines: what it was told is done, and where it was not, it is warned."""
    pipe = tiny.pipeline().to(torch.float64)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    with ac.control(pipe, METHODS[method]) as handle:
        text = handle.begin(prompt=PROMPT, prompt_embeds=text)
        found = Sampler(pipe)(text)
        handle.end()
        with pytest.warns(RuntimeWarning, match="the model was called directly"):
            Sampler(pipe)(text)
    torch.testing.assert_close(found, drawn(pipe, METHODS[method], guidance_scale=1.0), **EXACT)


def test_a_method_that_cannot_start() -> None:
    class Empty(methods.Method):
        pass

    with pytest.raises(ValueError, match=r"Empty has no start\(call, sites\)"):
        ac.enable(tiny.pipeline(), Empty())


def test_what_begin_refuses() -> None:
    pipe = tiny.pipeline()
    handle = ac.enable(pipe, ac.AttentionRegulation([2]))
    for given, message in (
        ({"prompt_embeds": torch.zeros(16, 16)}, r"prompt_embeds has shape \(16, 16\)"),
        ({"prompt_embeds": torch.zeros(3, 16, 16), "prompt": ["a", "b"]}, r"\(3, 16, 16\) for 2 prompts"),
        (
            {"prompt_embeds": torch.zeros(1, 16, 16), "negative_prompt_embeds": torch.zeros(1, 8, 16)},
            "negative_prompt_embeds has shape",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            handle.begin(**given)
    handle.disable()
    with pytest.raises(RuntimeError, match="the control is off"):
        handle.begin(prompt_embeds=torch.zeros(1, 16, 16))


# Copies


@pytest.mark.parametrize("method", TWO_METHODS)
def test_copies_are_not_controlled(method: str) -> None:
    """A deep copy of the pipeline draws plain pictures with parts of its own, as does a pickled UNet."""
    pipe = tiny.pipeline()
    plain = call(pipe)
    with ac.control(pipe, METHODS[method]):
        edited = call(pipe)
        copied = copy.deepcopy(pipe)
        unet = pickle.loads(pickle.dumps(pipe.unet))
        assert torch.equal(call(copied), plain)
        assert torch.equal(call(tiny.pipeline(unet=unet)), plain)
        assert torch.equal(call(pipe), edited)
    assert copied.text_encoder is not pipe.text_encoder
    with torch.no_grad():
        for parameter in copied.unet.parameters():
            parameter.zero_()
    assert torch.equal(call(pipe), plain)
    assert not torch.equal(call(copied), plain)
    del pipe
    gc.collect()
    assert torch.equal(drawn(tiny.pipeline(unet=unet), METHODS[method]), edited)


# Three rows


@pytest.mark.parametrize("method", METHODS)
def test_perturbed_attention_guidance(method: str) -> None:
    pipe = tiny.pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["down_blocks.1"]).to(torch.float64)
    options = {"pag_scale": 2.0}
    plain, before = call(pipe, **options), snapshot(pipe)
    found = drawn(pipe, METHODS[method], **options)
    assert (found - plain).abs().max() > 0.02
    torch.testing.assert_close(
        drawn(pipe, METHODS[method], pag_scale=0.0), drawn(tiny_double(), METHODS[method]), **EXACT
    )
    assert snapshot(pipe)["processors"].keys() == before["processors"].keys()
    assert {type(x).__name__ for x in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}
    torch.testing.assert_close(call(pipe, **options), plain, **EXACT)


def tiny_double() -> Any:
    return tiny.pipeline().to(torch.float64)


@pytest.mark.parametrize(
    "build",
    [
        {"cls": "StableDiffusionPAGPipeline", "pag_applied_layers": ["down_blocks.1"]},
        {"cls": "StableDiffusionXLInstructPix2PixPipeline", "kind": "sdxl", "in_channels": 8},
    ],
    ids=["PAG", "InstructPix2Pix"],
)
def test_composable_diffusion_refuses_three_rows_before_anything_changes(build: dict[str, Any]) -> None:
    pipe = tiny.pipeline(**build)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="has rows of its own beside .*which ComposableDiffusion cannot add up"):
        ac.enable(pipe, ac.ComposableDiffusion(["a dog", "a cat"]))
    assert snapshot(pipe) == before


@pytest.mark.parametrize("method", METHODS)
def test_instruct_pix2pix(method: str) -> None:
    """Its rows are the prompt, the picture alone, and nothing: only the first is conditional."""
    pipe = tiny.pipeline("StableDiffusionXLInstructPix2PixPipeline", "sdxl", in_channels=8).to(torch.float64)
    options = {"image": picture().double(), "height": 64, "width": 64}
    plain = call(pipe, **options)
    seen: list[torch.Tensor] = []
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    hook = pipe.unet.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out))
    call(pipe, **options)
    found = drawn(pipe, METHODS[method], **options)
    hook.remove()
    assert (found - plain).abs().max() > 0.01
    rows = [x for x in seen if len(x) == 3]
    first, edited = rows[0], rows[4]
    if method in ("regulation", "dense", "composition"):
        assert (edited[0] - first[0]).abs().max() > 1e-4
        torch.testing.assert_close(edited[1:], first[1:], rtol=0, atol=1e-4 if method == "composition" else 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_panorama(method: str) -> None:
    """Several views a step, one and two at a time; their order in the batch is not that of other pipelines."""
    pipe = tiny.pipeline("StableDiffusionPanoramaPipeline").to(torch.float64)
    options: dict[str, Any] = {"view_batch_size": 1, "num_inference_steps": 4}
    options |= {"height": 32 * tiny.SCALE, "width": 48 * tiny.SCALE, "latents": tiny.latents(size=(32, 48)).double()}
    pipe.get_views = lambda *args, **kwargs: [(0, 32, 0, 32), (0, 32, 16, 48)]
    plain = call(pipe, **options)
    found = drawn(pipe, METHODS[method], **options)
    assert (found - plain).abs().max() > 0.02
    options["view_batch_size"] = 2
    torch.testing.assert_close(drawn(pipe, METHODS[method], **options), found, rtol=0, atol=1e-6)


# Words and messages


def test_messages() -> None:
    pipe = tiny.pipeline()
    for given, message in (
        ([ac.AttentionRegulation], r"AttentionRegulation is a class; pass an instance, AttentionRegulation\(\.\.\.\)"),
        ([Peaks], "Peaks is a class; pass an instance"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.enable(pipe, *given)
    for layers in (1, 2.0, object()):
        with pytest.raises(ValueError, match="pass name prefixes such as"):
            ac.AttentionRegulation(TARGETS, layers=layers)
    long = "a photo of the red bag and the blue ball of two black cat and an apple"
    with pytest.raises(ValueError, match="'apple', which was cut off: the tokenizer keeps 16 tokens"):
        drawn(pipe, ac.AttentionRegulation(["apple"]), prompt=long)
    with pytest.raises(ValueError, match="guidance_scale above 1"):
        drawn(pipe, ac.ComposableDiffusion(["a dog"]), guidance_scale=1.0)


def test_composable_diffusion_where_the_pipeline_never_guides() -> None:
    """A distilled model is never guided, whatever the scale: the message does not ask for one above 1."""
    pipe = tiny.pipeline(unet=distilled())
    with pytest.raises(ValueError, match="StableDiffusionPipeline does not make them with this model"):
        drawn(pipe, ac.ComposableDiffusion(["a dog"]), guidance_scale=5.0)


def distilled() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**dict(tiny.unet().config) | {"time_cond_proj_dim": 8})


class Remembering(Peaks):
    """Sets attributes of its own where it likes."""

    layers = ac.by_downsampling(2)

    def __init__(self, weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.weight = weight

    def loss(self, maps: torch.Tensor, context: Any) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return self.weight * super().loss(maps, context)


def test_a_guidance_may_keep_attributes_of_its_own() -> None:
    pipe = tiny.pipeline()
    method = Remembering(0.5, steps=2)
    assert torch.equal(drawn(pipe, method), drawn(pipe, Peaks(steps=2, scale=15.0, layers=ac.by_downsampling(2))))
    assert method.calls == 2 and method.weight == 0.5
    with pytest.raises(AttributeError, match="cannot assign to field 'scale'"):
        method.scale = 3.0


# Counting steps


def test_a_share_is_one_of_the_steps_that_run() -> None:
    """Where the pipeline leaves the schedule's end to a refiner as well."""
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl")
    options = {"denoising_end": 0.5, "num_inference_steps": 8}
    counted = [drawn(pipe, ac.AttentionRegulation(TARGETS, edit_steps=n), **options) for n in (2, 4)]
    assert not torch.equal(*counted)
    assert torch.equal(drawn(pipe, ac.AttentionRegulation(TARGETS, edit_steps=0.5), **options), counted[0])
    steps = []

    class Counting(Peaks):
        layers = ac.by_downsampling(2)

        def loss(self, maps: torch.Tensor, context: Any) -> torch.Tensor:
            steps.append((context.call.step, context.call.steps))
            return super().loss(maps, context)

    drawn(pipe, Counting(steps=0.5), **options)
    assert steps == [(0, 4), (1, 4)]


def test_a_disabled_handle_keeps_nothing_alive() -> None:
    pipe = tiny.pipeline()
    handle = ac.enable(pipe, METHODS["regulation"], METHODS["energy"])
    call(pipe)
    handle.disable()
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
    # Nor does one that is gone with its pipeline.
    pipe = tiny.pipeline()
    with ac.control(pipe, METHODS["guidance"]):
        call(pipe)
        unet = weakref.ref(pipe.unet)
        kept = pipe
    del pipe, kept
    gc.collect()
    assert unet() is None


# Text that the model projects


@pytest.mark.parametrize("method", METHODS)
def test_a_unet_that_projects_the_text(method: str) -> None:
    """As Kolors does: the layers' context is not the text encoder's."""
    from diffusers import UNet2DConditionModel

    config = dict(tiny.unet().config) | {
        "encoder_hid_dim": 16,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": 24,
    }
    pipe = tiny.pipeline(unet=UNet2DConditionModel(**config).eval()).to(torch.float64)
    plain = call(pipe)
    assert (drawn(pipe, METHODS[method]) - plain).abs().max() > 1e-5
    nothing = {"energy": ac.EnergyContext(1e-12, 0), "composition": ac.Composition([ac.Edit(PROMPT, 0.5)])}
    if method in nothing:
        torch.testing.assert_close(drawn(pipe, nothing[method]), plain, **EXACT)


# What a callback may do


@pytest.mark.parametrize("method", TWO_METHODS)
def test_other_pipelines_called_by_a_callback(method: str) -> None:
    """A preview by another pipeline on the same UNet is plain, and does not disturb the call it interrupts."""
    import diffusers

    pipe = tiny.pipeline()
    parts = pipe.components | {"scheduler": tiny.scheduler()}
    other = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    plain, expected, previews = call(other), drawn(pipe, METHODS[method]), []

    def preview(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        previews.append(call(other))
        return {}

    assert torch.equal(drawn(pipe, METHODS[method], callback_on_step_end=preview), expected)
    assert len(previews) == 4 and all(torch.equal(one, plain) for one in previews)


def test_a_negative_prompt_that_a_callback_changes_stays_negative() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    regulation = ac.AttentionRegulation(TARGETS, edit_steps=4)

    def change(encode: bool) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                known = negatives if not encode else pipe.encode_prompt("two dog", "cpu", 1, False)[0]
                tensors["prompt_embeds"] = torch.cat([known, tensors["prompt_embeds"][1:]])
            return tensors

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}

    negatives = pipe.encode_prompt("two dog", "cpu", 1, False)[0].detach()
    within = drawn(pipe, regulation, **change(True))
    torch.testing.assert_close(within, drawn(pipe, regulation, **change(False)), **EXACT)


@pytest.mark.parametrize("method", TWO_METHODS)
def test_a_copy_made_within_a_call(method: str) -> None:
    pipe, copies = tiny.pipeline(), []
    plain = call(pipe)

    def copied(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            copies.append(copy.deepcopy(pipe))
        return {}

    drawn(pipe, METHODS[method], callback_on_step_end=copied)
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.zero_()
    assert torch.equal(call(copies[0]), plain)


class Failing(methods.Run):
    def end(self) -> None:
        raise Stop


class EndsBadly(methods.Method):
    def start(self, call: Any, sites: Any) -> methods.Run:
        return Failing()


def test_a_run_that_fails_at_its_end_leaves_nothing_behind() -> None:
    pipe = tiny.pipeline()
    before, plain = snapshot(pipe), call(pipe)
    with pytest.raises(Stop), ac.control(pipe, METHODS["energy"], EndsBadly()):
        call(pipe)
    assert snapshot(pipe) == before
    handle = ac.enable(pipe, METHODS["energy"], EndsBadly())

    def disable(pipe: Any, *_: Any) -> dict[str, Any]:
        handle.disable()
        return {}

    with pytest.raises(Stop):
        call(pipe, callback_on_step_end=disable)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


def test_an_engine_whose_unet_was_replaced_does_not_end_the_new_ones_control() -> None:
    pipe = tiny.pipeline()
    old = ac.enable(pipe, METHODS["energy"])
    pipe.unet = tiny.unet()
    plain = call(tiny.pipeline(unet=pipe.unet, seed=0))
    new = ac.enable(pipe, METHODS["energy"])
    edited = call(pipe)
    old.disable()
    assert torch.equal(call(pipe), edited) and not torch.equal(edited, plain)
    new.disable()


def test_controls_that_nobody_takes_off_die_with_their_pipeline() -> None:
    kept = []
    for begun in (False, True):
        pipe = tiny.pipeline()
        handle = ac.enable(pipe, METHODS["regulation"])
        call(pipe)
        if begun:
            handle.begin(prompt=PROMPT, prompt_embeds=pipe.encode_prompt(PROMPT, "cpu", 1, False)[0])
        unet, kind, own = weakref.ref(pipe.unet), type(pipe), type(pipe).__call__
        del pipe, handle
        gc.collect()
        kept.append(unet())
        assert kind.__call__ is not own
    assert kept == [None, None]


# Batches in other orders


def noise_of(pipe: Any, method: Any, order: list[int], latents: torch.Tensor) -> torch.Tensor:
    """One step of a loop over two prompts, whose rows [negative 0, negative 1, prompt 0, prompt 1] come in this order;
    what the model predicts for each."""
    text, negative = (x.double() for x in pipe.encode_prompt([PROMPT, "a dog and a cat"], "cpu", 1, True))
    rows = torch.cat([negative, text])
    with ac.control(pipe, method) as handle, torch.no_grad():
        handle.begin(prompt=[PROMPT, "a dog and a cat"], prompt_embeds=text, negative_prompt_embeds=negative)
        pipe.scheduler.set_timesteps(4)
        t = pipe.scheduler.timesteps[0]
        pipe.scheduler.scale_model_input(latents, t)
        given = torch.cat([latents] * 2)[order]
        noise = pipe.unet(given, t, encoder_hidden_states=rows[order]).sample
        back = sorted(range(4), key=order.__getitem__)
        handle.end()
        return noise[back]


@pytest.mark.parametrize("method", ["energy", "composition", "guidance"])
@pytest.mark.parametrize("same", [False, True], ids=["own latents", "the same latents"])
def test_interleaved_rows(method: str, same: bool) -> None:
    """[unconditional, conditional] of one sample after the other, as well with latents that two samples share."""
    pipe = tiny.pipeline().to(torch.float64)
    latents = tiny.latents(2).double()
    latents = latents[:1].expand(2, -1, -1, -1) if same else latents
    targets = [["bag"], ["dog", "cat"]]
    chosen = ac.AttendAndExcite(targets, layers=LAYERS, thresholds={}) if method == "guidance" else METHODS[method]
    stacked = noise_of(pipe, chosen, [0, 1, 2, 3], latents)
    torch.testing.assert_close(noise_of(pipe, chosen, [0, 2, 1, 3], latents), stacked, **EXACT)


def test_samples_with_the_same_latents_under_perturbed_attention_guidance() -> None:
    pipe = tiny.pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["down_blocks.1"]).to(torch.float64)
    method = ac.AttendAndExcite([["bag"], ["dog"]], layers=LAYERS, thresholds={})
    prompts = [PROMPT, "a dog and a cat"]
    both = drawn(pipe, method, prompt=prompts, latents=tiny.latents().expand(2, -1, -1, -1), pag_scale=1.0)
    for index, word in enumerate(("bag", "dog")):
        one = ac.AttendAndExcite([word], layers=LAYERS, thresholds={})
        torch.testing.assert_close(both[index], drawn(pipe, one, prompt=prompts[index], pag_scale=1.0)[0], **EXACT)


def test_maps_of_perturbed_attention_guidance_are_those_of_the_plain_rows() -> None:
    pipe = tiny.pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["down_blocks.1"])
    with ac.capture(pipe, [["bag"], ["dog"]]) as maps:
        call(pipe, prompt=[PROMPT, "a dog and a cat"], count=2, pag_scale=1.0)
    assert {tuple(maps[name].shape[:3]) for name in maps} == {(4, 2, 1)}
    assert [set(words) for words in maps.per_word()] == [{"bag"}, {"dog"}]


def test_a_second_evaluation_on_other_latents_is_left_alone() -> None:
    """Self-attention guidance evaluates what it has blurred, at the same timestep."""
    pipe = tiny.pipeline().to(torch.float64)
    text, negative = (x.double() for x in pipe.encode_prompt(PROMPT, "cpu", 1, True))
    latents, other = tiny.latents(2).double().split(1)
    seen: list[torch.Tensor] = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with ac.control(pipe, METHODS["guidance"]) as handle, torch.no_grad():
        handle.begin(prompt=PROMPT, prompt_embeds=text, negative_prompt_embeds=negative)
        pipe.scheduler.set_timesteps(4)
        t = pipe.scheduler.timesteps[0]
        scaled = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
        pipe.unet(scaled, t, encoder_hidden_states=torch.cat([negative, text]))
        pipe.unet(other, t, encoder_hidden_states=negative)
        stepped = pipe.scheduler.step(torch.zeros_like(latents), t, latents).prev_sample
    hook.remove()
    assert torch.equal(seen[-1], other)
    factor = stepped / seen[1][1:]
    torch.testing.assert_close(factor, factor.mean().expand_as(factor), **EXACT)


def test_a_loop_is_given_the_contexts_that_a_method_makes() -> None:
    pipe = tiny.pipeline().to(torch.float64)

    def loop(method: Any) -> torch.Tensor:
        with ac.control(pipe, method) as handle, torch.no_grad():
            text, negative = (x.double() for x in pipe.encode_prompt(PROMPT, "cpu", 1, True))
            text = handle.begin(prompt=PROMPT, prompt_embeds=text, negative_prompt_embeds=negative)
            latents = tiny.latents().double()
            pipe.scheduler.set_timesteps(4)
            for t in pipe.scheduler.timesteps:
                # Fresh tensors, one evaluation each.
                without = pipe.unet(latents, t.clone(), encoder_hidden_states=negative).sample
                noise = pipe.unet(latents, torch.tensor([int(t)]), encoder_hidden_states=text.clone()).sample
                latents = pipe.scheduler.step(without + 7.5 * (noise - without), t, latents).prev_sample
            return latents

    for method in ("regulation", "energy", "composition", "dense"):
        torch.testing.assert_close(loop(METHODS[method]), drawn(pipe, METHODS[method]), **EXACT)


def test_a_pipeline_without_encode_prompt() -> None:
    class Bare:
        """The least that a pipeline is."""

        def __init__(self, pipe: Any) -> None:
            self.unet, self.scheduler, self.tokenizer = pipe.unet, pipe.scheduler, pipe.tokenizer

    pipe = tiny.pipeline()
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    bare = Bare(pipe)
    with ac.control(bare, ac.AttentionRegulation(TARGETS)) as handle, torch.no_grad():
        handle.begin(prompt=PROMPT, prompt_embeds=text)
        bare.scheduler.set_timesteps(4)
        t = bare.scheduler.timesteps[0]
        edited = bare.unet(tiny.latents(), t, encoder_hidden_states=text).sample
        handle.end()
    with torch.no_grad():
        assert (bare.unet(tiny.latents(), t, encoder_hidden_states=text).sample - edited).abs().max() > 0.02
    with (
        ac.control(bare, METHODS["composition"]) as handle,
        pytest.raises(ValueError, match="Bare has no encode_prompt, which encodes edit prompts"),
    ):
        handle.begin(prompt=PROMPT, prompt_embeds=text)
