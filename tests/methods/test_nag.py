"""NAG on pipelines: equal to the released scheme by hand, with the batch doubled, and what it goes together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.support import tiny, tiny_transformers
from tests.support.doubled import doubled
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.pipelines import KINDS, LAYERS, call, snapshot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NUMBERS = {"scale": 6.0, "tau": 1.5, "alpha": 0.6, "norm": 2}
AWAY = "a red ball"
EXACT = {"rtol": 0, "atol": 1e-9}  # in float64
# Kinds of pipelines, and how they are called; of transformers, how they are built before.
UNETS = [("sd1", {}), full("sdxl", {}), ("sd2", {"guidance_scale": 1.0})]
TRANSFORMERS = [
    ("sd3", {}, {}),
    ("sd3", {"dual": True}, {"guidance_scale": 1.0}),
    ("flux", {}, {}),
    ("flux", {"schnell": True}, {"num_images_per_prompt": 2}),
    ("flux", {}, {"true_cfg_scale": 3.0, "negative_prompt": "a dog"}),
    ("flux2", {}, {}),
    ("pixart_sigma", {}, {}),
    ("sana", {}, {}),
    ("hunyuan", {}, {}),
    full("ltx", {}, {}),
]


def encoded(kind: str, pipe: Any) -> dict[str, Tensor]:
    """The arguments of the model for the negative prompt, by the pipeline's own encoders."""
    with torch.no_grad():
        if kind in ("sd1", "sd2"):
            return {"encoder_hidden_states": pipe.encode_prompt(AWAY, "cpu", 1, False)[0]}
        if kind == "sdxl":
            found = pipe.encode_prompt(AWAY, device="cpu", do_classifier_free_guidance=False)
            return {"encoder_hidden_states": found[0]}
        how: dict[str, Any] = {"device": "cpu", "max_sequence_length": tiny_transformers.T5_LENGTH}
        if kind == "sd3":
            found = pipe.encode_prompt(AWAY, None, None, do_classifier_free_guidance=False, **how)
            return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}
        if kind == "flux":
            found = pipe.encode_prompt(AWAY, None, **how)
            return {"encoder_hidden_states": found[0], "pooled_projections": found[1]}
        if kind == "hunyuan":
            clip = pipe.encode_prompt(AWAY, do_classifier_free_guidance=False)
            t5 = pipe.encode_prompt(
                AWAY, do_classifier_free_guidance=False, max_sequence_length=256, text_encoder_index=1
            )
            return {
                "encoder_hidden_states": clip[0],
                "text_embedding_mask": clip[2],
                "encoder_hidden_states_t5": t5[0],
                "text_embedding_mask_t5": t5[2],
            }
        if kind == "flux2":
            return {"encoder_hidden_states": pipe.encode_prompt(AWAY, text_encoder_out_layers=(0, 1, 2), **how)[0]}
        more: dict[str, Any] = {} if kind == "ltx" else {"clean_caption": False}
        more |= {"complex_human_instruction": tiny_transformers.tiny_text.INSTRUCTION} if kind == "sana" else {}
        found = pipe.encode_prompt(AWAY, do_classifier_free_guidance=False, **how, **more)
        return {"encoder_hidden_states": found[0], "encoder_attention_mask": found[1]}


def by_hand(kind: str, pipe: Any, draw: Any, guided: bool, images: int = 1, turns: int = 1) -> Tensor:
    model = getattr(pipe, "unet", None) or pipe.transformer
    negative = {name: x.repeat_interleave(images, 0) for name, x in encoded(kind, pipe).items()}
    order = {"sd3": "last", "flux": "first", "flux2": "first"}.get(kind, "")
    rows = images * (2 if guided else 1)
    tokens = negative["encoder_hidden_states"].shape[1] + (256 if kind == "hunyuan" else 0)
    with doubled(model, rows, slice(rows - images, rows), tokens, negative, NUMBERS, order, turns):
        return draw()


@pytest.mark.parametrize(("kind", "options"), UNETS)
def test_equals_the_released_scheme_on_a_unet(kind: str, options: dict[str, Any]) -> None:
    pipe = tiny.pipeline(**KINDS[kind][0]).to(torch.float64)
    expected = by_hand(kind, pipe, lambda: call(pipe, **options), options.get("guidance_scale", 7.5) > 1)
    before, plain = snapshot(pipe), call(pipe, **options)
    with ac.control(pipe, ac.NAG(AWAY, **NUMBERS)):
        found = call(pipe, **options)
    torch.testing.assert_close(found, expected, **EXACT)
    assert (found - plain).abs().max() > 1e-2
    assert snapshot(pipe) == before and torch.equal(call(pipe, **options), plain)


def draw(kind: str, pipe: Any, **options: Any) -> Tensor:
    return tiny_transformers.call(kind, pipe, **options)


@pytest.mark.parametrize(("kind", "parts", "options"), TRANSFORMERS)
def test_equals_the_released_scheme_on_a_transformer(kind: str, parts: dict[str, Any], options: dict[str, Any]) -> None:
    pipe = tiny_transformers.pipeline(kind, **parts).to(torch.float64)
    guided = not kind.startswith("flux") and options.get("guidance_scale", 2.0) > 1
    images = options.get("num_images_per_prompt", 1)
    turns = 2 if "true_cfg_scale" in options else 1
    expected = by_hand(kind, pipe, lambda: draw(kind, pipe, **options), guided, images, turns)
    plain, before = draw(kind, pipe, **options), set(_attributes(pipe))
    with ac.control(pipe, ac.NAG(AWAY, **NUMBERS)):
        found = draw(kind, pipe, **options)
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size)
    assert set(_attributes(pipe)) == before and torch.equal(draw(kind, pipe, **options), plain)


def under(kind: str, pipe: Any, *methods: Any, **options: Any) -> Tensor:
    with ac.control(pipe, *methods):
        return call(pipe, **options) if kind in KINDS else draw(kind, pipe, **options)


def built(kind: str) -> Any:
    return tiny.pipeline(**KINDS[kind][0]) if kind in KINDS else tiny_transformers.pipeline(kind)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


EVERY = pytest.mark.parametrize("kind", ["sd1", "sd3", "flux", *map(full, ("flux2", "sdxl", "pixart_sigma", "sana"))])


@EVERY
def test_a_sample_is_itself_in_any_batch(kind: str) -> None:
    """One negative prompt for all, or one each."""
    pipe, prompts, negative = built(kind), ["a bag and an apple", "the red ball"], ["a dog", "a black cat"]

    def noise(*seeds: int) -> dict[str, Any]:
        if kind in KINDS:
            return {"latents": torch.cat([tiny.latents(seed=seed) for seed in seeds])}
        return {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}

    both = under(kind, pipe, ac.NAG(negative, **NUMBERS), prompt=prompts, **noise(3, 4))
    for index, prompt in enumerate(prompts):
        alone = under(kind, pipe, ac.NAG(negative[index], **NUMBERS), prompt=prompt, **noise(3 + index))
        near(both[index : index + 1], alone)
    with pytest.raises(ValueError, match="negative_prompt holds 2 texts, but there are 1 prompts"):
        under(kind, pipe, ac.NAG(negative))


@EVERY
def test_steps_and_layers(kind: str) -> None:
    """Outside of both the model is plain; the negative text still passes through the layers that do not guide."""
    pipe = built(kind)
    plain = call(pipe) if kind in KINDS else draw(kind, pipe)
    for nothing in ({"steps": 0}, {"scale": 1.0}):
        near(under(kind, pipe, ac.NAG(AWAY, **{**NUMBERS, **nothing})), plain)
    first = under(kind, pipe, ac.NAG(AWAY, **NUMBERS, steps=1))
    layers = ["down_blocks.1"] if kind in KINDS else ["transformer_blocks.1"]
    some = under(kind, pipe, ac.NAG(AWAY, **NUMBERS, layers=layers))
    every = under(kind, pipe, ac.NAG(AWAY, **NUMBERS))
    drawn = [plain, first, some, every]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("kind", ["sd1", "sd3", "flux"])
def test_beside_other_methods(kind: str) -> None:
    """The positive attention is what an edit makes of it; maps are those of the model's own attention."""
    pipe, nag = built(kind), ac.NAG(AWAY, **NUMBERS)
    only = {"layers": LAYERS[:1]} if kind in KINDS else {}
    regulation = ac.AttentionRegulation([2, 4], edit_steps=1.0, pin_special=False, steps=2, **only)
    near(
        under(kind, pipe, ac.AttentionRegulation([2, 4], strength=0.0, pin_special=False), nag), under(kind, pipe, nag)
    )
    both = under(kind, pipe, regulation, nag)
    assert not torch.allclose(both, under(kind, pipe, nag), atol=1e-4)
    # A share of nothing leaves what the edit made.
    near(under(kind, pipe, regulation, ac.NAG(AWAY, alpha=0.0)), under(kind, pipe, regulation))
    with ac.control(pipe, nag), ac.capture(pipe) as maps:
        watched = call(pipe) if kind in KINDS else draw(kind, pipe)
    near(watched, under(kind, pipe, nag))
    assert all(torch.isfinite(found).all() for found in maps.values())


@pytest.mark.parametrize("kind", ["sd1", "flux", *map(full, ("sd3", "flux2", "sdxl", "pixart_sigma", "sana"))])
def test_one_graph(kind: str) -> None:
    """For all steps, those behind the last guided one too."""
    pipe, nag = built(kind), ac.NAG(AWAY, **NUMBERS, steps=1)
    expected = under(kind, pipe, nag)
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            near(under(kind, pipe, nag), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_lora_before_and_after(kind: str) -> None:
    from tests.attach.test_transformer_hosts import add_lora

    before, after, nag = built(kind), built(kind), ac.NAG(AWAY, **NUMBERS)
    add_lora(before)
    expected = under(kind, before, nag)
    with ac.control(after, nag):
        assert not torch.allclose(draw(kind, after), expected, atol=1e-3)
        add_lora(after)
        assert torch.equal(draw(kind, after), expected)


def test_a_loop_of_the_users_own() -> None:
    """Which tells the prompt's context alone: the negative prompt gets as many columns."""
    pipe, nag = built("flux"), ac.NAG(AWAY, **NUMBERS)
    given: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    draw("flux", pipe, num_inference_steps=1)
    hook.remove()
    found = []
    hook = pipe.transformer.register_forward_hook(lambda _, args, out: found.append(out[0]))
    under("flux", pipe, nag, num_inference_steps=1)
    with ac.control(pipe, nag) as handle, torch.no_grad():
        told = handle.begin(prompt_embeds=given[0]["encoder_hidden_states"])
        pipe.transformer(**{**given[0], "encoder_hidden_states": told})
        handle.end()
    hook.remove()
    torch.testing.assert_close(found[1], found[0])


def test_an_exception_leaves_no_trace() -> None:
    pipe = built("flux")
    plain, before = draw("flux", pipe), set(_attributes(pipe))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.transformer.single_transformer_blocks[1].proj_out.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        under("flux", pipe, ac.NAG(AWAY))
    hook.remove()
    assert set(_attributes(pipe)) == before and torch.equal(draw("flux", pipe), plain)


def test_bad_input() -> None:
    for given, message in (
        ({"negative_prompt": []}, r"negative_prompt is \[\]; pass a text, or a list of one text per prompt"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"scale": 0.5}, "scale is 0.5; it must be a number at least 1"),
        ({"tau": 0.0}, "tau is 0.0; it must be a number above 0"),
        ({"alpha": 1.5}, "alpha is 1.5; it must be a number at least 0 and at most 1"),
        ({"norm": 3}, "norm is 3; it must be 1"),
        ({"steps": 1.5}, "steps is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.NAG(**{"negative_prompt": AWAY, **given})
    images = {"joint_attention_kwargs": {"ip_adapter_image_embeds": torch.zeros(2, 1, 8)}}
    with pytest.raises(ValueError, match="an IP-Adapter of SD 3 takes the time of every row"):
        under("sd3", built("sd3"), ac.NAG(AWAY), **images)
    with pytest.raises(ValueError, match="has a ChromaTransformer2DModel, but NAG cannot send a second text"):
        ac.enable(built("chroma"), ac.NAG(AWAY))


def _attributes(pipe: Any) -> list[tuple[str, str]]:
    return [(name, key) for name, module in pipe.transformer.named_modules() for key in vars(module)]
