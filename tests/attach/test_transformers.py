"""Methods on transformers: what they see and change, against the models' own attention recomputed by hand."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast import ops
from attnctl_fast.attach.attention import Attention
from attnctl_fast.attach.call import Call, Site
from attnctl_fast.attach.families import family_of
from attnctl_fast.attach.intercept import Place
from attnctl_fast.attach.layers import middle_third
from attnctl_fast.attach.protocol import Edited, Method, Run
from attnctl_fast.methods.attention_regulation import initial_theta
from tests.support import tiny_transformers as tiny
from tests.support.marks import full
from tests.support.recomputed import Layout, attending_by_hand, layout_of

JOINT = ("sd3", *tiny.PACKED, "auraflow", "cogview4", "lumina2", "zimage")
# Kinds whose calls have unconditional and conditional rows in one batch; the others evaluate them one after the other.
STACKED = ("pixart_alpha", "pixart_sigma", "sana", "hunyuan", "sd3", "auraflow", "ltx")
# Texts without a start or an end of their own.
CHATS = ("qwen", "flux2", "flux2_klein", "zimage")
TEXT = {
    "pixart_alpha": 24,
    "pixart_sigma": 24,
    "sana": 24,
    "hunyuan": 77 + 256,
    "sd3": 16 + 24,
    "flux": 24,
    "chroma": 24,
    "auraflow": 24,
    # 2 special tokens and 8, filled up to a multiple of 16.
    "cogview4": 16,
    "flux2": 24,
    "lumina2": 48,
    "flux2_klein": 24,
    # Without padding: 8 tokens, and 5 of the template behind them.
    "qwen": 8 + 5,
    "qwen, two prompts": 5 + 5,
    "wan": 24,
    "ltx": 24,
    # A chat of 13 tokens, and the prompt.
    "zimage": 13 + 8,
    "zimage, two prompts": 13 + 40,
}
# (name, kind, class, options of the pipeline, options of its call)
VARIANTS: list[tuple[str, str, str | None, dict[str, Any], dict[str, Any]]] = [
    *((kind, kind, None, {}, {}) for kind in tiny.KINDS),
    ("sd3 without T5", "sd3", None, {"t5": False}, {}),
    ("sd3.5 medium", "sd3", None, {"dual": True}, {}),
    ("sd3 image to image", "sd3", "StableDiffusion3Img2ImgPipeline", {}, {}),
    ("sd3 inpainting", "sd3", "StableDiffusion3InpaintPipeline", {}, {}),
    ("sd3 ControlNet", "sd3", "StableDiffusion3ControlNetPipeline", {}, {}),
    ("sd3 without guidance", "sd3", None, {}, {"guidance_scale": 1.0}),
    ("flux schnell", "flux", None, {"schnell": True}, {}),
    ("flux true guidance", "flux", None, {}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    ("flux image to image", "flux", "FluxImg2ImgPipeline", {}, {}),
    ("flux inpainting", "flux", "FluxInpaintPipeline", {}, {}),
    ("flux fill", "flux", "FluxFillPipeline", {}, {}),
    ("flux ControlNet", "flux", "FluxControlNetPipeline", {}, {}),
    ("chroma image to image", "chroma", "ChromaImg2ImgPipeline", {}, {}),
    ("qwen true guidance", "qwen", None, {}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    ("qwen image to image", "qwen", "QwenImageImg2ImgPipeline", {}, {}),
    ("qwen inpainting", "qwen", "QwenImageInpaintPipeline", {}, {}),
    ("qwen ControlNet", "qwen", "QwenImageControlNetPipeline", {}, {}),
    ("two prompts", "sd3", None, {}, {"prompt": ["a dog", "a photo of a bag"], "num_images_per_prompt": 2}),
    ("flux, two prompts", "flux", None, {}, {"prompt": ["a dog", "a photo of a bag"], "num_images_per_prompt": 2}),
    ("qwen, two prompts", "qwen", None, {}, {"prompt": ["a dog", "a photo of a bag"], "num_images_per_prompt": 2}),
    ("auraflow, two prompts", "auraflow", None, {}, {"prompt": ["a dog", "a photo of a bag"]}),
    ("cogview4, two prompts", "cogview4", None, {}, {"prompt": ["a dog", "a photo of a bag"]}),
    ("flux2, two prompts", "flux2", None, {}, {"prompt": ["a dog", "a photo of a bag"], "num_images_per_prompt": 2}),
    ("flux2 with a picture", "flux2", None, {}, {"image": tiny.picture_file(64, 128)}),
    ("lumina2, two images", "lumina2", None, {}, {"num_images_per_prompt": 2, "size": (16, 24)}),
    ("flux2, not square", "flux2", None, {}, {"size": (24, 16)}),
    ("qwen, not square", "qwen", None, {}, {"size": (24, 16)}),
    ("sd3, not square", "sd3", None, {}, {"size": (16, 24)}),
    ("flux, not square", "flux", None, {}, {"size": (24, 16)}),
    ("pixart, not square", "pixart_sigma", None, {}, {"size": (16, 24)}),
    (
        "zimage, two prompts",
        "zimage",
        None,
        {},
        {"prompt": ["a dog", "a bag" + " a bag" * 19], "num_images_per_prompt": 2},
    ),
    ("zimage, not square", "zimage", None, {}, {"size": (16, 20), "negative_prompt": "a dog " * 20}),
    ("zimage without guidance", "zimage", None, {}, {"guidance_scale": 0.0}),
    ("zimage image to image", "zimage", "ZImageImg2ImgPipeline", {}, {}),
    ("wan, a time for every token", "wan", None, {"expand": True}, {}),
    ("wan, not square", "wan", None, {}, {"size": (16, 24), "num_videos_per_prompt": 2}),
    ("ltx, not square", "ltx", None, {}, {"size": (8, 12), "num_videos_per_prompt": 2}),
    ("ltx, two prompts", "ltx", None, {}, {"prompt": ["a dog", "a photo of a bag"]}),
    ("ltx without guidance", "ltx", None, {}, {"guidance_scale": 1.0}),
]
LATER = ("ltx", "ltx, two prompts", "ltx without guidance")
# Those that differ in what their models predict, and in how they are evaluated.
CORRECTED = (
    *("pixart_alpha", "sana", "hunyuan", "two prompts", "flux true guidance", "lumina2", "wan", "zimage, not square"),
    "ltx",
)


def each(rows: list[Any]) -> Any:
    return pytest.mark.parametrize(
        "variant", [full(row) if row[0] in LATER else row for row in rows], ids=[row[0] for row in rows]
    )


variants = each(VARIANTS)


class Case:
    """A variant's pipeline, and where the text and the image are in its layers."""

    def __init__(self, variant: tuple[str, str, str | None, dict[str, Any], dict[str, Any]]) -> None:
        name, self.kind, cls, options, self.options = variant
        self.pipe = tiny.pipeline(self.kind, cls, **options)
        height, width = self.options.get("size", tiny.default_size(self.kind))
        patch = 1 if self.kind in ("sana", "ltx") else 2
        self.grid = height // patch, width // patch
        self.frames = (tiny.FRAMES,) if self.kind in tiny.VIDEOS else ()
        prompts = self.options.get("prompt", "one")
        images = self.options.get("num_images_per_prompt", 1) * self.options.get("num_videos_per_prompt", 1)
        self.samples = (1 if isinstance(prompts, str) else len(prompts)) * images
        self.guided = self.kind in STACKED and self.options.get("guidance_scale", 2.0) > 1
        self.tokens = math.prod((*self.frames, *self.grid))
        self.layout = layout_of(self.kind, self.samples, TEXT.get(name, TEXT[self.kind]), self.tokens, self.guided)
        # Of two evaluations a step the first is the prompt's.
        self.turns = (
            2
            if self.kind in ("chroma", "cogview4", "flux2_klein", "lumina2", "wan") or "true_cfg_scale" in self.options
            else 1
        )

    @property
    def model(self) -> Any:
        return self.pipe.transformer

    @property
    def layers(self) -> list[str]:
        """The names of the layers with text, by their modules' names alone."""
        own = {"cogview4": "attn1", "zimage": "attention"}.get(self.kind, "attn") if self.kind in JOINT else "attn2"
        return [
            name
            for name, _ in self.model.named_modules()
            if name.split(".")[-1] == own and ("block" in name or name.startswith("layers."))
        ]

    def draw(self, **options: Any) -> Tensor:
        return tiny.call(self.kind, self.pipe, **{**self.options, **options})

    def draw_by_hand(self, edit: Any, own: str = "") -> Tensor:
        """A picture whose layers with text, or those called `own`, attend by `edit(name, logits, layout)`, in the
        prompt's evaluations."""
        counts: dict[str, int] = {}

        def each(name: str, logits: Tensor) -> Tensor | None:
            if name.split(".")[-1] != own if own else name not in self.layers:
                return None
            turn = counts.get(name, 0)
            counts[name] = turn + 1
            return edit(name, logits, self.layout) if turn % self.turns == 0 else None

        with attending_by_hand(self.model, each):
            return self.draw()


@variants
def test_maps_are_the_models_own_attention(variant: Any) -> None:
    case = Case(variant)
    expected: dict[str, list[Tensor]] = {}

    def look(name: str, logits: Tensor, layout: Layout) -> None:
        found = layout.maps(logits.double().softmax(-1)).unflatten(2, (*case.frames, *case.grid))
        expected.setdefault(name, []).append(found)

    plain = case.draw_by_hand(look)
    with ac.capture(case.pipe) as maps:
        drawn = case.draw()
    assert list(maps) == case.layers == list(expected)
    # Chroma's mask is one for every row, so that its rows are attended to in two calls.
    atol = 1e-5 * float(plain.abs().max()) if case.kind == "chroma" else 0.0
    torch.testing.assert_close(drawn, plain, rtol=0, atol=atol)
    for name, found in maps.items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), torch.stack(expected[name]), rtol=0, atol=2e-5)
        spread = found.std(-1).mean()
        assert spread > 1e-5, "maps that are the same everywhere would hide a wrong grid"
    torch.testing.assert_close(maps.mean(), torch.stack(list(maps.values())).mean((0, 1)))


class Raised(Method):
    """An edit of a user's own: these tokens' logits are raised."""

    layers = None
    edits_attention = True

    def __init__(self, ids: list[int], by: float = 2.0) -> None:
        self.ids, self.by = ids, by

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Raising(self)


class Nothing(Method):
    """A control that only tells the prompt."""

    layers = None

    def start(self, call: Call, sites: list[Site]) -> Run:
        return Run()


class _Raising(Run):
    def __init__(self, method: Raised) -> None:
        self.method = method

    def edit(self, site: Site, attention: Attention) -> Edited:
        q, k, v = attention.q, attention.k, attention.v
        ids = attention.column_ids(torch.tensor(self.method.ids))
        bias = torch.full((*q.shape[:2], len(ids), q.shape[2]), self.method.by)
        out = ops.biased_attention(q, k, v, bias, ids, scale=attention.scale, key_bias=attention.key_bias)

        def probabilities(logits: Tensor, head: int, rows: slice) -> Tensor:
            return logits.index_add(2, ids, bias[:, head, :, rows].mT).softmax(-1)

        return Edited(out, probabilities)


@variants
def test_an_edit_reaches_the_images_rows_and_the_prompts_columns(variant: Any) -> None:
    case = Case(variant)
    ids, shown = [1, 3], []

    def raised(name: str, logits: Tensor, layout: Layout) -> Tensor:
        logits = logits.clone()
        columns = torch.tensor(ids) + layout.text.start
        rows = torch.arange(logits.shape[2])[layout.image]
        for row in range(layout.rows.start, layout.rows.stop):
            logits[row, :, rows[:, None], columns] += 2.0
        shown.append(layout.maps(logits.softmax(-1)).unflatten(2, (*case.frames, *case.grid)))
        return logits.softmax(-1)

    expected, plain = case.draw_by_hand(raised), case.draw()
    with ac.control(case.pipe, Raised(ids)), ac.capture(case.pipe) as maps:
        found = case.draw()
    torch.testing.assert_close(maps[case.layers[0]][0], shown[0], rtol=0, atol=2e-5)
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    assert torch.equal(case.draw(), plain)


class Peaks(ac.LatentGuidance):
    """Tokens 1 and 3 are to be attended to somewhere."""

    def tokens(self, prompts: Any) -> list[list[int]]:
        return [[1, 3]] * prompts.count

    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return peaks(maps)


class Corrected(ac.VelocityGuidance):
    """The same by corrections of the velocity."""

    def tokens(self, prompts: Any) -> list[list[int]]:
        return [[1, 3]] * prompts.count

    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return peaks(maps)


def peaks(maps: Tensor) -> Tensor:
    return 1 - maps.amax(2).mean(1)


def guided_by_hand(case: Case, size: float, velocity: bool = False) -> Tensor:
    """A picture whose latents take a step down the gradient of `peaks` before each evaluation of the prompt.

    velocity: the prediction is corrected instead, as FOCUS does.
    """
    model, layout, latents = case.model, case.layout, {}
    names = [name for name in case.layers if not name.startswith("single")]
    packed, listed = case.kind in (*tiny.PACKED, "ltx"), case.kind == "zimage"
    name_of_sample = "x" if listed else "hidden_states"
    forward, step = model.forward, case.pipe.scheduler.step
    parameters = list(inspect.signature(forward).parameters)
    count = 0

    def with_latents(own: Tensor, given: Tensor) -> Tensor:
        """The model's input with other latents in it: in all rows, but not in what comes behind them."""
        whole, stacked = given.clone(), own.repeat(len(given) // len(own), *[1] * (own.ndim - 1))
        if packed:
            whole[:, : own.shape[1], : own.shape[2]] = stacked
        else:
            whole[:, : own.shape[1]] = stacked
        return whole

    def run(given: dict[str, Any], own: Tensor, sample: Tensor) -> Any:
        whole = with_latents(own, sample)
        return forward(**given | {name_of_sample: list(whole.unsqueeze(2)) if listed else whole})

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        given = dict(zip(parameters, args, strict=False)) | kwargs
        sample, turn, count = given[name_of_sample], count % case.turns, count + 1
        sample = torch.stack(sample).squeeze(2) if listed else sample
        if turn == 0:
            channels = tiny.latent_channels(case.kind) * (4 if case.kind in tiny.PACKED else 1)
            own = sample[layout.rows].narrow(2 if packed else 1, 0, channels)
            own = own[:, : case.tokens] if packed else own
            own, seen = own.detach().clone().requires_grad_(), []

            def look(name: str, logits: Tensor) -> Tensor | None:
                probabilities = logits.softmax(-1)
                if name in names:
                    seen.append(layout.maps(probabilities)[:, [1, 3]])
                return probabilities

            with torch.enable_grad(), attending_by_hand(model, look):
                run(given, own, sample)
                # The loss is of every frame of a video.
                losses = [peaks(maps) for maps in torch.stack(seen).mean(0).chunk(math.prod(case.frames), 2)]
                (gradient,) = torch.autograd.grad(torch.cat(losses).sum(), own)
            latents["moved"] = latents["now"] = own.detach() if velocity else (own - size * gradient).detach()
            latents["added"] = size * gradient
        return run(given, latents["now"], sample)

    @functools.wraps(step)
    def from_there(output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        if velocity:
            share, factor = noise_at(case.pipe.scheduler, timestep)
            output = output + factor * 2 * (share + 1e-3) / (1 - share + 1e-3) * share * latents.pop("added")
        return step(output, timestep, latents.pop("moved").to(sample.dtype), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", evaluate, raising=False)
        patch.setattr(case.pipe.scheduler, "step", from_there, raising=False)
        try:
            return case.draw()
        finally:
            patch.undo()
            vars(model).pop("forward", None)
            vars(case.pipe.scheduler).pop("step", None)


def noise_at(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """The noise of a timestep as a flow's share, and what a correction of velocities is to the prediction there."""
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if kind == "flow_prediction":
        # Timesteps may be rounded.
        return float(scheduler.sigmas[:-1][scheduler.timesteps == timestep][0]), 1.0
    kept = float(scheduler.alphas_cumprod[int(timestep)])
    alpha, sigma = kept**0.5, (1 - kept) ** 0.5
    return sigma / (alpha + sigma), alpha if kind == "epsilon" else 1.0


@variants
def test_guided_latents_are_those_of_plain_autograd(variant: Any) -> None:
    case = Case(variant)
    expected, plain = guided_by_hand(case, 5.0), case.draw()
    with ac.control(case.pipe, Peaks(steps=1.0, scale=5.0, schedule=ac.schedules.constant())):
        found = case.draw()
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-4 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    assert torch.equal(case.draw(), plain)


@each([row for row in VARIANTS if row[0] in CORRECTED])
def test_corrected_velocities_are_those_of_plain_autograd(variant: Any) -> None:
    case = Case(variant)
    plain = case.draw()
    expected = guided_by_hand(case, 0.05, velocity=True)
    with ac.control(case.pipe, Corrected(strength=0.05)):
        found = case.draw()
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-4 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)
    assert torch.equal(case.draw(), plain)


def conditional(layout: Layout, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor, Layout], Tensor]:
    """An edit that makes the probabilities of the prompt's rows and the image's queries of their logits."""

    def edit(name: str, logits: Tensor, _: Layout) -> Tensor:
        probabilities = logits.softmax(-1)
        probabilities[layout.rows, :, layout.image] = change(logits[layout.rows, :, layout.image])
        return probabilities

    return edit


@pytest.mark.parametrize("kind", [*JOINT, "wan", full("ltx")])
def test_regulation_of_joint_attention(kind: str) -> None:
    """The inner loop on statistics taken from the whole matrix of logits; start and end of text put back. Of a video
    every frame has a loop of its own."""
    case = Case((kind, kind, None, {}, {"num_inference_steps": 1}))
    # Small enough on so small a grid that frames do not keep the initial weights, which are the same in all.
    step = 20.0 if kind in tiny.VIDEOS else 100.0
    method = ac.AttentionRegulation(["bag", "apple"], steps=2, step_size=step, edit_steps=1.0)
    words = {
        "zimage": [7, 10],
        "sd3": [5, 16 + 4, 8, 16 + 7],
        "cogview4": [12, 15],
        "flux2": [19, 22],
        "flux2_klein": [7, 10],
        "lumina2": [23, 26],
    }.get(kind, [4, 7])
    others: dict[str, list[int]] = {"sd3": [0, 9, 16 + 8], "cogview4": [6, 7], "lumina2": [0]}
    special = others.get(kind, [] if kind in CHATS else [8])
    chosen = middle_third(
        {name: layer for name, layer in family_of(case.pipe).layers(case.model).items() if layer.cross}
    )
    start = case.layout.text.start
    targets, pinned = (torch.tensor(ids, dtype=torch.int64) + start for ids in (words, special))

    def edit(name: str, logits: Tensor, layout: Layout) -> Tensor:
        if name not in chosen:
            return logits.softmax(-1)

        def change(own: Tensor) -> Tensor:
            return torch.cat([of_frame(one) for one in own.chunk(math.prod(case.frames), 2)], 2)

        def of_frame(own: Tensor) -> Tensor:
            others = own.index_fill(3, targets, -torch.inf)
            at_targets, at_pinned = (own.index_select(3, ids).mT for ids in (targets, pinned))
            nothing = torch.empty(*own.shape[:3], 0)
            stats = ops.TargetStatistics(nothing, others.logsumexp(-1), at_targets, None, at_pinned)
            centres = ops.basis_shape(case.grid, None, "official")
            theta = initial_theta(0, name, 0, own.shape[1], len(targets), centres)[None]
            found = ops.regulate(stats, case.grid, theta=theta, steps=2, step_size=step, previous=theta, ema=0.25)
            edited = own.index_add(3, targets, found.bias.mT).softmax(-1)
            return edited.index_copy(3, pinned, own.softmax(-1).index_select(3, pinned))

        return conditional(layout, change)(name, logits, layout)

    expected, plain = case.draw_by_hand(edit), case.draw()
    with ac.control(case.pipe, method):
        found = case.draw()
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        *((kind, "") for kind in JOINT),
        ("wan", "attn2"),
        ("wan", "attn1"),
        full("ltx", "attn2"),
        full("ltx", "attn1"),
    ],
)
def test_regions_of_joint_attention(kind: str, own: str) -> None:
    """Image rows are pulled towards what shares a mask with them, text and image alike, and away from all else. Of
    cross-attention that is text, of self-attention image; a mask holds in every frame of a video."""
    case = Case((kind, kind, None, {}, {}))
    height, width = case.grid
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    strengths = {"cross_strength": 0.3 * (own == "attn2"), "self_strength": 0.3 * (own != "attn2")}
    method = ac.DenseDiffusion({1: left, 3: 1 - left}, edit_steps=1.0, decay=0.0, area=0.0, **strengths)

    def pulled(logits: Tensor) -> Tensor:
        image = torch.stack([left.flatten(), 1 - left.flatten()], 1).bool().repeat(math.prod(case.frames), 1)
        columns = torch.zeros(logits.shape[3], 2, dtype=torch.bool)
        if own != "attn1":
            columns[case.layout.text.start + torch.tensor([1, 3])] = torch.eye(2).bool()
        if own != "attn2":
            columns[case.layout.image] = image
        shared = (image[:, None] & columns[None]).any(-1)
        real = logits > -1000  # diffusers masks by -10000
        lowest = logits.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
        pull = torch.where(shared, logits.amax(-1, keepdim=True), lowest)
        return torch.where(real, logits.lerp(pull, 0.3), logits).softmax(-1)

    expected, plain = case.draw_by_hand(conditional(case.layout, pulled), own), case.draw()
    with ac.control(case.pipe, method):
        found = case.draw()
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("kind", [kind for kind in STACKED if kind not in JOINT])
def test_contexts_that_move_under_a_mask_of_padding(kind: str) -> None:
    """Each layer reads what the ones before made of the context: of real tokens alone, in all rows."""
    case = Case((kind, kind, None, {}, {}))
    attn, norm = 0.05, 0.04
    moved: dict[str, Tensor] = {}
    queries: dict[str, tuple[Tensor, Tensor]] = {}

    def read(name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            if name == case.layers[0]:
                moved["now"] = kwargs["encoder_hidden_states"]
            return args, {**kwargs, "encoder_hidden_states": moved["now"]}

        return hook

    def edit(name: str, logits: Tensor) -> None:
        if name not in case.layers:
            return
        q, k = queries[name]
        real = logits[:, 0, 0] > -1000  # [R,N]; diffusers masks by -10000
        columns = logits.masked_fill(~real[:, None, None], 0.0).mT.softmax(-1)
        pull, keys = (x.transpose(1, 2).flatten(2) for x in (columns @ q, k))
        share = keys.square().sum(-1).masked_fill(~real, -torch.inf).softmax(-1)
        step = (attn * pull - norm * share[..., None] * keys) @ case.model.get_submodule(name).to_k.weight
        moved["now"] = moved["now"] + step * real[..., None]

    def watch(name: str, q: Tensor, k: Tensor) -> None:
        queries[name] = q, k

    hooks = [
        case.model.get_submodule(name).register_forward_pre_hook(read(name), with_kwargs=True) for name in case.layers
    ]
    with attending_by_hand(case.model, edit, watch):
        expected = case.draw()
    for hook in hooks:
        hook.remove()
    plain = case.draw()
    with ac.control(case.pipe, ac.EnergyContext(attn, norm)):
        found = case.draw()
    size = float(plain.abs().max())
    assert float((expected - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * size)


def test_an_ip_adapter_beside() -> None:
    """A layer's first attention call is joint; those that follow, to the adapter's image, stay as they are."""
    case = Case(("flux", "flux", None, {}, {}))
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, inner = 32, 32
    weights = {
        "image_proj": {"proj.weight": random(4 * width, 8), "proj.bias": random(4 * width)}
        | {f"norm.{name}": random(width) for name in ("weight", "bias")},
        "ip_adapter": {
            f"{layer}.to_{name}_ip.{part}": random(*((inner, width) if part == "weight" else (inner,)))
            for layer in range(2)
            for name in "kv"
            for part in ("weight", "bias")
        },
    }
    without = case.draw()
    case.model._load_ip_adapter_weights([weights])
    image = [random(1, 1, 8)]
    case.options |= {"ip_adapter_image_embeds": image, "negative_ip_adapter_image_embeds": image}
    plain = case.draw()
    assert not torch.allclose(plain, without, atol=1e-2)

    def raised(name: str, logits: Tensor, layout: Layout) -> Tensor:
        logits = logits.clone()
        logits[:, :, layout.image, [1, 3]] += 2.0
        return logits.softmax(-1)

    expected = case.draw_by_hand(raised)
    with ac.control(case.pipe, Raised([1, 3])):
        found = case.draw()
    assert float((expected - plain).abs().max()) > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert torch.equal(case.draw(), plain)


def test_padded_targets() -> None:
    """Prompts with one target and with two, in a batch and each alone."""
    pipe = tiny.pipeline("sd3")
    prompts, targets = ["a photo of a bag and an apple", "a photo of a bag"], [["bag", "apple"], ["bag"]]

    def draw(prompt: Any, words: Any, *seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with ac.control(pipe, ac.AttentionRegulation(words, steps=2)):
            return tiny.call("sd3", pipe, prompt=prompt, generator=generators)

    both = draw(prompts, targets, 3, 4)
    for index in range(2):
        alone = draw(prompts[index], targets[index], 3 + index)
        torch.testing.assert_close(both[index : index + 1], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_rounded_timesteps() -> None:
    """In bfloat16 neighbouring timesteps of FLUX are one number; every step is an evaluation of its own."""
    pipe = tiny.pipeline("flux").to(torch.bfloat16)
    # Sigmas that bfloat16 cannot tell apart.
    sigmas = [1.0, 0.9995, 0.999, 0.5]
    seen: list[int] = []

    class Counted(Method):
        layers = None

        def start(self, call: Call, sites: list[Site]) -> Run:
            return Counting()

    class Counting(Run):
        def before_denoiser(self, evaluation: Any) -> None:
            seen.append(evaluation.call.step)

    with ac.control(pipe, Counted()):
        tiny.call("flux", pipe, sigmas=sigmas, num_inference_steps=len(sigmas))
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["qwen", "flux"])
def test_pictures_behind_the_image(kind: str) -> None:
    """Those of editing pipelines belong neither to the text nor to the image: of a loop of the user's own."""
    pipe, noise = tiny.pipeline(kind), torch.Generator().manual_seed(1)
    embeds = pipe.encode_prompt(
        tiny.PROMPT, **({"prompt_2": None, "max_sequence_length": 24} if kind == "flux" else {})
    )[0]
    text, sample = embeds.shape[1], torch.randn(1, 4 * 6 + 2 * 3, 64, generator=noise)
    given: dict[str, Any] = {"hidden_states": sample, "encoder_hidden_states": embeds, "timestep": torch.ones(1)}
    if kind == "qwen":
        given["img_shapes"] = [[(1, 4, 6), (1, 2, 3)]]
    else:
        ids = [
            torch.cartesian_prod(torch.tensor([i]), torch.arange(h), torch.arange(w))
            for i, h, w in ((0, 4, 6), (1, 2, 3))
        ]
        given |= {"img_ids": torch.cat(ids), "txt_ids": torch.zeros(text, 3), "guidance": torch.ones(1)}
        given["pooled_projections"] = torch.randn(1, 16, generator=noise)
    expected: dict[str, Tensor] = {}

    def look(name: str, logits: Tensor) -> None:
        expected[name] = logits.softmax(-1)[:, :, text : text + 24, :text].mean(1).mT.unflatten(2, (4, 6))

    def raised(name: str, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, :, text : text + 24, 1] += 2.0
        return logits.softmax(-1)

    def evaluate() -> Tensor:
        with torch.no_grad():
            return pipe.transformer(**given, return_dict=False)[0]

    pipe.scheduler.set_timesteps(sigmas=[1.0], mu=1.0)
    with attending_by_hand(pipe.transformer, look):
        plain = evaluate()
    with attending_by_hand(pipe.transformer, raised):
        edited = evaluate()
    with ac.control(pipe, Raised([1])) as handle:
        handle.begin(prompt_embeds=embeds)
        changed = evaluate()
        handle.end()
    with ac.control(pipe, Nothing()) as handle, ac.capture(pipe) as maps:
        handle.begin(prompt_embeds=embeds)
        torch.testing.assert_close(evaluate(), plain, rtol=0, atol=1e-5)
        handle.end()
    for name, found in maps.items():
        torch.testing.assert_close(found[0], expected[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(changed, edited, rtol=0, atol=1e-4)
    assert float((edited - plain).abs().max()) > 1e-3


def test_a_told_negative_prompt_may_be_shorter() -> None:
    pipe = tiny.pipeline("qwen")
    embeds, others = (pipe.encode_prompt(text)[0] for text in (tiny.PROMPT, "a dog"))
    given = {"hidden_states": torch.ones(1, 24, 64), "timestep": torch.ones(1), "img_shapes": [[(1, 4, 6)]]}
    pipe.scheduler.set_timesteps(sigmas=[1.0], mu=1.0)
    with ac.control(pipe, Nothing()) as handle, ac.capture(pipe) as maps, torch.no_grad():
        handle.begin(prompt_embeds=embeds, negative_prompt_embeds=others, prompt=tiny.PROMPT)
        for text in (embeds, others):
            pipe.transformer(encoder_hidden_states=text, **given)
        handle.end()
    assert next(iter(maps.values())).shape == (1, 1, embeds.shape[1], 4, 6)


def test_images_that_stand_behind_prompts_of_different_lengths() -> None:
    pipe = tiny.pipeline("lumina2")
    prompts, noise = ["a photo of a bag", "a dog"], [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    plain = tiny.call("lumina2", pipe, prompt=prompts, generator=noise)
    with ac.control(pipe, Raised([20])), pytest.raises(ValueError, match="have 21, 24 tokens, .*one by one"):
        tiny.call("lumina2", pipe, prompt=prompts)
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(tiny.call("lumina2", pipe, prompt=prompts, generator=noise), plain)
    with ac.control(pipe, Raised([20])):
        assert not torch.equal(tiny.call("lumina2", pipe, prompt=["a cat", "a dog"]), plain)
    # Negative prompts may have any.
    with ac.control(pipe, Raised([20])):
        tiny.call("lumina2", pipe, prompt=["a cat", "a dog"], negative_prompt=["a", "a photo of"])


FEW: dict[str, Method] = {
    "regulation": ac.AttentionRegulation(["bag"], steps=2, edit_steps=1.0, pin_special=False),
    "guidance": Peaks(steps=1.0, scale=5.0),
    "velocity": Corrected(strength=0.05),
    "regions": ac.DenseDiffusion({"bag": [[1, 0]] * 2}, edit_steps=1.0),
    "sharper": ac.TACA(1.5),
}


@pytest.mark.parametrize("name", FEW)
def test_layers_that_attend_with_fewer_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers repeats Lumina 2's keys and values for every head; a layer that does not is the same."""
    case = Case(("lumina2", "lumina2", None, {}, {}))

    def draw() -> tuple[Tensor, Tensor]:
        with ac.control(case.pipe, FEW[name]), ac.capture(case.pipe) as maps:
            return case.draw(), maps.mean()

    expected, attend = draw(), Place.attend
    seen = []

    def with_fewer(place: Place, acts: Any, tokens: Any, moved: bool, *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        seen.append(given["key"].shape[1])
        few = {x: given[x][:, ::2] for x in ("key", "value")}
        return attend(place, acts, tokens, moved, **given | few | {"enable_gqa": True})

    monkeypatch.setattr(Place, "attend", with_fewer)
    found, plain = draw(), case.draw()
    assert set(seen) == {2}
    scale = float(plain.abs().max())
    assert not torch.allclose(found[0], plain, atol=1e-3)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["wan", full("ltx")])
def test_a_mask_that_moves_contexts_holds_in_every_frame(kind: str) -> None:
    case = Case((kind, kind, None, {}, {}))

    def draw(mask: Tensor | None) -> Tensor:
        with ac.control(case.pipe, ac.EnergyContext(0.05, 0.05, mask=mask)):
            return case.draw()

    whole, half = torch.ones(16, 16), torch.ones(16, 16).tril()
    assert torch.equal(draw(whole), draw(None)) and not torch.allclose(draw(half), draw(None), atol=1e-3)


def test_prompts_in_lists() -> None:
    """Z-Image writes its chats into the list that it was given, and stacks the prompts' rows first."""
    pipe, seen = tiny.pipeline("zimage"), []

    class Watched(Nothing):
        def start(self, call: Call, sites: list[Site]) -> Run:
            return Watching()

    class Watching(Run):
        def before_denoiser(self, evaluation: Any) -> None:
            seen.append((evaluation.rows.conditional, evaluation.rows.samples, evaluation.sample.shape))

        def after_denoiser(self, output: Tensor) -> Tensor:
            assert output.shape == (4, 16, 16, 16)
            return output

    prompts = ["a photo of a dog", "two dog"]
    with ac.control(pipe, Watched()), ac.capture(pipe, tokens=["dog"]) as maps:
        tiny.call("zimage", pipe, prompt=prompts, negative_prompt=prompts)
    assert maps.token_ids == [[7], [4]]
    assert seen == [((0, 1), (0, 1), (4, 16, 16, 16))] * 2


def test_a_negative_prompt_that_is_the_prompt() -> None:
    """Evaluated by itself it is no evaluation of the prompt, although it says the same."""
    pipe = tiny.pipeline("flux")
    with ac.capture(pipe, tokens=[1]) as maps:
        tiny.call("flux", pipe, true_cfg_scale=2.0, negative_prompt=tiny.PROMPT)
    assert next(iter(maps.values())).shape[0] == 2


def test_perturbed_joint_attention_is_refused() -> None:
    import diffusers

    parts = tiny.pipeline("sd3").components
    for name in ("image_encoder", "feature_extractor"):
        parts.pop(name)
    pipe = diffusers.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    with pytest.raises(ValueError, match="StableDiffusion3PAGPipeline perturbs joint attention"):
        ac.enable(pipe, Raised([1]))
