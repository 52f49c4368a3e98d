"""`attnctl-fast generate` on an untrained pipeline: what it draws, what it writes, how it refuses."""

import json
import re
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl_fast import cli
from attnctl_fast.cli import method_options
from attnctl_fast.methods import (
    CONFORM,
    FOCUS,
    NAG,
    PLADIS,
    TSAM,
    AttendAndExcite,
    AttentionRegulation,
    ComposableDiffusion,
    Composition,
    DenseDiffusion,
    Edit,
    EnergyContext,
    SynGen,
)
from attnctl_fast.pipeline import control
from attnctl_fast.shapes import load_pipeline

PROMPT = "a red circle and a blue star"
LAYERS = ["down_blocks.0", "up_blocks.2"]


@pytest.fixture
def generate(untrained, tmp_path):
    """Run `attnctl-fast generate` in two steps per picture; later options win."""

    def run(*options, targets=("circle", "star")):
        default = ["--model", untrained, "--prompt", PROMPT, "--steps", 2, "--out", tmp_path / "out"]
        named = ["--targets", *targets] if targets else []
        return cli.main([str(word) for word in ["generate", *default, *named, *options]])

    return run


def drawn(model, seeds, *methods, **arguments):
    pipe = load_pipeline(weights=model)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if not methods:
        return pipe([PROMPT] * len(seeds), num_inference_steps=2, generator=generators, **arguments).images
    with control(pipe, *methods):
        return pipe([PROMPT] * len(seeds), num_inference_steps=2, generator=generators, **arguments).images


def close(one, other):
    difference = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16))
    return difference.max() <= 1


def test_generate_draws_what_the_library_draws(generate, untrained, tmp_path):
    assert generate("--compare", "--seed", 5, "--num-images", 2, "--strength", 0.5, "--guidance-scale", 3) == 0
    out = tmp_path / "out"
    names = {"5-plain.png", "5-regulation.png", "6-plain.png", "6-regulation.png"}
    assert {path.name for path in out.iterdir()} == names | {"compare.png", "generate.json"}
    method = AttentionRegulation(["circle", "star"], strength=0.5)
    plain, regulated = (
        drawn(untrained, [5, 6], guidance_scale=3.0),
        drawn(untrained, [5, 6], method, guidance_scale=3.0),
    )
    for index, seed in enumerate((5, 6)):
        assert close(Image.open(out / f"{seed}-plain.png"), plain[index])
        assert close(Image.open(out / f"{seed}-regulation.png"), regulated[index])
        assert not close(plain[index], regulated[index])


def test_generate_writes_its_settings(generate, untrained, tmp_path):
    assert generate("--layers", "down_blocks.0", "--convention", "paper", "--negative-prompt", "a ring") == 0
    report = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert report["settings"]["model"] == str(untrained)
    assert report["settings"]["prompt"] == PROMPT and report["settings"]["negative_prompt"] == "a ring"
    assert report["settings"]["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert report["method"]["name"] == "AttentionRegulation"
    assert report["method"]["layers"] == ["down_blocks.0"] and report["method"]["convention"] == "paper"
    assert report["files"] == ["0-regulation.png"]
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["seconds"]) == ["regulation"]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (
            ["--method", "energy", "--gamma-attn", 0.3, "--gamma-norm", 0.2, "--token-weights", "circle=2.5", "star=0"],
            EnergyContext(0.3, 0.2, token_weights={"circle": 2.5, "star": 0}),
        ),
        (["--method", "energy", "--convention", "paper"], EnergyContext.paper()),
        (
            ["--method", "compose", "--edit", "a ring", "a green cross", "--negate", "a star", "--edit-weight", 0.6]
            + ["--edit-start", 0.5, "--gamma-attn", 0.001],
            Composition(
                [
                    Edit("a ring", 0.6, gamma_attn=0.001, start=0.5),
                    Edit("a green cross", 0.6, gamma_attn=0.001, start=0.5),
                    Edit("a star", 0.6, direction=-1, gamma_attn=0.001, start=0.5),
                ]
            ),
        ),
        (
            ["--method", "nag", "--avoid", "a star", "--nag-scale", 4, "--nag-tau", 2, "--nag-alpha", 0.5],
            NAG("a star", scale=4.0, tau=2.0, alpha=0.5),
        ),
        (["--method", "pladis", "--pladis-scale", 1.5], PLADIS(1.5)),
        (
            ["--method", "composable", "--edit", "a ring", "--negate", "a star", "--edit-weight", 0.5],
            ComposableDiffusion([PROMPT, "a ring", "a star"], [1, 0.5, -0.5]),
        ),
        (
            ["--method", "excite", "--targets", "red circle", "star", "--layers", *LAYERS, "--scale", 3],
            AttendAndExcite(["red circle", "star"], layers=LAYERS, scale=3.0),
        ),
        (
            ["--method", "tsam", "--layers", *LAYERS, "--convention", "paper"],
            TSAM.paper(layers=LAYERS),
        ),
        (
            ["--method", "syngen", "--pairs", "red:circle", "blue:star", "--layers", "up_blocks.2", "--scale", 2],
            SynGen([("red", "circle"), ("blue", "star")], layers=["up_blocks.2"], scale=2.0),
        ),
        (
            ["--method", "conform", "--groups", "red+circle", "star", "--layers", "down_blocks"],
            CONFORM([("red", "circle"), ("star",)], layers=["down_blocks"]),
        ),
        (
            ["--method", "focus", "--groups", "red+circle", "star", "--layers", "down_blocks", "--strength", 3],
            FOCUS([("red", "circle"), ("star",)], layers=["down_blocks"], strength=3.0),
        ),
        (
            ["--method", "dense", "--masks", "red circle=MASK", "--convention", "paper"],
            DenseDiffusion.paper({"red circle": [[1, 0], [1, 0]]}),
        ),
    ],
    ids=[
        "energy",
        "paper",
        "compose",
        "nag",
        "pladis",
        "composable",
        "excite",
        "tsam",
        "syngen",
        "conform",
        "focus",
        "dense",
    ],
)
def test_generate_with_every_other_method(generate, untrained, tmp_path, options, method):
    Image.fromarray(np.array([[255, 0], [255, 0]], np.uint8)).save(tmp_path / "mask.png")
    given = [str(word).replace("MASK", str(tmp_path / "mask.png")) for word in options]
    assert generate(*given, targets=()) == 0
    name = options[1]
    out = tmp_path / "out"
    picture = Image.open(out / f"0-{name}.png")
    assert close(picture, drawn(untrained, [0], method)[0])
    assert not np.array_equal(picture, drawn(untrained, [0])[0])
    report = json.loads((out / "generate.json").read_text())["method"]
    assert report.pop("name") == type(method).__name__
    assert report == json.loads(json.dumps(asdict(method), default=lambda data: sha256(data).hexdigest()))


def test_generate_takes_size_and_dtype(generate, tmp_path):
    assert generate("--height", 64, "--width", 96, "--dtype", "bfloat16", "--device", "cpu") == 0
    assert Image.open(tmp_path / "out" / "0-regulation.png").size == (96, 64)
    assert json.loads((tmp_path / "out" / "generate.json").read_text())["settings"]["dtype"] == "bfloat16"


def test_generate_overwrites_only_when_told(generate, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "0-regulation.png").write_text("mine")
    assert generate() == 2
    assert "0-regulation.png is there already" in capsys.readouterr().err
    assert (out / "0-regulation.png").read_text() == "mine" and len(list(out.iterdir())) == 1
    assert generate("--overwrite") == 0
    assert Image.open(out / "0-regulation.png").size == (64, 64)
    assert generate() == 2
    assert generate("--seed", 1) == 2  # generate.json is there.


@pytest.mark.parametrize(
    ("options", "targets", "message"),
    [
        ((), ["circle", "cat"], "'cat'.*circle.*star"),
        (("--layers", "mid_block.7"), ["circle"], "mid_block.7"),
        (("--model", "/nowhere/at/all"), ["circle"], "/nowhere/at/all"),
        (("--model", "nobody/no-such-model"), ["circle"], "nobody/no-such-model"),
        (("--device", "abacus"), ["circle"], "abacus"),
        ((), [], "--method regulation needs --targets: words or phrases of the prompt"),
        (("--method", "compose"), [], "--method compose needs --edit or --negate"),
        (("--method", "energy"), ["circle"], "--targets is an option of --method regulation and excite, not of energy"),
        (("--edit-start", "0.2"), ["circle"], "--edit-start is an option of --method compose, not of regulation"),
        (("--scale", 2), ["circle"], "--scale is an option of .*excite, tsam, syngen and conform, not of regulation"),
        (("--method", "excite"), [], "--method excite needs --targets"),
        (
            ("--method", "excite"),
            ["star"],
            "grid by 4; this model has .* 1 .down_blocks.0, up_blocks.2.; name such blocks as layers",
        ),
        (("--method", "syngen"), [], "--method syngen needs --pairs.*or spaCy"),
        (("--method", "syngen", "--pairs", "red:cat", "--layers", "up_blocks"), [], "pairs holds 'cat'"),
        (("--method", "conform"), [], "--method conform needs --groups"),
        (("--method", "nag"), [], "--method nag needs --avoid: what the picture is not to be"),
        (("--method", "taca"), [], "has a UNet2DConditionModel, but TACA is for joint attention"),
        (("--method", "conform", "--groups", "red+circle"), [], "name at least 2"),
        (("--method", "composable"), [], "--method composable needs --edit or --negate"),
        (
            ("--method", "composable", "--edit", "a ring", "--layers", "up_blocks"),
            [],
            "--layers is an option of .*, not of composable",
        ),
        (("--method", "energy", "--token-weights", "cat=2"), [], "token_weights holds 'cat'"),
        (("--method", "energy", "--token-weights", "star=2", "star=3"), [], "--token-weights names a word twice"),
        (("--method", "dense"), [], "--method dense needs --masks or --boxes: "),
        (("--method", "regions"), [], "--method regions needs --masks or --boxes: "),
        (("--method", "dense", "--masks", "star=/no/mask.png"), [], "/no/mask.png"),
    ],
)
def test_generate_explains_what_it_cannot_do(generate, tmp_path, capsys, monkeypatch, options, targets, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(method_options, "find_spec", lambda name: None)
    assert generate(*options, targets=targets) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("attnctl-fast generate: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_debug_shows_where_an_error_comes_from(generate):
    with pytest.raises(ValueError, match="cat"):
        generate("--debug", targets=["cat"])
