"""`attnctl-fast maps`: which maps it draws, what it writes, how it refuses."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import attnctl_fast as ac
from attnctl_fast import cli
from attnctl_fast.cli.maps import _default_layers, file_names
from attnctl_fast.cli.pictures import heat_map
from attnctl_fast.shapes import load_pipeline
from attnctl_fast.shapes.unet import UNetDenoiser
from tests.support import tiny, tiny_transformers

PROMPT = "a red circle and a blue star"


@pytest.fixture
def maps(untrained, tmp_path):
    """Run `attnctl-fast maps` in two steps; later options win."""

    def run(*options):
        default = ["--model", untrained, "--prompt", PROMPT, "--steps", 2, "--device", "cpu"]
        default += ["--out", tmp_path / "out"]
        return cli.main([str(word) for word in ["maps", *default, *options]])

    return run


def expected(model, tokens=None, layers=None, **arguments):
    """The picture and its maps as the library makes them."""
    pipe = load_pipeline(weights=model)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    with ac.capture(pipe, tokens, layers) as captured:
        image = pipe(PROMPT, num_inference_steps=2, generator=generator, **arguments).images[0]
    return image, captured.per_word()[0]


def test_maps_of_every_word(maps, untrained, tmp_path):
    assert maps("--seed", 5) == 0
    out = tmp_path / "out"
    image, found = expected(untrained)
    files = {word: f"5-{word}.png" for word in found} | {"a (2)": "5-a-2.png"}
    assert list(files) == ["a", "red", "circle", "and", "a (2)", "blue", "star"]
    assert {path.name for path in out.iterdir()} == {"5.png", "maps.png", "maps.json", *files.values()}
    assert np.array_equal(Image.open(out / "5.png"), image)
    report = json.loads((out / "maps.json").read_text())
    assert report["settings"]["seed"] == 5 and report["settings"]["prompt"] == PROMPT
    assert report["layers"] == list(UNetDenoiser.layers) and report["file"] == "5.png"
    assert report["versions"]["torch"] == torch.__version__
    for position, (word, name) in enumerate(files.items(), 1):
        assert np.array_equal(Image.open(out / name), heat_map(image, found[word].numpy()))
        peak = pytest.approx(float(found[word].max()))
        assert report["words"][word] == {"file": name, "token_ids": [position], "peak": peak}
    with Image.open(out / "maps.png") as overview:
        assert overview.mode == "RGB" and overview.width > 4 * 264 and overview.height > 2 * 264


def test_maps_of_named_words_and_layers(maps, untrained, tmp_path):
    options = ["--words", "red circle", "Star", "--layers", "up_blocks.2", "--negative-prompt", "a ring"]
    assert maps("--seed", 5, "--height", 64, "--width", 96, "--guidance-scale", 3, *options) == 0
    out = tmp_path / "out"
    image, found = expected(
        untrained,
        ["red circle", "Star"],
        ["up_blocks.2"],
        height=64,
        width=96,
        guidance_scale=3,
        negative_prompt="a ring",
    )
    report = json.loads((out / "maps.json").read_text())
    assert report["layers"] == list(UNetDenoiser.layers[1:])
    assert {word: entry["token_ids"] for word, entry in report["words"].items()} == {"red circle": [2, 3], "Star": [7]}
    for word, entry in report["words"].items():
        assert np.array_equal(Image.open(out / entry["file"]), heat_map(image, found[word].numpy()))
        assert Image.open(out / entry["file"]).size == (96, 64)


def test_maps_overwrites_only_when_told(maps, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0-star.png").write_text("mine")
    assert maps() == 2
    assert "0-star.png is there already" in capsys.readouterr().err
    assert (out / "0-star.png").read_text() == "mine" and len(list(out.iterdir())) == 1
    assert maps("--overwrite") == 0
    assert Image.open(out / "0-star.png").size == (64, 64)
    assert maps("--seed", 1) == 2
    assert "maps.png is there already" in capsys.readouterr().err and not (out / "1.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--words", "circle", "cat"), "'cat'.*circle.*star"),
        (("--words", "star", "star"), "'star' more than once"),
        (("--prompt", ""), "no words to show"),
        (("--layers", "mid_block.7"), "mid_block.7"),
        (("--model", "/nowhere/at/all"), "/nowhere/at/all"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_maps_explains_what_it_cannot_do(maps, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert maps(*options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("attnctl-fast maps: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_layers_nearest_to_a_quarter(untrained):
    assert _default_layers(load_pipeline(weights=untrained)) == ac.by_downsampling(1)
    assert _default_layers(tiny.pipeline()) == ac.by_downsampling(4)
    flux = _default_layers(tiny_transformers.pipeline("flux"))
    assert flux == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]


def test_file_names_are_safe_and_differ():
    words = ["Red", "red!", "a/b", "a b", "a-b-2", "a  b", ",", "..", "é" * 80]
    names = file_names(words, 7)
    assert list(names) == words
    assert [names[word] for word in words[:8]] == [
        "7-Red.png",
        "7-red-2.png",
        "7-a-b.png",
        "7-a-b-2.png",
        "7-a-b-2-2.png",
        "7-a-b-3.png",
        "7-sign.png",
        "7-sign-2.png",
    ]
    assert len(names["é" * 80].encode()) < 255
    assert all(re.fullmatch(r"[\w-]+\.png", name) for name in names.values())
