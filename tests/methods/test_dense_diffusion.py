"""DenseDiffusion against processors written from the equations: full logits, masks as maps [M,N], in float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attnctl_fast as ac
from attnctl_fast.attach.layers import unet_layers
from attnctl_fast.methods import dense_diffusion
from tests.support import tiny
from tests.support.graphs import counted_graphs
from tests.support.pipelines import (
    OTHER,
    PROMPT,
    Stop,
    call,
    image_embeddings,
    picture,
    snapshot,
    stop_at,
    with_ip_adapter,
)
from tests.support.touched import touched

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXACT = {"rtol": 0, "atol": 1e-8}
PLACES = {"bag": [2], "an apple": [4, 5]}  # in "a bag and an apple"


def box(top: float, left: float, bottom: float, right: float, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """Ones in a box whose corners are shares of the picture."""
    mask = torch.zeros(size)
    height, width = size
    mask[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return mask


LEFT, RIGHT = box(0.2, 0.0, 0.9, 0.45), box(0.1, 0.5, 0.8, 1.0)
MASKS = {"bag": LEFT, "an apple": RIGHT}
OVERLAPPING = {"bag": box(0.2, 0.0, 0.9, 0.7), "an apple": box(0.1, 0.4, 0.8, 1.0)}


@dataclass
class ByHand:
    """The released code's processors for one prompt: its maps of all layers by number of image tokens."""

    masks: list[torch.Tensor]
    places: list[list[int]]
    latents: tuple[int, int] = (32, 32)
    creg: float = 1.0
    sreg: float = 0.3
    sizereg: float = 1.0
    power: float = 5.0
    edited: int = 1
    covered: bool = False
    guided: bool = True
    timesteps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        masks = F.interpolate(torch.stack(self.masks).double().unsqueeze(1), size=self.latents, mode="nearest")
        self.cross, self.own, self.size = {}, {}, {}
        for level in range(3):
            grid = tuple(-(-side >> level) for side in self.latents)
            flat = F.interpolate(masks, size=grid, mode="nearest").flatten(1)
            cells = flat.shape[1]
            pairs = (flat[:, :, None] * flat[:, None, :]).sum(0)
            text = torch.zeros(cells, tiny.LENGTH, dtype=torch.float64)
            for mask, places in zip(flat, self.places, strict=True):
                text[:, places] = mask[:, None]
            self.cross[cells], self.own[cells] = text > 0, pairs > 0
            area = (pairs > 0).double() if self.covered else pairs
            self.size[cells] = 1 - self.sizereg * area.sum(1, keepdim=True) / cells

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, **_: Any
    ) -> torch.Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        sim = attn.scale * (q @ k.mT)
        if len(self.timesteps) <= self.edited:
            half = sim[len(sim) // 2 if self.guided else 0 :]
            cells = q.shape[2]
            mask = (self.own if encoder_hidden_states is None else self.cross)[cells]
            strength = self.sreg if encoder_hidden_states is None else self.creg
            weight = self.size[cells] * strength * (self.timesteps[-1] / 1000) ** self.power
            low, high = half.min(-1, keepdim=True)[0], half.max(-1, keepdim=True)[0]
            half += mask * weight * (high - half) - ~mask * weight * (half - low)
        out = (sim.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        layers = unet_layers(pipe.unet).values()
        before = [layer.module.processor for layer in layers]

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.timesteps.append(int(args[1]))

        handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
        for layer in layers:
            layer.module.set_processor(self)
        try:
            yield
        finally:
            handle.remove()
            for layer, processor in zip(layers, before, strict=True):
                layer.module.set_processor(processor)


def with_phrases(pipe: Any, texts: list[str], places: list[list[int]]) -> dict[str, Any]:
    """The prompt's embeddings, the phrases' tokens as the text encoder gives them alone."""
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    positive, *rest = pipe.encode_prompt(PROMPT, **how)
    positive = positive.clone()
    for text, where in zip(texts, places, strict=True):
        alone = pipe.encode_prompt(text, **how)[0]
        positive[0, where] = alone[0, 1 : 1 + len(where)]
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {"prompt": None, **dict(zip(names, (positive, *rest), strict=False))}


def exact_pipeline(kind: str = "sd1") -> Any:
    cls = "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"
    return tiny.pipeline(cls, kind).to(torch.float64)


def dense(pipe: Any, masks: Any = MASKS, *, preset: str = "official", method: Any = None, **options: Any) -> Any:
    with ac.control(pipe, getattr(ac.DenseDiffusion, preset)(masks, **(method or {}))):
        return call(pipe, **options)


@pytest.mark.parametrize(
    ("method", "hand"),
    [
        ({}, {}),
        ({"preset": "paper"}, {"covered": True}),
        (
            {"method": {"cross_strength": 1.7, "self_strength": 0.9, "decay": 2.0, "area": 0.5, "edit_steps": 3}},
            {"creg": 1.7, "sreg": 0.9, "power": 2.0, "sizereg": 0.5, "edited": 3},
        ),
        ({"preset": "paper", "method": {"edit_steps": 0.6}}, {"covered": True, "edited": 2}),
        ({"method": {"self_strength": 0.0}}, {"sreg": 0.0}),
        ({"method": {"cross_strength": 0.0}}, {"creg": 0.0}),
    ],
    ids=["official", "paper", "other numbers", "paper, later", "cross alone", "self alone"],
)
@pytest.mark.parametrize(("kind", "masks"), [("sd1", MASKS), ("sd1", OVERLAPPING), ("sdxl", OVERLAPPING)])
def test_equals_the_equations(kind: str, masks: Any, method: dict[str, Any], hand: dict[str, Any]) -> None:
    pipe = exact_pipeline(kind)
    by_hand = ByHand(list(masks.values()), list(PLACES.values()), **hand)
    given = with_phrases(pipe, list(masks), list(PLACES.values()))
    with by_hand.on(pipe):
        expected = call(pipe, **given)
    found = dense(pipe, masks, **method)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - call(pipe)).abs().max() > 1e-3


def test_equals_the_equations_at_other_sizes_without_guidance_and_without_phrases() -> None:
    pipe = exact_pipeline()
    size = (32, 48)
    masks = {"bag": box(0.2, 0.0, 0.9, 0.45, (64, 96)), "an apple": box(0.1, 0.5, 0.8, 1.0, (64, 96))}
    options: dict[str, Any] = {"size": size, "height": 64, "width": 96, "guidance_scale": 1.0}
    by_hand = ByHand(list(masks.values()), list(PLACES.values()), latents=size, guided=False)
    with by_hand.on(pipe):
        expected = call(pipe, **options)
    found = dense(pipe, masks, method={"encode_phrases": False}, **options)
    torch.testing.assert_close(found, expected, **EXACT)


def test_released_settings() -> None:
    method = ac.DenseDiffusion.official(MASKS)
    assert method == ac.DenseDiffusion(MASKS)
    assert (method.cross_strength, method.self_strength, method.edit_steps) == (1.0, 0.3, 0.3)
    assert (method.decay, method.area, method.encode_phrases) == (5.0, 1.0, True)
    paper = ac.DenseDiffusion.paper(MASKS, self_strength=0.5)
    assert (paper.convention, paper.self_strength) == ("paper", 0.5)
    assert len({hash(method), hash(paper)}) == 2
    assert dataclasses.replace(method, decay=1.0).masks == method.masks
    with pytest.raises(AttributeError):
        method.area = 0.5  # type: ignore[misc]


def test_both_conventions_are_the_same_where_the_released_code_runs() -> None:
    """t/T > 0.7 is the first 15 of DDIM's 50 steps, that is 0.3 of them; and the first 6 of 20."""
    for steps in (20, 50):
        scheduler = tiny.scheduler()
        scheduler.set_timesteps(steps)
        assert sum(int(t) / 1000 > 1 - 0.3 for t in scheduler.timesteps) == 0.3 * steps
    pipe = tiny.pipeline()
    images = [dense(pipe, preset=preset, num_inference_steps=20) for preset in ("official", "paper")]
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "img2img"])
def test_strength_zero_is_the_plain_picture(kind: str) -> None:
    options: dict[str, Any] = {"image": picture(), "strength": 0.75} if kind == "img2img" else {}
    cls = {"sdxl": "StableDiffusionXLPipeline", "img2img": "StableDiffusionImg2ImgPipeline"}
    pipe = tiny.pipeline(cls.get(kind, "StableDiffusionPipeline"), "sd1" if kind == "img2img" else kind)
    plain, before = call(pipe, **options), snapshot(pipe)
    edited = dense(pipe, **options)
    assert torch.isfinite(edited).all() and (edited - plain).abs().max() > 1e-3
    assert snapshot(pipe) == before
    for method in ({"cross_strength": 0.0, "self_strength": 0.0}, {"edit_steps": 0}):
        assert torch.equal(dense(pipe, method=method, **options), plain)
    assert torch.equal(dense(pipe, **options), edited)
    assert torch.equal(call(pipe, **options), plain)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_batch_of_different_prompts_equals_each_alone(images: int, guidance: float) -> None:
    pipe = tiny.pipeline().to(torch.float64)
    masks = [MASKS, {"red ball": RIGHT, "dog": LEFT, "black cat": box(0, 0, 0.3, 1)}]
    options: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": "two dog" if guidance > 1 else None}
    batch = {"prompt": [PROMPT, OTHER], "num_images_per_prompt": images, "count": 2 * images} | options
    batch["negative_prompt"] = [batch["negative_prompt"]] * 2 if batch["negative_prompt"] else None
    together = dense(pipe, masks, **batch)
    for index in range(2 * images):
        which = index // images
        one = {"prompt": [PROMPT, OTHER][which], "latents": tiny.latents(1, seed=index)}
        alone = dense(pipe, masks[which], **one, **options)
        torch.testing.assert_close(together[index], alone[0], **EXACT)


def test_one_mapping_serves_every_prompt() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    prompts = [PROMPT, "an apple of the black bag"]
    batch = dense(pipe, MASKS, prompt=prompts, count=2)
    alone = dense(pipe, MASKS, prompt=prompts[1], latents=tiny.latents(1, seed=1))
    torch.testing.assert_close(batch[1], alone[0], **EXACT)


def test_only_conditional_rows_change() -> None:
    """In the first self-attention layer, whose input is that of the plain pipeline."""
    pipe = tiny.pipeline()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    outs: list[torch.Tensor] = []
    handle = pipe.unet.get_submodule(name).register_forward_hook(lambda module, args, out: outs.append(out))
    call(pipe, num_inference_steps=1)
    dense(pipe, method={"decay": 0.0}, num_inference_steps=1)
    handle.remove()
    torch.testing.assert_close(outs[0][0], outs[1][0])
    assert (outs[0][1] - outs[1][1]).abs().max() > 1e-4


def test_masks_of_any_kind_and_size() -> None:
    pipe = tiny.pipeline()
    expected = dense(pipe)
    for changed in (
        {phrase: mask.numpy() for phrase, mask in MASKS.items()},
        {phrase: mask.bool().tolist() for phrase, mask in MASKS.items()},
        {phrase: mask.to(torch.bfloat16) for phrase, mask in MASKS.items()},
        {phrase: np.kron(mask.numpy(), np.ones((4, 4))) for phrase, mask in MASKS.items()},
        {" BAG ": LEFT, "an apple": RIGHT},
        [MASKS],
    ):
        assert torch.equal(dense(pipe, changed), expected)


def test_token_ids_and_the_last_phrase_of_a_token() -> None:
    pipe = tiny.pipeline()
    phrases = dense(pipe, method={"encode_phrases": False})
    assert torch.equal(dense(pipe, {2: LEFT, (4, 5): RIGHT}), phrases)
    assert torch.equal(dense(pipe, {("bag",): LEFT, ("an", "apple"): RIGHT}, method={"encode_phrases": False}), phrases)
    shared = {"an apple": RIGHT, "apple": LEFT}
    plain = {"encode_phrases": False}
    assert torch.equal(dense(pipe, shared, method=plain), dense(pipe, {"an": RIGHT, "apple": LEFT}, method=plain))
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    kept = positive.clone()
    assert torch.equal(dense(pipe, {2: LEFT, (4, 5): RIGHT}, **given), phrases)
    assert torch.equal(positive, kept)
    with pytest.raises(ValueError, match="'bag'.*prompt_embeds.*pass token ids"):
        dense(pipe, **given)


def test_restored_after_an_exception_and_out_of_order() -> None:
    pipe = tiny.pipeline()
    plain, before = call(pipe), snapshot(pipe)
    with pytest.raises(Stop), ac.control(pipe, ac.DenseDiffusion(MASKS)):
        call(pipe, callback_on_step_end=stop_at(0))
    assert snapshot(pipe) == before
    first, second = ac.enable(pipe, ac.DenseDiffusion(MASKS)), ac.enable(pipe, ac.AttentionRegulation(["bag"]))
    first.disable()
    with ac.control(tiny.pipeline(), ac.AttentionRegulation(["bag"])):
        assert not torch.equal(call(pipe), plain)
    second.disable()
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


def test_layers() -> None:
    pipe = tiny.pipeline()
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    method = ac.DenseDiffusion(MASKS)
    names = {name for name, _ in pipe.unet.named_modules() if name.endswith(("attn1", "attn2"))}

    def processed(one: Any) -> set[str]:
        return touched(pipe, one, num_inference_steps=1)

    assert processed(method) == names
    assert processed(dataclasses.replace(method, self_strength=0.0)) == {n for n in names if n.endswith("attn2")}
    assert processed(dataclasses.replace(method, cross_strength=0.0)) == {n for n in names if n.endswith("attn1")}
    assert processed(dataclasses.replace(method, layers=[block])) == {f"{block}.attn1", f"{block}.attn2"}
    assert processed(dataclasses.replace(method, layers=[f"{block}.attn1"])) == {f"{block}.attn1"}
    assert processed(dataclasses.replace(method, layers=ac.by_downsampling(4))) == {
        name for name in names if name.startswith("mid")
    }
    assert processed(ac.AttentionRegulation(["bag"])) <= {name for name in names if name.endswith("attn2")}


def test_together_with_other_methods() -> None:
    pipe = tiny.pipeline()
    regulation = ac.AttentionRegulation(["bag"], layers=["up_blocks.1"])
    both = [ac.DenseDiffusion(MASKS, layers=["down_blocks", "mid_block"]), regulation]
    with ac.control(pipe, *both):
        found = call(pipe)
    with ac.control(pipe, regulation):
        assert not torch.equal(call(pipe), found)
    with pytest.raises(ValueError, match="two of the methods edit up_blocks.1"):
        ac.enable(pipe, ac.DenseDiffusion(MASKS), regulation)
    with ac.control(pipe, ac.DenseDiffusion(MASKS), ac.EnergyContext(0.02, 0.02)):
        assert torch.isfinite(call(pipe)).all()


def test_captured_maps_are_the_edited_ones() -> None:
    """Strongly pulled, a phrase is attended to in its mask and nowhere else."""
    pipe = tiny.pipeline()
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
    method = {"self_strength": 0.0, "decay": 0.0, "area": 0.0, "encode_phrases": False}
    with ac.capture(pipe, ["bag"], layers=[name]) as maps:
        dense(pipe, method=method, num_inference_steps=1)
    found = maps[name][0, 0, 0]
    inside = F.interpolate(LEFT[None, None], size=(16, 16))[0, 0] > 0
    assert found[inside].min() > found[~inside].max() + 0.1


def test_implementations_agree() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    images = []
    for impl in ("eager", "reference"):
        with ac.use(impl):
            images.append(dense(pipe))
    torch.testing.assert_close(images[0], images[1], **EXACT)


def test_kernels_in_a_pipeline() -> None:
    pytest.importorskip("triton")
    pipe = tiny.pipeline()
    how: dict[str, Any] = {"method": {"layers": ["mid_block"], "decay": 0.0}, "num_inference_steps": 1}
    eager = dense(pipe, **how)
    with ac.use("triton"):
        torch.testing.assert_close(dense(pipe, **how), eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny.pipeline()
    how: dict[str, Any] = {"method": {"decay": 0.0}, "num_inference_steps": 1}
    exact = dense(pipe, **how)
    half = dense(pipe.to(dtype), **how)
    assert half.dtype == dtype and torch.isfinite(half).all()
    assert (half - exact).float().norm() / exact.norm() < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "an empty mapping; give every prompt"),
        ([], "masks is list; pass a mapping from phrases to masks"),
        ("bag", "masks is str; pass a mapping"),
        ({"bag": torch.zeros(4, 4)}, r"masks\['bag'\] is empty; give it a 1"),
        ({"bag": torch.full((4, 4), 255)}, r"masks\['bag'\] holds 255; a mask holds 1 where"),
        ({"bag": torch.full((4, 4), torch.nan)}, r"masks\['bag'\] holds nan"),
        ({"bag": torch.ones(1, 4, 4)}, r"masks\['bag'\] has shape \(1, 4, 4\); it must be \[height, width\]"),
        ({"bag": [[1, 0], [1]]}, r"masks\['bag'\] is list; it must be numbers"),
        ({"bag": torch.ones(4, 4), "apple": torch.ones(8, 8)}, r"different sizes \(4x4, 8x8\); draw all"),
        ({" ": torch.ones(4, 4)}, "masks holds ' '; its keys are phrases"),
        ({-1: torch.ones(4, 4)}, "masks holds -1; its keys are phrases"),
        ({(): torch.ones(4, 4)}, r"masks holds \(\); its keys"),
        ({i: torch.ones(2, 2) for i in range(32)}, "32 masks for one prompt; at most 31"),
    ],
)
def test_bad_masks(masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ac.DenseDiffusion(masks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cross_strength": -1.0}, "cross_strength is -1.0; it must be a number at least 0"),
        ({"self_strength": torch.inf}, "self_strength is inf"),
        ({"decay": -1}, "decay is -1"),
        ({"area": 1.5}, "area is 1.5; it must be a number at least 0 and at most 1"),
        ({"edit_steps": 1.5}, "edit_steps is 1.5"),
        ({"convention": "other"}, "convention is 'other'; it must be one of 'official', 'paper'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ac.DenseDiffusion(MASKS, **options)


def test_what_does_not_fit_the_call_is_an_error_before_its_first_step() -> None:
    pipe = tiny.pipeline()
    plain, before = call(pipe), snapshot(pipe)
    steps: list[int] = []

    def count(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        steps.append(index)
        return tensors

    for masks, options, message in (
        ({"dog": LEFT}, {}, "masks holds 'dog', which is not in the prompt 'a bag and an apple', whose tokens are"),
        ({99: LEFT}, {}, "masks holds the token id 99, but the context has tokens 0..15"),
        ([MASKS, MASKS, MASKS], {}, "masks holds 3 mappings, but there are 1 prompts; pass one"),
        ({"bag": torch.ones(64, 96)}, {}, r"masks are 64x96, .* not the proportions .* \(latents 32x32\); draw them"),
    ):
        with pytest.raises(ValueError, match=message):
            dense(pipe, masks, callback_on_step_end=count, **options)
    assert not steps
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        ("DDIMScheduler", "text"),
        ("DDIMScheduler", "image"),
        ("DPMSolverMultistepScheduler", "text"),
        ("EulerDiscreteScheduler", "image"),
        ("PNDMScheduler", "text"),
        ("HeunDiscreteScheduler", "text"),
    ],
)
def test_the_time_is_that_of_every_evaluation(monkeypatch: pytest.MonkeyPatch, scheduler: str, kind: str) -> None:
    cls = "StableDiffusionImg2ImgPipeline" if kind == "image" else "StableDiffusionPipeline"
    pipe = tiny.pipeline(cls, scheduler=tiny.scheduler(scheduler))
    times: list[float] = []
    given: list[float] = []
    prepare = dense_diffusion._Modulating.before_denoiser

    def noted(self: Any, evaluation: Any) -> None:
        times.append(self.call.time())
        prepare(self, evaluation)

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        given.append(float(args[1]) / 1000)

    monkeypatch.setattr(dense_diffusion._Modulating, "before_denoiser", noted)
    handle = pipe.unet.register_forward_pre_hook(hook, with_kwargs=True)
    options: dict[str, Any] = {"image": picture(), "strength": 0.5} if kind == "image" else {}
    method = {"edit_steps": 1.0, "self_strength": 0.0, "layers": ["mid_block"]}
    dense(pipe, method=method, num_inference_steps=6, **options)
    handle.remove()
    assert times == given
    assert len(times) >= 3


def test_ip_adapter_keeps_its_images() -> None:
    pipe = with_ip_adapter(tiny.pipeline())
    before = snapshot(pipe)
    plain, edited = call(pipe, **image_embeddings()), dense(pipe, **image_embeddings())
    pipe.set_ip_adapter_scale(0.0)
    without = dense(pipe, **image_embeddings())
    assert (edited - plain).abs().max() > 1e-3 and (edited - without).abs().max() > 1e-3
    pipe.set_ip_adapter_scale(0.7)
    assert snapshot(pipe) == before


def test_one_graph_serves_all_steps_and_calls() -> None:
    pipe = tiny.pipeline().to(torch.float64)
    expected = dense(pipe)
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            torch.testing.assert_close(dense(pipe), expected, **EXACT)
    assert len(graphs) == 1
