"""What else lives in a transformer's pipeline under control: adapters, offloading, compilation, backends, own loops."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny_transformers as tiny
from tests.support.graphs import counted_graphs
from tests.support.marks import FULL, full
from tests.support.pipelines import Stop, snapshot, stop_at
from tests.support.tiny_transformers import call

IDS = [1, 3]


class Peaks(ac.LatentGuidance):
    def tokens(self, prompts: Any) -> list[list[int]]:
        return [IDS] * prompts.count

    def loss(self, maps: Tensor, context: Any) -> Tensor:
        return 1 - maps.amax(2).mean(1)


METHODS: dict[str, Any] = {
    # Of many steps a rounding may make another picture.
    "regulation": ac.AttentionRegulation(IDS, edit_steps=1.0, pin_special=False, steps=2),
    "guidance": Peaks(steps=1.0, scale=5.0),
    "regions": ac.DenseDiffusion({1: [[1, 0]] * 2, 3: [[0, 1]] * 2}, edit_steps=1.0),
}
# What is tried of these by default is in `mostly`.
LATER = ("qwen", "auraflow", "cogview4", "flux2", "flux2_klein", "lumina2", "wan", "zimage", "ltx")
DECODERS = ("sana", "qwen", "cogview4", "flux2", "flux2_klein", "lumina2", "zimage")
kinds = pytest.mark.parametrize("kind", [full(kind) if kind in LATER else kind for kind in tiny.KINDS])
methods = pytest.mark.parametrize("method", METHODS)


def mostly(names: Iterable[str], later: bool = False) -> list[Any]:
    """Every kind with every one of these; by default SD 3 and FLUX with all, the others with the first.

    later: so are those that came later.
    """
    first = next(iter(names))

    def kept(kind: str, name: str) -> bool:
        return kind in ("sd3", "flux") or (name == first and (later or kind not in LATER))

    pairs = [(kind, name) for kind in tiny.KINDS for name in names]
    return [pair if kept(*pair) else full(*pair) for pair in pairs]


each = pytest.mark.parametrize(("kind", "method"), mostly(METHODS))


def under(kind: str, pipe: Any, method: str, **options: Any) -> Tensor:
    with ac.control(pipe, METHODS[method]) as handle:
        if kind == "zimage" and "prompt_embeds" in options:
            # Of which its pipeline does not speak.
            handle.begin(**{name: x for name, x in options.items() if name.endswith("_embeds")})
        return call(kind, pipe, **options)


@pytest.mark.parametrize(("kind", "method"), mostly(METHODS, later=True))
def test_no_trace_after_use_exceptions_and_interrupts(kind: str, method: str) -> None:
    pipe = tiny.pipeline(kind)
    plain, before = call(kind, pipe), snapshot(pipe)
    edited = under(kind, pipe, method)
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert snapshot(pipe) == before and torch.equal(call(kind, pipe), plain)
    for error in (Stop, KeyboardInterrupt):
        ends = ("norm_out", "all_final_layer.2-1")
        last = next(module for name, module in pipe.transformer.named_modules() if name in ends)
        hook = last.register_forward_hook(_raising(error))
        with pytest.raises(error), ac.control(pipe, METHODS[method]):
            call(kind, pipe)
        hook.remove()
        assert snapshot(pipe) == before
    assert torch.equal(call(kind, pipe), plain)
    assert torch.equal(under(kind, pipe, method), edited)


def _raising(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


def test_stopped_by_a_callback() -> None:
    pipe = tiny.pipeline("flux")
    plain, before = call("flux", pipe), snapshot(pipe)
    with pytest.raises(Stop), ac.control(pipe, METHODS["regulation"]):
        call("flux", pipe, callback_on_step_end=stop_at(0))
    assert snapshot(pipe) == before and torch.equal(call("flux", pipe), plain)


@kinds
def test_strength_zero_is_plain(kind: str) -> None:
    pipe = tiny.pipeline(kind)
    nothing = (
        ac.AttentionRegulation(IDS, strength=0.0, pin_special=False),
        ac.AttentionRegulation(IDS, edit_steps=0, pin_special=False),
        ac.DenseDiffusion({1: [[1, 0]] * 2}, cross_strength=0.0, self_strength=0.0),
        Peaks(steps=0),
    )
    plain = call(kind, pipe)
    for method in nothing:
        with ac.control(pipe, method):
            assert torch.equal(call(kind, pipe), plain)


@each
def test_a_sample_is_itself_in_any_batch(kind: str, method: str) -> None:
    pipe = tiny.pipeline(kind)
    # Lumina 2's have to be of one length.
    prompts = [tiny.PROMPT, "a photo of a dog" + (" and an apple" if kind == "lumina2" else "")]

    def noise(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = under(kind, pipe, method, prompt=prompts, generator=noise(3, 4))
    for index, prompt in enumerate(prompts):
        alone = under(kind, pipe, method, prompt=prompt, generator=noise(3 + index))
        scale = float(alone.abs().max())
        torch.testing.assert_close(both[index : index + 1], alone, rtol=0, atol=1e-3 * scale)


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)


@pytest.mark.parametrize("kind", ["sd3", "flux", "sana", *map(full, ("wan", "zimage", "ltx"))])
@methods
def test_lora_before_and_after(kind: str, method: str) -> None:
    before, after = tiny.pipeline(kind), tiny.pipeline(kind)
    without = under(kind, before, method)
    add_lora(before)
    expected = under(kind, before, method)
    assert not torch.allclose(expected, without, atol=1e-3)
    with ac.control(after, METHODS[method]):
        assert torch.equal(call(kind, after), without)
        add_lora(after)
        assert torch.equal(call(kind, after), expected)


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart_sigma", *map(full, ("wan", "zimage", "ltx"))])
@methods
def test_offloading(kind: str, method: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.pipeline(kind)
    expected, plain = under(kind, pipe, method), call(kind, pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    before = snapshot(pipe)
    assert torch.equal(under(kind, pipe, method), expected)
    assert snapshot(pipe) == before and torch.equal(call(kind, pipe), plain)


@pytest.mark.parametrize("kind", ["flux", "chroma"])
@methods
def test_another_attention_backend(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are acted on make the call that we take; all others attend by the user's choice."""
    from diffusers.models import attention_dispatch as dispatch

    def elsewhere(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        return ((logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v).transpose(1, 2)

    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, dispatch.AttentionBackendName._NATIVE_MATH, elsewhere)
    # set_attention_backend makes its choice that of every other model too.
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    pipe = tiny.pipeline(kind)
    expected, plain = under(kind, pipe, method), call(kind, pipe)
    atol = 1e-3 * float(plain.abs().max())
    pipe.transformer.set_attention_backend("_native_math")
    before = snapshot(pipe)
    torch.testing.assert_close(under(kind, pipe, method), expected, rtol=0, atol=atol)
    assert snapshot(pipe) == before
    with dispatch.attention_backend("_native_math"):
        torch.testing.assert_close(under(kind, pipe, method), expected, rtol=0, atol=atol)
    torch.testing.assert_close(call(kind, pipe), plain, rtol=0, atol=atol)


# Diffusers names repeated blocks of these alone.
GRAPHS = [
    # Lumina 2 makes lists of lengths, which is no graph.
    *itertools.product([kind for kind in tiny.KINDS if kind != "lumina2"], ["regulation", "regions"], ["wrapped"]),
    *itertools.product(
        ["flux", "chroma", "qwen", "flux2", "wan", "zimage", "ltx"], ["regulation", "regions"], ["blocks"]
    ),
]
BY_DEFAULT = [
    ("sd3", "regulation", "wrapped"),
    ("flux", "regions", "wrapped"),
    ("chroma", "regulation", "blocks"),
]


@pytest.mark.parametrize(("kind", "method", "place"), [row if row in BY_DEFAULT else full(*row) for row in GRAPHS])
def test_one_graph(kind: str, method: str, place: str) -> None:
    pipe = tiny.pipeline(kind)
    expected = under(kind, pipe, method)
    with counted_graphs(pipe, place) as graphs:
        call(kind, pipe)
        plain = len(graphs)
    with counted_graphs(pipe, place) as graphs:
        first = under(kind, pipe, method)
        count = len(graphs)
        torch.testing.assert_close(under(kind, pipe, method), first, rtol=0, atol=0)
    assert count == len(graphs)
    # Evaluations with and without the prompt, and blocks with and without an edit, are different code.
    apart = kind in ("chroma", "cogview4", "flux2_klein", "wan")
    assert count <= plain * (1 + apart + (place == "blocks"))
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


def test_maps_of_a_compiled_model() -> None:
    pipe = tiny.pipeline("flux")
    with ac.capture(pipe) as maps:
        call("flux", pipe)
    expected = maps.mean()
    with counted_graphs(pipe), ac.capture(pipe) as maps:
        call("flux", pipe)
    torch.testing.assert_close(maps.mean(), expected, rtol=0, atol=1e-6)


@kinds
def test_prompt_embeddings(kind: str) -> None:
    """Embeddings in place of a prompt: the same picture, with token ids as targets."""
    pipe = tiny.pipeline(kind)
    given = embeddings(kind, pipe)
    plain = call(kind, pipe)
    atol = 1e-4 * float(plain.abs().max())
    torch.testing.assert_close(call(kind, pipe, prompt=None, **given), plain, rtol=0, atol=atol)
    found = under(kind, pipe, "regulation", prompt=None, **given)
    torch.testing.assert_close(found, under(kind, pipe, "regulation"), rtol=0, atol=atol)
    with ac.control(pipe, ac.AttentionRegulation(["bag"])) as handle, pytest.raises(ValueError, match="token ids"):
        if kind == "zimage":
            for wrong in ([], given["prompt_embeds"][0][None]):
                with pytest.raises(ValueError, match="pass the contexts that the model will be given"):
                    handle.begin(prompt_embeds=wrong)
            handle.begin(**given)
        call(kind, pipe, prompt=None, **given)


def embeddings(kind: str, pipe: Any) -> dict[str, Any]:
    """What a pipeline takes in place of `PROMPT`."""
    length = {"max_sequence_length": tiny.arguments(kind, pipe).get("max_sequence_length")}
    if kind == "sd3":
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, pipe.encode_prompt(tiny.PROMPT, None, None, **length), strict=True))
    if kind == "flux":
        embeds, pooled, _ = pipe.encode_prompt(tiny.PROMPT, None, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    if kind.startswith("flux2"):
        embeds, _ = pipe.encode_prompt(tiny.PROMPT, **length, text_encoder_out_layers=(0, 1, 2))
        return {"prompt_embeds": embeds}
    if kind == "qwen":
        embeds, _ = pipe.encode_prompt(tiny.PROMPT)
        return {"prompt_embeds": embeds}
    if kind in ("cogview4", "wan", "zimage"):
        options = length if kind == "wan" else {}
        return dict(
            zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(tiny.PROMPT, **options), strict=True)
        )
    if kind == "hunyuan":
        found: dict[str, Any] = {}
        for index, end in ((0, ""), (1, "_2")):
            embeds, negative, mask, negative_mask = pipe.encode_prompt(tiny.PROMPT, text_encoder_index=index)
            found |= {f"prompt_embeds{end}": embeds, f"negative_prompt_embeds{end}": negative}
            found |= {f"prompt_attention_mask{end}": mask, f"negative_prompt_attention_mask{end}": negative_mask}
        return found
    known = tiny.arguments(kind, pipe)
    options = {name: known[name] for name in ("clean_caption", "complex_human_instruction") if name in known}
    result = pipe.encode_prompt(tiny.PROMPT, **length, **options)
    if kind == "chroma":
        embeds, _, mask, negative, _, negative_mask = result
    else:
        embeds, mask, negative, negative_mask = result
    return {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        **({"negative_prompt": None} if kind.startswith(("pixart", "sana")) else {}),
    }


@pytest.mark.parametrize(
    ("kind", "cls", "model"),
    [
        ("qwen", "QwenImagePipeline", "QwenImageTransformer2DModel"),
        ("auraflow", "AuraFlowPipeline", "AuraFlowTransformer2DModel"),
        ("cogview4", "CogView4Pipeline", "CogView4Transformer2DModel"),
        ("lumina2", "Lumina2Pipeline", "Lumina2Transformer2DModel"),
        ("zimage", "ZImagePipeline", "ZImageTransformer2DModel"),
        ("flux2", "Flux2Pipeline", "Flux2Transformer2DModel"),
        ("flux", "FluxPipeline", "FluxTransformer2DModel"),
        ("sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel"),
    ],
)
def test_what_an_architecture_rules_out(kind: str, cls: str, model: str) -> None:
    pipe = tiny.pipeline(kind)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=rf"layers of {cls} attend to text and image in one, .* EnergyContext"):
        ac.enable(pipe, ac.EnergyContext(0.1, 0.1))
    with pytest.raises(ValueError, match=rf"{cls} has a {model}, but Composition"):
        ac.enable(pipe, ac.Composition([ac.Edit("a dog", 0.5)]))
    with pytest.raises(ValueError, match=rf"{cls} has a {model}, but ComposableDiffusion"):
        ac.enable(pipe, ac.ComposableDiffusion(["a dog", "a cat"]))
    with pytest.raises(
        ValueError, match=r"'nowhere' matches no layer with text; this model has (\w*transformer_block|layer)s\.0"
    ):
        ac.enable(pipe, ac.AttentionRegulation(IDS, layers=["nowhere"]))
    assert snapshot(pipe) == before


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        ("QwenImageLayeredPipeline", "qwen"),
        ("Flux2KleinKVPipeline", "flux2_klein"),
        ("WanImageToVideoPipeline", "wan"),
        ("LTXImageToVideoPipeline", "ltx"),
        ("LTXConditionPipeline", "ltx"),
        ("LTXI2VLongMultiPromptPipeline", "ltx"),
        ("ZImageOmniPipeline", "zimage"),
        ("ZImageControlNetPipeline", "zimage"),
        ("ZImageControlNetInpaintPipeline", "zimage"),
    ],
)
def test_pipelines_whose_pictures_lie_elsewhere(cls: str, kind: str) -> None:
    pipe = object.__new__(getattr(diffusers, cls))
    vars(pipe)["transformer"] = tiny.pipeline(kind).transformer
    with pytest.raises(ValueError, match=rf"{cls} .*; use another pipeline of "):
        ac.enable(pipe, METHODS["regulation"])


def test_a_model_of_the_later_steps() -> None:
    parts = tiny.pipeline("wan").components
    pipe = tiny.pipeline("wan", parts={"transformer_2": parts["transformer"]})
    with pytest.raises(ValueError, match=r"WanPipeline draws its later steps with .* transformer_2, .*use a pipeline"):
        ac.enable(pipe, METHODS["regulation"])


def test_a_model_that_nobody_knows() -> None:
    pipe = tiny.pipeline("flux")
    parts = {**pipe.components, "transformer": torch.nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"transformer of FluxPipeline is a Linear, .*how one is added"):
        ac.enable(type(pipe)(**parts), METHODS["regulation"])


@pytest.mark.parametrize(
    ("cls", "model", "message"),
    [
        ("LTX2Pipeline", "LTX2VideoTransformer3DModel", "which methods do not attach to; .*LTXVideoTransformer3DModel"),
        ("LTXLatentUpsamplePipeline", None, "has neither a UNet nor a transformer; .*LTXVideoTransformer3DModel"),
    ],
)
def test_other_pipelines_of_ltx(cls: str, model: str | None, message: str) -> None:
    pipe = object.__new__(getattr(diffusers, cls))
    if model is not None:
        vars(pipe)["transformer"] = object.__new__(getattr(diffusers, model))
    with pytest.raises(ValueError, match=f"{cls} .*{message}"):
        ac.enable(pipe, METHODS["regulation"])


def test_a_video_of_unknown_shape() -> None:
    """A loop of the user's own may tell LTX-Video where tokens are by coordinates alone."""
    pipe = tiny.pipeline("ltx")
    given = {"hidden_states": torch.zeros(1, 12, 16), "timestep": torch.ones(1), "video_coords": torch.zeros(1, 3, 12)}
    embeds, given["encoder_attention_mask"], *_ = pipe.encode_prompt(tiny.PROMPT, max_sequence_length=24)
    pipe.scheduler.set_timesteps(sigmas=[1.0], mu=1.0)
    with torch.no_grad():
        plain = pipe.transformer(**given, encoder_hidden_states=embeds).sample
    with ac.control(pipe, METHODS["regions"]) as handle, torch.no_grad():
        given["encoder_hidden_states"] = handle.begin(prompt_embeds=embeds)
        with pytest.raises(ValueError, match=r"LTXVideo.* was called without num_frames.*pass it"):
            pipe.transformer(**given)
        found = pipe.transformer(**given, num_frames=3, height=2, width=2).sample
        handle.end()
    assert not torch.allclose(found, plain, atol=1e-3)


def test_an_older_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that a release does not have yet are no hindrance to those that it has."""
    from attnctl_fast.attach import families

    later = dataclasses.replace(families.UNET, name="later", model="LaterTransformer2DModel", component="transformer")
    assert not hasattr(diffusers, later.model)
    monkeypatch.setattr(families, "FAMILIES", (later, *families.FAMILIES))
    assert families.family_of(tiny.pipeline("flux")).name == "flux"


def test_a_mask_of_the_users_own() -> None:
    """A mask that is another one for every image token would be an edit of its own."""
    pipe = tiny.pipeline("flux")
    mask = torch.ones(1, 1, 88, 88, dtype=torch.bool).tril()
    with ac.control(pipe, METHODS["regulation"]), pytest.raises(ValueError, match="attention mask .* of its own"):
        call("flux", pipe, joint_attention_kwargs={"attention_mask": mask})


def test_a_loop_of_the_users_own() -> None:
    pipe = tiny.pipeline("flux")
    expected = under("flux", pipe, "regulation")
    embeds, pooled, text_ids = pipe.encode_prompt(tiny.PROMPT, None, max_sequence_length=tiny.T5_LENGTH)
    image_ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    # The pipeline has made the schedule.
    pipe.scheduler._step_index = None
    with ac.control(pipe, METHODS["regulation"]) as handle:
        embeds = handle.begin(prompt_embeds=embeds)
        latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
        latents = pipe._pack_latents(latents, 1, 16, 16, 16)
        for timestep in pipe.scheduler.timesteps:
            with torch.no_grad():
                velocity = pipe.transformer(
                    hidden_states=latents,
                    timestep=timestep.expand(1) / 1000,
                    guidance=torch.full([1], 3.5),
                    pooled_projections=pooled,
                    encoder_hidden_states=embeds,
                    txt_ids=text_ids,
                    img_ids=image_ids,
                    return_dict=False,
                )[0]
            latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        handle.end()
    torch.testing.assert_close(latents, expected)


WORDS: dict[str, Any] = {
    "regulation": ac.AttentionRegulation(["bag", "apple"], steps=2),
    "A&E": ac.AttendAndExcite(["bag", "apple"], thresholds={0: 0.9}, max_refinements=1),
    "SynGen": ac.SynGen([("photo", "bag"), ("and", "apple")]),
    "CONFORM": ac.CONFORM([["bag"], ["apple"]], refinement={}),
    "T-SAM": ac.TSAM(refinement={}, scale=2.0),
    "regions": ac.DenseDiffusion({"a bag": [[1, 0]] * 2, "apple": [[0, 1]] * 2}),
}


@pytest.mark.parametrize(("kind", "name"), mostly(WORDS))
def test_words_of_every_encoder(kind: str, name: str) -> None:
    pipe = tiny.pipeline(kind)
    plain, before = call(kind, pipe), snapshot(pipe)
    if kind in DECODERS and name == "T-SAM":
        with ac.control(pipe, WORDS[name]), pytest.raises(ValueError, match="not a CLIP, T5 or Bert text encoder"):
            call(kind, pipe)
        return
    with ac.control(pipe, WORDS[name]):
        found = call(kind, pipe)
    assert found.isfinite().all() and not torch.equal(found, plain)
    assert snapshot(pipe) == before and torch.equal(call(kind, pipe), plain)
    with ac.control(pipe, ac.AttentionRegulation(["dog"])), pytest.raises(ValueError, match="'dog', which is not in"):
        call(kind, pipe)


def float8(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def by_torchao(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def by_bitsandbytes(model: Any) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "attn" in name:
            own = {"bias": module.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, **own)
            made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            made.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.to("cpu"))


@pytest.mark.parametrize("quantise", [float8, full(by_torchao), full(by_bitsandbytes)])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_weights_of_few_bits(kind: str, quantise: Any) -> None:
    """Methods act on what such a model attends with: maps of strength zero are its own, and gradients pass through."""
    pipe = tiny.pipeline(kind)
    quantise(pipe.transformer)
    plain, before = call(kind, pipe), snapshot(pipe)
    with ac.control(pipe, ac.AttentionRegulation(IDS, strength=0.0, pin_special=False)), ac.capture(pipe) as maps:
        torch.testing.assert_close(call(kind, pipe), plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    assert len(maps) and all(one.isfinite().all() for one in maps.values())
    for method in ("regulation", "guidance"):
        assert not torch.allclose(under(kind, pipe, method), plain, atol=1e-3)
    assert snapshot(pipe) == before and torch.equal(call(kind, pipe), plain)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_group_offloading(kind: str) -> None:
    pipe, device = tiny.pipeline(kind), torch.device("cpu")
    expected, plain = under(kind, pipe, "regulation"), call(kind, pipe)
    options: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
    pipe.transformer.enable_group_offload(onload_device=device, offload_device=device, **options)
    assert torch.equal(under(kind, pipe, "regulation"), expected)
    assert torch.equal(call(kind, pipe), plain)
    with pytest.raises(ValueError, match="under group offloading"):
        ac.enable(pipe, METHODS["guidance"])


CACHES: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 10.0},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (0, 2000),
        "current_timestep_callback": lambda: 500,
        "spatial_attention_block_identifiers": ("transformer_blocks",),
    },
    "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 1},
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_leave_out_layers(name: str) -> None:
    """Maps of a layer that was left out are those of the last time; edits act wherever layers run."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    pipe, steps = tiny.pipeline("flux"), 4
    pipe.transformer.enable_cache(getattr(diffusers, name)(**CACHES[name]))
    ran: dict[str, int] = {}
    for layer, module in pipe.transformer.named_modules():
        if layer.endswith(".attn"):
            module.to_q.register_forward_hook(lambda *_, layer=layer: ran.update({layer: ran.get(layer, 0) + 1}))
    plain = call("flux", pipe, num_inference_steps=steps)
    once, before = dict(ran), snapshot(pipe)
    assert min(once.values()) < steps
    with ac.capture(pipe, tokens=IDS) as maps:
        assert torch.equal(call("flux", pipe, num_inference_steps=steps), plain)
    assert {len(maps[layer]) for layer in maps} == {steps}
    for layer in maps:
        assert len({one.sum().item() for one in maps[layer]}) == once[layer]
    with ac.control(pipe, METHODS["regulation"]):
        assert not torch.allclose(call("flux", pipe, num_inference_steps=steps), plain, atol=1e-3)
    assert snapshot(pipe) == before
    for method in (METHODS["guidance"], ac.NAG("a dog")):
        with pytest.raises(ValueError, match=r"has a cache enabled.*disable_cache"):
            ac.enable(pipe, method)
        pipe.transformer.disable_cache()
        with ac.control(pipe, method):
            pipe.transformer.enable_cache(getattr(diffusers, name)(**CACHES[name]))
            with pytest.raises(ValueError, match="has a cache enabled"):
                call("flux", pipe)
    assert torch.equal(call("flux", pipe, num_inference_steps=steps), plain)


def test_a_model_over_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when control is put on, and at the next call where the model is spread later."""
    pipe = tiny.pipeline("flux")
    plain = call("flux", pipe)
    with ac.control(pipe, METHODS["regulation"]), monkeypatch.context() as spread:
        spread.setattr(pipe.transformer, "_parallel_config", object(), raising=False)
        for again in (lambda: ac.enable(pipe, METHODS["guidance"]), lambda: call("flux", pipe)):
            with pytest.raises(ValueError, match="spread over several processes"):
                again()
    assert torch.equal(call("flux", pipe), plain)


def _one_of_two(rank: int, meeting: str) -> None:
    """Refuse control of a model that two processes share, which draws as before."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    pipe = tiny.pipeline("flux")
    plain = call("flux", pipe)
    config = diffusers.ContextParallelConfig(ulysses_degree=2)
    # Diffusers counts accelerators only.
    with mock.patch("torch.accelerator.device_count", lambda: 2):
        pipe.transformer.enable_parallelism(config=config)
    for use in (lambda: ac.enable(pipe, METHODS["regulation"]), lambda: ac.capture(pipe, tokens=IDS).__enter__()):
        with pytest.raises(ValueError, match="spread over several processes"):
            use()
    torch.testing.assert_close(call("flux", pipe), plain)
    torch.distributed.destroy_process_group()


@FULL
def test_two_processes_of_diffusers(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path / "meeting"),), nprocs=2)


def alive() -> int:
    """How many tensors there are."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


@pytest.mark.parametrize(("kind", "turns"), [("sd3", 3), *(full(kind, 25) for kind in tiny.KINDS)])
def test_a_soak(kind: str, turns: int) -> None:
    """Four controls in turn, again and again, leave nothing behind: no tensor, hook or attribute."""
    pipe = tiny.pipeline(kind)
    controls = [*METHODS, None]
    counts, plain, before = [], call(kind, pipe), snapshot(pipe)
    for _ in range(turns):
        for name in controls:
            with ac.capture(pipe, tokens=IDS) if name is None else ac.control(pipe, METHODS[name]):
                call(kind, pipe)
        counts.append(alive())
        assert snapshot(pipe) == before
    assert len(set(counts[1:])) == 1, counts
    assert torch.equal(call(kind, pipe), plain)
