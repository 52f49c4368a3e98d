"""Regions on pipelines: equal to the released scheme by hand, and what they go together with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from tests.attach.test_transformer_hosts import add_lora
from tests.support import tiny, tiny_transformers
from tests.support.graphs import counted_graphs
from tests.support.marks import full
from tests.support.regional import regional

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def a_mask(top: int, bottom: int, left: int, right: int, side: int = 16) -> Tensor:
    mask = torch.zeros(side, side)
    mask[top:bottom, left:right] = 1
    return mask


# Two that overlap and leave cells free.
MASKS = {"a red ball": a_mask(0, 12, 0, 10), "two dog": a_mask(4, 16, 6, 12)}


def on_grid(masks: Any) -> Tensor:
    return torch.stack([mask[::2, ::2].flatten() > 0 for mask in masks])


def draw(kind: str, pipe: Any, **options: Any) -> Tensor:
    return tiny_transformers.call(kind, pipe, **options)


def under(kind: str, pipe: Any, *methods: Any, **options: Any) -> Tensor:
    with ac.control(pipe, *methods):
        return draw(kind, pipe, **options)


def encoded(kind: str, pipe: Any, texts: list[str]) -> Tensor:
    how: dict[str, Any] = {"device": "cpu", "max_sequence_length": tiny_transformers.T5_LENGTH}
    with torch.no_grad():
        if kind == "sd3":
            return pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False, **how)[0]
        if kind == "flux2":
            return pipe.encode_prompt(texts, text_encoder_out_layers=(0, 1, 2), **how)[0]
        return pipe.encode_prompt(texts, None, **how)[0]


def by_hand(kind: str, pipe: Any, masks: Any, rows: int, steps: int, numbers: dict[str, Any], **options: Any) -> Tensor:
    contexts = encoded(kind, pipe, list(masks))
    images = options.get("num_images_per_prompt", 1)
    numbers = {"isolated": True, "every": 1, "doubles": len(pipe.transformer.transformer_blocks), **numbers}
    given = [contexts.expand(images, -1, -1, -1), [on_grid(masks.values())] * images, numbers]
    order = "last" if kind == "sd3" else "first"
    with regional(pipe.transformer, rows, slice(rows - images, rows), *given, order, steps):
        return draw(kind, pipe, **options)


CASES = [
    ("sd3", {}, {}, {"base": 0.2}, {"steps": 2}),
    ("sd3", {"dual": True}, {"guidance_scale": 1.0}, {"isolated": False, "base": 0.3}, {"steps": 1.0}),
    ("sd3", {}, {"num_images_per_prompt": 2}, {"every": 2, "base": 0.1}, {"steps": 2}),
    ("flux", {}, {}, {"base": 0.2}, {"steps": 2}),
    ("flux2", {}, {}, {"base": 0.2}, {"steps": 1}),
    (
        "flux",
        {"schnell": True},
        {"num_images_per_prompt": 2},
        {"every": 2, "isolated": False, "base": 0.0},
        {"steps": 1.0},
    ),
]


@pytest.mark.parametrize(("kind", "parts", "options", "numbers", "steps"), CASES)
def test_equals_the_released_scheme(
    kind: str, parts: dict[str, Any], options: dict[str, Any], numbers: dict[str, Any], steps: dict[str, Any]
) -> None:
    pipe = tiny_transformers.pipeline(kind, **parts).to(torch.float64)
    plain = draw(kind, pipe, **options)
    rows = options.get("num_images_per_prompt", 1) * (2 if kind == "sd3" and "guidance_scale" not in options else 1)
    count = steps["steps"] if isinstance(steps["steps"], int) else 100
    expected = by_hand(kind, pipe, MASKS, rows, count, numbers, **options)
    found = under(kind, pipe, ac.Regions(MASKS, **numbers, **steps), **options)
    size = float(plain.abs().max())
    assert float((found - plain).abs().max()) > 1e-3 * size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * size)
    assert torch.equal(draw(kind, pipe, **options), plain)


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


KIND = pytest.mark.parametrize("kind", ["sd3", "flux"])


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    """One for all tests: what a method does not put back, the next test sees."""
    return {kind: tiny_transformers.pipeline(kind) for kind in ("sd3", "flux")}


@KIND
def test_a_sample_is_itself_in_any_batch(kind: str, pipes: dict[str, Any]) -> None:
    """With regions of its own, more or fewer than another's, or with the same for all."""
    pipe, prompts = pipes[kind], ["a bag and an apple", "the red ball"]
    masks = [MASKS, {"black cat": a_mask(2, 9, 3, 16)}]
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = under(kind, pipe, ac.Regions(masks), prompt=prompts, generator=seeds)
    for index, prompt in enumerate(prompts):
        seed = torch.Generator().manual_seed(3 + index)
        near(both[index : index + 1], under(kind, pipe, ac.Regions(masks[index]), prompt=prompt, generator=seed))
    seeds = [torch.Generator().manual_seed(3) for _ in prompts]
    shared = under(kind, pipe, ac.Regions(MASKS), prompt=[prompts[0]] * 2, generator=seeds)
    near(shared, both[:1].expand_as(shared))
    with pytest.raises(ValueError, match="masks holds 2 mappings, but there are 1 prompts"):
        under(kind, pipe, ac.Regions(masks))


@KIND
def test_where_there_is_nothing_to_do(kind: str, pipes: dict[str, Any]) -> None:
    pipe = pipes[kind]
    plain = draw(kind, pipe)
    for how in ({"base": 1.0}, {"steps": 0}):
        assert torch.equal(under(kind, pipe, ac.Regions(MASKS, **how)), plain)


@KIND
def test_the_background_is_a_region(kind: str, pipes: dict[str, Any]) -> None:
    pipe, free = pipes[kind], 1 - torch.stack(list(MASKS.values())).amax(0)
    found = under(kind, pipe, ac.Regions(MASKS, background="black cat"))
    near(found, under(kind, pipe, ac.Regions({**MASKS, "black cat": free})))
    assert not torch.allclose(found, under(kind, pipe, ac.Regions(MASKS)), atol=1e-3)


@KIND
def test_every_other_block_is_a_choice_of_layers(kind: str, pipes: dict[str, Any]) -> None:
    """Counted anew among the blocks of one stream."""
    pipe, layers = pipes[kind], {"sd3": ["transformer_blocks.0", "transformer_blocks.2"]}
    chosen = layers.get(kind, ["transformer_blocks.0", "single_transformer_blocks.0"])
    found = under(kind, pipe, ac.Regions(MASKS, every=2, steps=2))
    assert torch.equal(found, under(kind, pipe, ac.Regions(MASKS, layers=chosen, steps=2)))
    assert not torch.allclose(found, under(kind, pipe, ac.Regions(MASKS, steps=2)), atol=1e-3)


@KIND
def test_masks_of_any_size_and_pictures_that_are_no_squares(kind: str, pipes: dict[str, Any]) -> None:
    pipe = pipes[kind]
    small = {text: mask[::2, ::2].tolist() for text, mask in MASKS.items()}
    large = {text: mask.repeat_interleave(3, 0).repeat_interleave(3, 1).numpy() for text, mask in MASKS.items()}
    expected = under(kind, pipe, ac.Regions(MASKS))
    for masks in (small, large):
        assert torch.equal(under(kind, pipe, ac.Regions(masks)), expected)
    wide = {text: mask[:8] for text, mask in MASKS.items()}
    assert under(kind, pipe, ac.Regions(wide), size=(8, 16)).isfinite().all()
    with pytest.raises(ValueError, match="masks are 8x16, which has not the proportions of the picture"):
        under(kind, pipe, ac.Regions(wide))


@KIND
def test_beside_other_methods(kind: str, pipes: dict[str, Any]) -> None:
    """The attention to the prompt is what an edit makes of it; maps and losses are those of the prompt alone."""
    pipe, regions = pipes[kind], ac.Regions(MASKS, base=0.5)
    regulation = ac.AttentionRegulation([2, 4], edit_steps=1.0, pin_special=False, steps=2)
    weak = ac.AttentionRegulation([2, 4], strength=0.0, pin_special=False)
    alone = under(kind, pipe, regions)
    near(under(kind, pipe, weak, regions), alone)
    both = under(kind, pipe, regulation, regions)
    assert not torch.allclose(both, alone, atol=1e-4)
    assert not torch.allclose(both, under(kind, pipe, regulation), atol=1e-4)
    with ac.control(pipe, regions), ac.capture(pipe) as maps:
        watched = draw(kind, pipe)
    near(watched, alone)
    assert all(torch.isfinite(found).all() for found in maps.values())
    guidance = ac.AttendAndExcite([2, 4], steps=1, thresholds={}, scale=40.0)
    assert not torch.allclose(under(kind, pipe, guidance, regions), alone, atol=1e-4)


@pytest.mark.parametrize("kind", [full("sd3"), "flux"])
def test_one_graph(kind: str, pipes: dict[str, Any]) -> None:
    """For all steps, those behind the last one with regions too, and for other masks."""
    pipe, methods = (
        pipes[kind],
        [ac.Regions(MASKS, steps=1), ac.Regions({"a": MASKS["two dog"], "b": 1 - MASKS["two dog"]})],
    )
    expected = [under(kind, pipe, one) for one in methods]
    with counted_graphs(pipe) as graphs:
        for one, drawn in zip(methods, expected, strict=True):
            near(under(kind, pipe, one), drawn)
    assert len(graphs) == 1


@KIND
def test_lora_before_and_after(kind: str) -> None:
    before, after = (tiny_transformers.pipeline(kind) for _ in range(2))
    regions = ac.Regions(MASKS)
    add_lora(before)
    expected = under(kind, before, regions)
    with ac.control(after, regions):
        assert not torch.allclose(draw(kind, after), expected, atol=1e-3)
        add_lora(after)
        assert torch.equal(draw(kind, after), expected)


def test_a_loop_of_the_users_own(pipes: dict[str, Any]) -> None:
    pipe, regions = pipes["flux"], ac.Regions(MASKS)
    given: list[dict[str, Any]] = []
    found: list[Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    draw("flux", pipe, num_inference_steps=1)
    hook.remove()
    hook = pipe.transformer.register_forward_hook(lambda _, args, out: found.append(out[0]))
    under("flux", pipe, regions, num_inference_steps=1)
    with ac.control(pipe, regions) as handle, torch.no_grad():
        told = handle.begin(prompt_embeds=given[0]["encoder_hidden_states"])
        pipe.transformer(**{**given[0], "encoder_hidden_states": told})
        handle.end()
    hook.remove()
    torch.testing.assert_close(found[1], found[0])


def attributes(pipe: Any) -> set[tuple[str, str]]:
    return {(name, key) for name, module in pipe.transformer.named_modules() for key in vars(module)}


@KIND
def test_nothing_stays_behind(kind: str, pipes: dict[str, Any]) -> None:
    pipe = pipes[kind]
    plain, before = draw(kind, pipe), attributes(pipe)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.transformer.norm_out.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        under(kind, pipe, ac.Regions(MASKS))
    hook.remove()
    under(kind, pipe, ac.Regions(MASKS))
    assert attributes(pipe) == before and torch.equal(draw(kind, pipe), plain)


def test_a_picture_to_look_at_has_no_region() -> None:
    pipe = tiny_transformers.pipeline("flux", "FluxKontextPipeline")
    how = {"image": tiny_transformers.picture(32, 32), "max_area": 32 * 32, "_auto_resize": False}
    plain, found = draw("flux", pipe, **how), under("flux", pipe, ac.Regions(MASKS), **how)
    assert found.isfinite().all() and not torch.allclose(found, plain, atol=1e-3)


def test_too_many_overlaps(pipes: dict[str, Any]) -> None:
    """Every cell in another set of six regions."""
    cells = torch.arange(64).view(8, 8)
    masks = {f"prompt {bit}": (cells >> bit) & 1 for bit in range(6)}
    with pytest.raises(ValueError, match="make 65 kinds of tokens, of which 32 are supported; draw fewer regions"):
        under("flux", pipes["flux"], ac.Regions(masks))


def test_thirty_regions(pipes: dict[str, Any]) -> None:
    """Where nothing overlaps, a region's text and image are one group."""
    cells = torch.arange(64).view(8, 8)
    masks = {f"prompt {number}": (cells == number).int() for number in range(30)}
    assert under("flux", pipes["flux"], ac.Regions(masks, steps=1)).isfinite().all()


def test_bad_input(pipes: dict[str, Any]) -> None:
    for given, message in (
        ({"masks": [1]}, "masks is list; pass a mapping from phrases to masks"),
        ({"masks": {}}, "masks has an empty mapping"),
        ({"masks": {3: a_mask(0, 2, 0, 2)}}, "masks holds 3; its keys are the regions' prompts"),
        ({"masks": {("a", "b"): a_mask(0, 2, 0, 2)}}, "its keys are the regions' prompts"),
        ({"masks": {" ": a_mask(0, 2, 0, 2)}}, "masks holds ' '; its keys are the regions' prompts"),
        ({"masks": {"a": torch.zeros(4, 4)}}, r"masks\['a'\] is empty"),
        ({"masks": {"a": torch.ones(4)}}, r"masks\['a'\] has shape \(4,\)"),
        ({"base": 1.5}, "base is 1.5; it must be a number at least 0 and at most 1"),
        ({"every": 0}, "every is 0; it must be an int of at least 1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"background": " "}, "background is ' '; pass a prompt, or None"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.Regions(**{"masks": MASKS, **given})
    with pytest.raises(ValueError, match="Regions and NAG both send a text of their own through the model"):
        ac.enable(pipes["flux"], ac.Regions(MASKS), ac.NAG("a dog"))
    inner = ac.control(pipes["flux"], ac.NAG("a dog"))
    with ac.control(pipes["flux"], ac.Regions(MASKS)), inner, pytest.raises(ValueError, match="Regions and NAG both"):
        draw("flux", pipes["flux"])


def test_models_that_it_does_not_know() -> None:
    """Refused before anything is changed, with the remedy."""
    for pipe, model in (
        (tiny.pipeline(), "UNet2DConditionModel"),
        (tiny_transformers.pipeline("pixart_sigma"), "PixArtTransformer2DModel"),
        (tiny_transformers.pipeline("chroma"), "ChromaTransformer2DModel"),
    ):
        with pytest.raises(ValueError, match=f"has a {model}, but Regions sends .* only; use DenseDiffusion"):
            ac.enable(pipe, ac.Regions(MASKS))


def test_embeddings_of_another_encoder(pipes: dict[str, Any]) -> None:
    pipe = pipes["flux"]
    embeddings = {"prompt": None, "prompt_embeds": torch.zeros(1, 24, 20), "pooled_prompt_embeds": torch.zeros(1, 16)}
    with pytest.raises(ValueError, match="regions' context has width 32 but the prompt's 20"):
        under("flux", pipe, ac.Regions(MASKS), **embeddings)
