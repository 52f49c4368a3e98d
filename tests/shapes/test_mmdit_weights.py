"""The shipped weights of the joint transformer: what they are, what they draw, and where their attention looks."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast import shapes
from attnctl_fast.shapes.denoiser import denoiser_named
from attnctl_fast.shapes.evaluate import Arm, evaluate, interleaved
from attnctl_fast.shapes.load import WEIGHTS
from attnctl_fast.shapes.localisation import localisation_table
from attnctl_fast.shapes.mmdit import BLOCKS
from attnctl_fast.shapes.train import DEFAULTS

PROMPT = "a red circle and a blue star"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return shapes.load_pipeline("mmdit")


@pytest.fixture(scope="module")
def card() -> Any:
    return json.loads((WEIGHTS["mmdit"] / "card.json").read_text(encoding="utf-8"))


def test_it_is_an_ordinary_pipeline(pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    assert type(pipe) is StableDiffusion3Pipeline
    assert type(pipe.transformer) is SD3Transformer2DModel
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    again = StableDiffusion3Pipeline.from_pretrained(str(WEIGHTS["mmdit"]), local_files_only=True)
    for name, weight in again.transformer.state_dict().items():
        assert torch.equal(weight.float(), pipe.transformer.state_dict()[name])
    assert again.tokenizer_3("a red ring").input_ids == pipe.tokenizer_3("a red ring").input_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    half = shapes.load_pipeline("mmdit", dtype=dtype)
    parts = [part for part in half.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 5
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {dtype}


def test_one_object_is_drawn_right_whatever_the_padding(pipe: Any) -> None:
    def padded(length: int) -> Arm:
        return Arm(options=lambda scenes, seeds: {"max_sequence_length": length})

    arms = {str(length): padded(length) for length in (16, 256)}
    drawn = interleaved(pipe, range(6), arms, objects=1, num_inference_steps=10, progress=False)
    for length, evaluation in drawn.items():
        assert evaluation.hits("strict") >= 5, length


def test_words_look_at_their_own_object_in_most_blocks(pipe: Any, card: Any) -> None:
    tables = localisation_table(denoiser_named("mmdit"), pipe, range(32)), card["measured"]["localisation_auc"]
    for table in tables:
        good = [layer for layer, areas in table.items() if min(areas["noun"], areas["colour"]) >= 0.85]
        blocks = {layer.rpartition(" ")[0] for layer in good}
        # In the text of both encoders.
        assert {f"{block} {name}" for block in blocks for name in ("CLIP", "T5")} == set(good)
        assert len(blocks) >= BLOCKS / 2


def test_two_methods_run_on_it_and_leave_it_as_it_was(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)

    def picture() -> bytes:
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(PROMPT, num_inference_steps=2, guidance_scale=5.0, generator=generator, max_sequence_length=16)
        return drawn.images[0].tobytes()

    plain = picture()
    with ac.control(pipe, ac.AttentionRegulation(["circle", "star"])):
        regulated = picture()
    with ac.control(pipe, ac.AttentionRegulation(["circle", "star"]), ac.TACA()):
        both = picture()
    assert len({plain, regulated, both}) == 3
    assert picture() == plain


def test_evaluation_pads_the_text_as_far_as_prompts_need(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    encode = pipe._get_t5_prompt_embeds

    def counted(*args: Any, max_sequence_length: int, **kwargs: Any) -> Any:
        lengths.append(max_sequence_length)
        return encode(*args, max_sequence_length=max_sequence_length, **kwargs)

    monkeypatch.setattr(pipe, "_get_t5_prompt_embeds", counted)
    evaluate(pipe, [0], objects=3, num_inference_steps=1, progress=False)
    assert set(lengths) == {16}
    assert max(len(pipe.tokenizer_3(shapes.scene_for_seed(seed, 3).prompt).input_ids) for seed in range(20)) <= 16


def test_the_card_tells_of_a_model_with_something_to_improve(card: Any) -> None:
    settings = DEFAULTS["mmdit"]
    assert card["settings"] == asdict(settings)
    assert card["training"]["mmdit"]["steps"] == (settings.stop or settings.steps)
    detection = card["measured"]["detection"]
    assert detection["1"]["strict"] >= 0.85
    assert 0.3 <= 1 - detection["2"]["strict"] <= 0.7
