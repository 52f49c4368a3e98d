"""`attnctl-fast generate` and `maps` on transformers: what they draw, in which dtype, under which guidance."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import attnctl_fast as ac
from attnctl_fast import cli
from attnctl_fast.cli.model import dtype_named
from tests.support import tiny_transformers as tiny
from tests.support.marks import full

KINDS = ["sd3", "flux", "pixart_sigma", "sana", full("pixart_alpha"), full("hunyuan"), full("chroma"), full("zimage")]
METHODS = [
    ("excite", ["--targets", "bag", "apple"]),
    full("tsam", []),
    full("syngen", ["--pairs", "photo:bag", "and:apple"]),
    full("conform", ["--groups", "photo+bag", "apple"]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a kind's pipeline."""
    folders = {}

    def folder(kind):
        if kind not in folders:
            folders[kind] = tiny.saved(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder


def side(kind):
    return 128 if kind == "hunyuan" else 32


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """Run a command in two steps on a kind's pipeline; later options win."""
    tiny.of_any_size(monkeypatch)

    def run(name, kind, *options):
        default = ["--model", models(kind), "--prompt", tiny.PROMPT, "--steps", 2, "--device", "cpu"]
        default += ["--height", side(kind), "--width", side(kind), "--out", tmp_path / "out"]
        return cli.main([str(word) for word in [name, *default, *options]])

    return run


def loaded(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(kind, pipe, seed=0, **options):
    given = {"num_inference_steps": 2, "height": side(kind), "width": side(kind)} | options
    return pipe(tiny.PROMPT, generator=torch.Generator().manual_seed(seed), **given).images[0]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_draws_what_the_library_draws(command, models, tmp_path, kind):
    negative = {"negative_prompt": "a dog"} | ({"true_cfg_scale": 3.0} if kind == "flux" else {})
    options = ["--negative-prompt", "a dog", *(["--true-cfg-scale", 3] if kind == "flux" else [])]
    assert command("generate", kind, "--targets", "bag", "apple", "--compare", "--seed", 5, *options) == 0
    pipe = loaded(models(kind))
    plain = drawn(kind, pipe, 5, **negative)
    with ac.control(pipe, ac.AttentionRegulation(["bag", "apple"])):
        regulated = drawn(kind, pipe, 5, **negative)
    assert np.array_equal(Image.open(tmp_path / "out" / "5-plain.png"), plain)
    assert np.array_equal(Image.open(tmp_path / "out" / "5-regulation.png"), regulated)
    assert not np.array_equal(plain, regulated)
    assert not np.array_equal(plain, drawn(kind, pipe, 5))


@pytest.mark.parametrize(
    "kind", ["flux", "sana", *map(full, ("sd3", "pixart_sigma", "pixart_alpha", "hunyuan", "chroma"))]
)
def test_maps_show_every_word(command, models, tmp_path, kind):
    assert command("maps", kind) == 0
    pipe = loaded(models(kind))
    layers = [name for name in pipe.transformer.attn_processors if re.match(r"transformer_blocks.*\.attn2?\.", name)]
    layers = [name.removesuffix(".processor") for name in layers] if kind != "hunyuan" else None
    with ac.capture(pipe, layers=layers) as maps:
        image = drawn(kind, pipe)
    (found,) = maps.per_word()
    report = json.loads((tmp_path / "out" / "maps.json").read_text())
    assert report["layers"] == list(maps) and list(report["words"]) == list(found)
    assert {word.casefold() for word in found} >= {"photo", "bag", "apple"}
    assert np.array_equal(Image.open(tmp_path / "out" / "0.png"), image)
    for word, entry in report["words"].items():
        assert entry["peak"] == pytest.approx(float(found[word].max()))
        assert Image.open(tmp_path / "out" / entry["file"]).size == image.size


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("kind", ["sd3", full("flux")])
def test_generate_moves_the_latents(command, tmp_path, kind, method, options):
    assert command("generate", kind, "--method", method, *options, "--compare") == 0
    plain, guided = (Image.open(tmp_path / "out" / f"0-{name}.png") for name in ("plain", method))
    assert not np.array_equal(plain, guided)


def test_generate_draws_regions(command, models, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ["--masks", f"a red ball={tmp_path / 'mask.png'}", "--base", 0.3, "--background", "two dog"]
    assert command("generate", "flux", "--method", "regions", *options) == 0
    pipe = loaded(models("flux"))
    with ac.control(pipe, ac.Regions({"a red ball": mask > 0}, base=0.3, background="two dog")):
        expected = drawn("flux", pipe)
    assert np.array_equal(Image.open(tmp_path / "out" / "0-regions.png"), expected)
    assert not np.array_equal(expected, drawn("flux", pipe))


def test_true_guidance_goes_away_from_an_empty_prompt(command, models, tmp_path):
    assert command("generate", "flux", "--targets", "bag", "--strength", 0, "--true-cfg-scale", 4) == 0
    pipe = loaded(models("flux"))
    expected = drawn("flux", pipe, true_cfg_scale=4.0, negative_prompt="")
    assert np.array_equal(Image.open(tmp_path / "out" / "0-regulation.png"), expected)
    assert not np.array_equal(expected, drawn("flux", pipe))
    settings = json.loads((tmp_path / "out" / "generate.json").read_text())["settings"]
    assert settings["true_cfg_scale"] == 4 and settings["negative_prompt"] is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "flux",
            ["--negative-prompt", "a dog"],
            "FluxPipeline reads a negative prompt only with true_cfg_scale above 1, and here it is 1.0; add "
            "--true-cfg-scale 4, for instance, or leave",
        ),
        ("flux", ["--negative-prompt", "a dog", "--true-cfg-scale", 1], "and here it is 1.0"),
        (
            "sd3",
            ["--negative-prompt", "a dog", "--guidance-scale", 1],
            "only with guidance_scale above 1.* is 1.0; add",
        ),
        ("sd3", ["--true-cfg-scale", 4], "StableDiffusion3Pipeline takes no true_cfg_scale"),
        ("sd3", ["--targets", "dog"], "'dog', which is not in the prompt .* CLIP: .* T5: "),
        ("sd3", ["--method", "energy"], "attend to text and image in one"),
        (
            "sana",
            ["--method", "compose", "--edit", "a dog"],
            "SanaPipeline has a SanaTransformer2DModel, but Composition",
        ),
        ("sana", ["--method", "tsam"], "not a CLIP, T5 or Bert text encoder"),
    ],
)
def test_what_has_no_effect_or_no_place_is_said(command, tmp_path, capsys, kind, options, message):
    targets = [] if "--method" in options else ["--targets", "bag"]
    assert command("generate", kind, *targets, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("attnctl-fast generate: ") and re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "device", "part", "dtype"),
    [
        ("auto", "cpu", "transformer", torch.float32),
        ("auto", "cuda", "unet", torch.float16),
        ("auto", "cuda", "transformer", torch.bfloat16),
        ("float16", "cuda", "transformer", torch.float16),
        ("bfloat16", "cpu", "unet", torch.bfloat16),
    ],
)
def test_dtype_of_device_and_model(name, device, part, dtype):
    assert dtype_named(name, torch.device(device), ["vae", part]) == dtype


def test_a_saved_models_parts_choose_the_dtype(models, tmp_path, monkeypatch):
    from attnctl_fast.cli import model

    seen = []
    monkeypatch.setattr(model, "dtype_named", lambda name, device, parts: seen.append(parts) or torch.bfloat16)
    pipe = model.load(model.Settings(model=str(models("pixart_sigma")), prompt="", device="cpu"))
    assert pipe.transformer.dtype == torch.bfloat16
    assert sorted(seen[0]) == ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
