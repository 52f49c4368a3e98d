"""Captured attention maps against attention computed in full, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.layers import cross_attention_layers
from tests.support import tiny
from tests.support.graphs import counted_graphs
from tests.support.pipelines import (
    OTHER,
    PROMPT,
    TARGETS,
    call,
    controlled,
    image_embeddings,
    snapshot,
    with_ip_adapter,
)

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def full_maps(pipe: Any, name: str, run: Any) -> list[torch.Tensor]:
    """Head-averaged probabilities [rows,M,N] of a layer at every evaluation, from its inputs."""
    found = []

    def hook(attn: Any, args: Any, kwargs: Any, output: Any) -> None:
        text = kwargs["encoder_hidden_states"]
        q, k = attn.head_to_batch_dim(attn.to_q(args[0])), attn.head_to_batch_dim(attn.to_k(text))
        found.append(attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads)).mean(1))

    handle = pipe.unet.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    run()
    handle.remove()
    return found


def test_maps_are_the_conditional_rows_probabilities() -> None:
    pipe = tiny.pipeline()
    options: dict[str, Any] = {"prompt": [PROMPT, OTHER], "count": 4, "num_images_per_prompt": 2}
    before = snapshot(pipe)
    plain = call(pipe, **options)
    with ac.capture(pipe, [["apple", "bag"], ["red ball", "dog", "cat"]]) as maps:
        assert torch.equal(call(pipe, **options), plain)
    assert snapshot(pipe) == before
    assert list(maps) == list(cross_attention_layers(pipe.unet))
    assert maps.token_ids == [[5, 2], [2, 3, 6, 11]]
    assert maps.tokens == [["apple", "bag"], ["red", "ball", "dog", "cat"]]
    for name, captured in maps.items():
        truth = full_maps(pipe, name, lambda: call(pipe, **options))
        side = 8 if "mid" in name else 16
        assert captured.shape == (4, 4, 4, side, side)
        for evaluation, probabilities in enumerate(truth):
            conditional = probabilities[4:].mT.unflatten(2, (side, side))
            torch.testing.assert_close(captured[evaluation, :2, :2], conditional[:2, [5, 2]])
            torch.testing.assert_close(captured[evaluation, 2:], conditional[2:, [2, 3, 6, 11]])
            assert not captured[evaluation, :2, 2:].any()


def test_all_tokens_and_chosen_layers() -> None:
    pipe = tiny.pipeline()
    with ac.capture(pipe, layers=["mid_block"]) as maps:
        call(pipe, num_inference_steps=3, guidance_scale=1.0)
        call(pipe, num_inference_steps=2, guidance_scale=1.0)
    (captured,) = maps.values()
    assert captured.shape == (2, 1, tiny.LENGTH, 8, 8)
    torch.testing.assert_close(captured.sum(2), torch.ones(2, 1, 8, 8))
    assert maps.tokens is not None
    assert maps.tokens[0][:7] == ["<|startoftext|>", "a", "bag", "and", "an", "apple", "<|endoftext|>"]
    with ac.capture(pipe, list(range(tiny.LENGTH)), ac.by_downsampling(4)) as same:
        call(pipe, num_inference_steps=2, guidance_scale=1.0)
    torch.testing.assert_close(same.mean(), maps.mean())


def test_mean_over_layers_and_steps() -> None:
    pipe = tiny.pipeline()
    with ac.capture(pipe, TARGETS) as maps:
        call(pipe)
    names = list(maps)
    assert maps.mean().shape == (1, 2, 16, 16)
    torch.testing.assert_close(maps.mean([LAYER]), maps[LAYER].mean(0))
    torch.testing.assert_close(maps.mean([LAYER], steps=slice(1, 3)), maps[LAYER][1:3].mean(0))
    large = [name for name in names if "mid" not in name]
    torch.testing.assert_close(maps.mean(large), torch.stack([maps[name].mean(0) for name in large]).mean(0))
    assert maps.mean(["mid_block.attentions.0.transformer_blocks.0.attn2"]).shape == (1, 2, 8, 8)
    for bad in ({"layers": ["nowhere"]}, {"steps": slice(9, 10)}):
        with pytest.raises(ValueError, match="no maps of"):
            maps.mean(**bad)


def check_words(found: list[dict[str, torch.Tensor]], means: torch.Tensor, columns: list[dict[str, list[int]]]) -> None:
    """Every image's maps are the means of these columns of `means [B,n,height,width]`, in this order."""
    assert len(found) == len(means) == len(columns)
    for maps, mean, expected in zip(found, means, columns, strict=True):
        assert list(maps) == list(expected)
        for word, chosen in expected.items():
            assert maps[word].dtype == torch.float32 and maps[word].device.type == "cpu"
            torch.testing.assert_close(maps[word], mean[chosen].mean(0))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_maps_of_all_words(kind: str) -> None:
    """Tokens of a word joined, repeated words numbered, without start, end and padding; non-square."""
    pipe = tiny.pipeline(*(["StableDiffusionXLPipeline"] if kind == "sdxl" else []), kind=kind)
    with ac.capture(pipe) as maps:
        call(pipe, prompt="a Pineapple and two octopus, a dog, dog", size=(16, 32), height=32, width=64)
    columns = {"a": [1], "pineapple": [2, 3], "and": [4], "two": [5], "octopus": [6, 7], ",": [8], "a (2)": [9]}
    columns |= {"dog": [10], ", (2)": [11], "dog (2)": [12]}
    assert maps.words == [columns]
    assert maps.mean().shape == (1, tiny.LENGTH, 8, 16)
    check_words(maps.per_word(), maps.mean(), [columns])
    chosen: dict[str, Any] = {"layers": [LAYER], "steps": slice(1, 3)}
    check_words(maps.per_word(**chosen), maps[LAYER][1:3].mean(0), [columns])
    coarse = [name for name in maps if "mid" in name]
    assert maps.per_word(coarse)[0]["dog"].shape == (4, 8)


def test_maps_of_named_words() -> None:
    """Of two prompts with two images each, as they were named; padded tokens do not count."""
    pipe = tiny.pipeline()
    prompts = ["an octopus and a bag", OTHER]
    options: dict[str, Any] = {"prompt": prompts, "count": 4, "num_images_per_prompt": 2}
    with ac.capture(pipe, [["Octopus"], ["red ball", "dog", 11]]) as maps:
        call(pipe, **options)
    first, second = {"Octopus": [0, 1]}, {"red ball": [0, 1], "dog": [2], "11": [3]}
    assert maps.words == [{"Octopus": [2, 3]}, {"red ball": [2, 3], "dog": [6], "11": [11]}]
    check_words(maps.per_word(), maps.mean(), [first, first, second, second])
    with ac.capture(pipe) as everything:
        call(pipe, **options)
    found = everything.per_word()
    assert list(found[0]) == ["an", "octopus", "and", "a", "bag"] and list(found[2])[-3:] == ["a", "black", "cat"]
    for index in range(4):
        for word, mean in maps.per_word()[index].items():
            parts = {"red ball": ["red", "ball"], "11": ["cat"]}.get(word, [word.lower()])
            torch.testing.assert_close(mean, torch.stack([found[index][part] for part in parts]).mean(0))


def test_words_that_both_text_encoders_read() -> None:
    pipe = tiny.pipeline("StableDiffusionXLPipeline", kind="sdxl")
    with ac.capture(pipe) as maps:
        call(pipe, prompt="a bag and an apple", prompt_2="a dog and an octopus")
    assert list(maps.per_word()[0]) == ["a", "and", "an"]


def test_words_of_embeddings_are_unknown() -> None:
    pipe = tiny.pipeline()
    positive, negative = pipe.encode_prompt([PROMPT, OTHER], "cpu", 1, True, ["", ""])
    embeddings = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative, "count": 2}
    with ac.capture(pipe, layers=[LAYER]) as maps:
        call(pipe, **embeddings)
    assert maps.words is None
    with pytest.raises(ValueError, match=r"words of the prompt are unknown.*pass .*tokens="):
        maps.per_word()
    with ac.capture(pipe, [5, 2], [LAYER]) as ids:
        call(pipe, **embeddings)
    check_words(ids.per_word(), maps.mean(), [{"5": [5], "2": [2]}] * 2)
    for bad in ({"layers": ["nowhere"]}, {"steps": slice(9, 10)}):
        with pytest.raises(ValueError, match="no maps of"):
            ids.per_word(**bad)


def test_nothing_captured_yet() -> None:
    pipe = tiny.pipeline()
    with ac.capture(pipe, TARGETS) as maps:
        assert not maps
        for look in (maps.mean, maps.per_word):
            with pytest.raises(ValueError, match="call the pipeline"):
                look()


@pytest.mark.parametrize("pin_special", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_edited_maps_explain_the_edited_output(pin_special: bool, outside: bool) -> None:
    """Within or around control, the maps of all tokens times the values are the layer's output (one head)."""
    pipe = tiny.pipeline(kind="sd1", unet=one_head())
    method = ac.AttentionRegulation([["bag"], ["dog", "cat"]], layers=[LAYER], pin_special=pin_special)
    inputs, outputs = [], []

    def hook(attn: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append(attn.to_v(kwargs["encoder_hidden_states"][2:]))
        outputs.append(output[2:])

    handle = pipe.unet.get_submodule(LAYER).register_forward_hook(hook, with_kwargs=True)
    capture, control = ac.capture(pipe, layers=[LAYER]), ac.control(pipe, method)
    with capture if outside else control as first, control if outside else capture as second:
        call(pipe, prompt=[PROMPT, OTHER], count=2)
    handle.remove()
    maps = first if outside else second
    attn = pipe.unet.get_submodule(LAYER)
    for evaluation, (values, output) in enumerate(zip(inputs, outputs, strict=True)):
        probabilities = maps[LAYER][evaluation].flatten(2).mT
        torch.testing.assert_close(attn.to_out[0](probabilities @ values), output, rtol=1e-4, atol=1e-5)


def one_head() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.UNETS["one head"] = {"attention_head_dim": 1}
        return tiny.unet("one head")


def test_capture_with_an_ip_adapter_and_embeddings() -> None:
    pipe = with_ip_adapter(tiny.pipeline())
    plain = call(pipe, **image_embeddings())
    with ac.capture(pipe, TARGETS) as words:
        assert torch.equal(call(pipe, **image_embeddings()), plain)
    positive, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    embeddings = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    with ac.capture(pipe, [2, 5]) as ids:
        assert torch.equal(call(pipe, **embeddings, **image_embeddings()), plain)
    assert ids.tokens is None
    assert torch.equal(ids.mean(), words.mean())


def test_bad_capture() -> None:
    pipe = tiny.pipeline()
    before = snapshot(pipe)
    for arguments, message in (
        ({"tokens": []}, "tokens is \\[\\]"),
        ({"layers": ["up_blocks.9"]}, "'up_blocks.9' matches no"),
        ({"tokens": ["bag", "bag"]}, "tokens holds 'bag' more than once"),
    ):
        with pytest.raises(ValueError, match=message), ac.capture(pipe, **arguments):
            pass
    with pytest.raises(ValueError, match="'zebra', which is not in the prompt"), ac.capture(pipe, ["zebra"]):
        call(pipe)
    assert snapshot(pipe) == before


@pytest.fixture
def tracing() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_unet_compiled_in_place(tracing: None) -> None:
    """The same image, but for rounding where an edit rests; compiled before or under control."""
    pipe = tiny.pipeline()
    plain, edited = call(pipe), controlled(pipe)
    pipe.unet.compile(backend="eager")
    assert torch.equal(call(pipe), plain)
    before = snapshot(pipe)
    torch.testing.assert_close(controlled(pipe), edited, rtol=1e-3, atol=1e-3)
    assert snapshot(pipe) == before
    assert torch.equal(call(pipe), plain)


def test_compiled_copy_of_the_unet(tracing: None) -> None:
    pipe = tiny.pipeline()
    edited = controlled(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    before = snapshot(pipe)
    torch.testing.assert_close(controlled(pipe), edited, rtol=1e-3, atol=1e-3)
    assert snapshot(pipe) == before


def test_a_capture_breaks_no_graph() -> None:
    """The maps leave the graph as what it has written; one graph serves all steps and calls."""
    pipe = tiny.pipeline().to(torch.float64)
    with ac.capture(pipe, TARGETS) as expected:
        image = controlled(pipe)
    with counted_graphs(pipe) as graphs:
        for _ in range(2):
            with ac.capture(pipe, TARGETS) as maps:
                torch.testing.assert_close(controlled(pipe), image, rtol=0, atol=1e-6)
            assert list(maps) == list(expected)
            for name in maps:
                torch.testing.assert_close(maps[name], expected[name], rtol=0, atol=1e-5)
    assert len(graphs) == 1
