"""The shipped weights: what they are, what they draw, and where their attention looks."""

import json
import logging
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from attnctl_fast import shapes
from attnctl_fast.shapes.card import detection_rates
from attnctl_fast.shapes.denoiser import denoiser_named
from attnctl_fast.shapes.evaluate import evaluate
from attnctl_fast.shapes.load import WEIGHTS
from attnctl_fast.shapes.localisation import area_under_curve, localisation_table, pixel_loss, token_loss
from attnctl_fast.shapes.train import DEFAULTS
from attnctl_fast.shapes.unet import UNetDenoiser, record_attention


@pytest.fixture(scope="module")
def pipe() -> Any:
    return shapes.load_pipeline()


@pytest.fixture(scope="module")
def denoiser() -> Any:
    return denoiser_named("unet")


def test_it_is_an_ordinary_pipeline(pipe: Any) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    assert type(pipe) is StableDiffusionPipeline
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.safety_checker is None
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert not pipe.unet.training


def test_loading_says_nothing() -> None:
    code = "from attnctl_fast import shapes; shapes.load_pipeline()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_loading_leaves_the_libraries_logging_alone() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.INFO)
    diffusers_logging.disable_progress_bar()
    try:
        shapes.load_pipeline()
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        assert not diffusers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
        diffusers_logging.enable_progress_bar()


def test_diffusers_loads_the_folder_itself(pipe: Any) -> None:
    from diffusers import StableDiffusionPipeline

    again = StableDiffusionPipeline.from_pretrained(str(WEIGHTS["unet"]), local_files_only=True)
    for name, weight in again.unet.state_dict().items():
        assert torch.equal(weight.float(), pipe.unet.state_dict()[name])
    assert again.tokenizer("a red ring").input_ids == pipe.tokenizer("a red ring").input_ids


def test_other_dtypes() -> None:
    half = shapes.load_pipeline(dtype=torch.bfloat16)
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


def test_no_weights_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="reinstall attnctl-fast, or train one"):
        shapes.load_pipeline(weights=tmp_path)


def test_no_diffusers_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "diffusers.utils", raising=False)
    monkeypatch.delitem(sys.modules, "diffusers.utils.logging", raising=False)
    with pytest.raises(ImportError, match=r'pip install "attnctl-fast\[diffusers\]"'):
        shapes.load_pipeline()


@pytest.mark.parametrize(("model", "parts"), [("unet", 3), ("mmdit", 5)])
def test_the_weights_are_small_half_precision_safetensors(model: str, parts: int) -> None:
    from safetensors import safe_open

    files = [path for path in WEIGHTS[model].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14_000_000
    tensors = [path for path in files if path.suffix == ".safetensors"]
    assert len(tensors) == parts
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    for path in tensors:
        with safe_open(path, "pt") as opened:
            assert {opened.get_tensor(name).dtype for name in opened.keys()} == {torch.float16}  # noqa: SIM118


def test_the_configurations_name_no_folder_of_the_machine_that_trained() -> None:
    for path in WEIGHTS["unet"].parent.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8")


def test_layers_are_the_cross_attention_at_16x16(pipe: Any, denoiser: Any) -> None:
    named = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if ".attn2." in name]
    assert sorted(named) == sorted(UNetDenoiser.layers)
    assert all(name.startswith(shapes.LAYERS) for name in named)
    with record_attention(pipe.unet, UNetDenoiser.layers) as recorders, torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 16, 16), 500, denoiser.text_encoder(denoiser.tokens(["a red circle"]))[0])
    for recorder in recorders.values():
        assert recorder.probabilities is not None
        assert recorder.probabilities.shape == (1, 256, 20)


def test_recording_changes_nothing_and_is_undone(pipe: Any, denoiser: Any) -> None:
    before = pipe.unet.attn_processors
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context = denoiser.text_encoder(denoiser.tokens(["a red circle", "a blue star"]))[0]
        plain = pipe.unet(latents, 300, context).sample
        with record_attention(pipe.unet, UNetDenoiser.layers) as recorders:
            recorded = pipe.unet(latents, 300, context).sample
    torch.testing.assert_close(recorded, plain, atol=1e-5, rtol=1e-5)
    assert pipe.unet.attn_processors == before
    for recorder in recorders.values():
        assert recorder.probabilities is not None
        torch.testing.assert_close(recorder.probabilities.sum(-1), torch.ones(2, 256))
    with (
        pytest.raises(ValueError, match=r"no attention layers named \['mid'\]"),
        record_attention(pipe.unet, ("mid",)),
    ):
        pass
    assert pipe.unet.attn_processors == before


def test_a_seed_fixes_the_picture(pipe: Any) -> None:
    pipe.set_progress_bar_config(disable=True)
    first, again, other = (
        pipe(
            "a red circle and a blue star",
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        for seed in (3, 3, 4)
    )
    assert first.size == (64, 64)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_one_object_is_drawn_right(pipe: Any) -> None:
    drawn = evaluate(pipe, range(16), objects=1, batch_size=16, progress=False)
    assert detection_rates(drawn)["strict"] >= 14 / 16


def test_nouns_look_at_their_own_object_in_every_layer(pipe: Any, denoiser: Any) -> None:
    table = localisation_table(denoiser, pipe, range(64))
    assert set(table) == set(UNetDenoiser.layers)
    for layer, areas in table.items():
        assert areas["noun"] >= 0.85, (layer, areas)


def test_the_card_tells_of_a_model_with_something_to_improve() -> None:
    card = json.loads((WEIGHTS["unet"] / "card.json").read_text(encoding="utf-8"))
    detection = card["measured"]["detection"]
    assert detection["1"]["strict"] >= 0.9
    assert 0.3 <= 1 - detection["2"]["strict"] <= 0.7
    for areas in card["measured"]["localisation_auc"].values():
        assert areas["noun"] >= 0.85
    first, last = card["measured"]["seeds"]
    assert last - first + 1 >= 256


def test_the_weights_are_those_of_the_default_settings() -> None:
    card = json.loads((WEIGHTS["unet"] / "card.json").read_text(encoding="utf-8"))
    settings = DEFAULTS["unet"]
    assert card["settings"] == asdict(settings)
    assert card["training"]["unet"]["steps"] == (settings.stop or settings.steps)
    assert card["training"]["vae"]["steps"] == settings.vae_steps


def test_area_under_curve() -> None:
    high, low = torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2, 0.3])
    assert area_under_curve(high, low) == 1
    assert area_under_curve(low, high) == 0
    assert area_under_curve(torch.ones(4), torch.ones(3)) == 0.5
    assert area_under_curve(torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0])) == 0.75
    with pytest.raises(ValueError, match="at least one positive"):
        area_under_curve(torch.ones(0), low)


def test_the_token_loss_is_the_share_of_attention_outside() -> None:
    maps = torch.zeros(2, 4, 3)
    maps[:, :, 1] = torch.tensor([0.1, 0.3, 0.0, 0.0])
    maps[:, :, 2] = torch.tensor([0.2, 0.2, 0.2, 0.2])
    words = torch.tensor([[[1, 0], [2, 1]], [[1, 0], [-1, -1]]])
    masks = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 1]]])
    both = token_loss(maps, words, masks, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(both, torch.tensor((0.75**2 + 0.5**2 + 0.0) / 3))
    torch.testing.assert_close(token_loss(maps, words, masks, torch.tensor([0.0, 1.0])), torch.tensor(0.0))


def test_the_pixel_loss_is_the_cross_entropy_of_an_objects_attention() -> None:
    maps = torch.tensor([[[0.5, 0.3, 0.1, 0.1], [0.9, 0.05, 0.02, 0.03]]])
    words = torch.tensor([[[1, 0], [2, 0], [-1, -1]]])
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    expected = -(math.log(0.4) + math.log(1 - 0.07)) / 2
    torch.testing.assert_close(pixel_loss(maps, words, masks, torch.ones(1)), torch.tensor(expected))
