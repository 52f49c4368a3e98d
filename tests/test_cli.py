"""The command line, on an untrained pipeline that is saved to disk: what it draws, what it writes, how it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import attnctl_fast
from attnctl_fast import cli
from attnctl_fast.cli import demo, method_options, pictures
from attnctl_fast.cli.report import overhead, spread
from attnctl_fast.methods import (
    CONFORM,
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
from attnctl_fast.shapes import evaluate, load_pipeline, scene_for_seed

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
            ["--method", "dense", "--masks", "red circle=MASK", "--convention", "paper"],
            DenseDiffusion.paper({"red circle": [[1, 0], [1, 0]]}),
        ),
    ],
    ids=["energy", "paper", "compose", "composable", "excite", "tsam", "syngen", "conform", "dense"],
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
            "grid by 4; this UNet has .* 1 .down_blocks.0, up_blocks.2.; name such blocks as layers",
        ),
        (("--method", "syngen"), [], "--method syngen needs --pairs.*or spaCy"),
        (("--method", "syngen", "--pairs", "red:cat", "--layers", "up_blocks"), [], "pairs holds 'cat'"),
        (("--method", "conform"), [], "--method conform needs --groups"),
        (("--method", "conform", "--groups", "red+circle"), [], "name at least 2"),
        (("--method", "composable"), [], "--method composable needs --edit or --negate"),
        (
            ("--method", "composable", "--edit", "a ring", "--layers", "up_blocks"),
            [],
            "--layers is an option of .*, not of composable",
        ),
        (("--method", "energy", "--token-weights", "cat=2"), [], "token_weights holds 'cat'"),
        (("--method", "energy", "--token-weights", "star=2", "star=3"), [], "--token-weights names a word twice"),
        (("--method", "dense"), [], "--method dense needs --masks: "),
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


def test_generate_explains_a_folder_without_a_pipeline(generate, tmp_path, capsys):
    assert generate("--model", tmp_path) == 2
    assert "without model_index.json" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(generate):
    with pytest.raises(ValueError, match="cat"):
        generate("--debug", targets=["cat"])


@pytest.fixture
def pickled(tmp_path):
    """A folder with a tiny pipeline whose weights, but for the text encoder's, are pickles."""
    folder = tmp_path / "pickled"
    tiny.pipeline().save_pretrained(folder, safe_serialization=False)
    assert list(folder.glob("unet/*.bin")) and not list(folder.glob("unet/*.safetensors"))
    return folder


@pytest.mark.parametrize("command", ["generate", "maps"])
def test_pickled_weights_are_loaded_only_when_told(pickled, tmp_path, capsys, command):
    words = [command, "--model", pickled, "--prompt", "a red bag", "--steps", 1, "--device", "cpu"]
    words += ["--method", "energy"] if command == "generate" else []
    words += ["--out", tmp_path / "out"]
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"{pickled}/(unet|vae)/diffusion_pytorch_model.bin is a pickle, .* add --allow-pickle$", line)
    assert not (tmp_path / "out").exists()
    assert cli.main([str(word) for word in [*words, "--allow-pickle"]]) == 0


def test_safetensors_are_needed_in_every_part_and_variant(pickled, tmp_path, capsys):
    words = ["generate", "--prompt", "a red bag", "--method", "energy", "--out", str(tmp_path / "out")]
    tiny.pipeline().save_pretrained(tmp_path / "mixed")
    (tmp_path / "mixed" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(pickled / "vae" / "diffusion_pytorch_model.bin", tmp_path / "mixed" / "vae")
    assert cli.main([*words, "--model", str(tmp_path / "mixed")]) == 2
    assert "vae/diffusion_pytorch_model.bin is a pickle" in capsys.readouterr().err

    tiny.pipeline().save_pretrained(tmp_path / "half")
    for part in ("unet", "vae"):
        weights = pickled / part / "diffusion_pytorch_model.bin"
        shutil.copy(weights, tmp_path / "half" / part / "diffusion_pytorch_model.fp16.bin")
    assert cli.main([*words, "--model", str(tmp_path / "half"), "--variant", "fp16"]) == 2
    assert capsys.readouterr().err.endswith("; weights that are not safetensors need --allow-pickle\n")


@pytest.mark.parametrize("place", ["unet/net.py", "pipe.py"])
@pytest.mark.parametrize("options", [(), ("--allow-pickle",)])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, capsys, place, options):
    tiny.pipeline().save_pretrained(tmp_path / "model")
    ran = tmp_path / "ran"
    (tmp_path / "model" / place).write_text(f"open({str(ran)!r}, 'w')")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    if place == "pipe.py":
        index["_class_name"] = ["pipe", "Pipe"]
    else:
        index["unet"] = ["net", "Net"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    words = ["generate", "--model", str(tmp_path / "model"), "--prompt", "a red bag", "--method", "energy", *options]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    assert f"comes with code, {tmp_path / 'model' / place}, which attnctl-fast does not run" in capsys.readouterr().err
    assert not ran.exists()


def test_an_index_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("[")
    assert cli.main(["maps", "--model", str(tmp_path), "--prompt", "a bag"]) == 2
    assert f"{tmp_path / 'model_index.json'} is not a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--token-weights", "bag=x"),
            "must be WORD=FACTOR with a factor of at least 0, such as crown=2.5, got 'bag=x'",
        ),
        (("--token-weights", "=2"), "must be WORD=FACTOR with a factor of at least 0, such as crown=2.5, got '=2'"),
        (("--token-weights", "bag=-1"), "such as crown=2.5, got 'bag=-1'"),
        (("--steps", "many"), "must be a whole number of at least 1, got 'many'"),
        (("--seed", "1.5"), "must be a whole number from 0 to 2**63 - 1, got '1.5'"),
        (("--guidance-scale", "nan"), "must be a finite number, got 'nan'"),
        (("--scale", "much"), "must be a finite number of at least 0, got 'much'"),
        (("--edit-start", "half"), "must be a number from 0 to 1, got 'half'"),
        (("--pairs", "red"), "must be MODIFIER:NOUN, such as red:ball or big:red:ball, got 'red'"),
        (("--groups", "red++ball"), "must be words with '+' between them, got 'red++ball'"),
        (("--masks", "ball"), "must be PHRASE=FILE, such as ball=ball.png, got 'ball'"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(capsys, options, message):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", "m", "--prompt", "p", *options])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"argument {options[0]}: {message}") or message in line, line
    assert "invalid" not in line


def test_the_table_of_methods_fits_their_classes():
    for name, method in method_options.METHODS.items():
        assert set(method.options) <= method_options.OPTIONS.keys() and set(method.needs) <= set(method.options), name
        cls = getattr(attnctl_fast.methods, method.cls)
        assert ("convention" in method.options) <= (hasattr(cls, "official") and hasattr(cls, "paper")), name
    assert all(method_options.methods_with(option) for option in method_options.OPTIONS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "m", "--prompt", "p", "--method", "paint"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "energy", "--token-weights", "crown"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "compose", "--edit-start", "2"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "syngen", "--pairs", "red"],
        ["generate", "--model", "m", "--prompt", "p", "--method", "conform", "--groups", "red++ball", "dog"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--num-images", "0"],
        ["maps", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--strength", "-1"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--seed", "-1"],
        ["generate", "--model", "m", "--prompt", "p", "--targets", "t", "--dtype", "int8"],
        ["demo", "--count", "none"],
        ["paint"],
        [],
    ],
)
def test_wrong_usage_exits_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: attnctl-fast" in capsys.readouterr().err


def test_missing_extras_are_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "diffusers" else object())
    assert cli.main(["demo"]) == 2
    assert 'diffusers not installed; run: pip install "attnctl-fast[diffusers]"' in capsys.readouterr().err


def test_version_and_info(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"attnctl-fast {attnctl_fast.__version__}\n"
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["torch"] == torch.__version__ and lines["implementation"] in ("reference", "eager", "triton")


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "attnctl_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"attnctl-fast {attnctl_fast.__version__}\n")
    done = subprocess.run([sys.executable, "-m", "attnctl_fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_demo_writes_the_picture_and_every_result(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_pipeline", lambda **options: load_pipeline(weights=untrained, **options))
    # The untrained model draws nothing; the third of the pictures shall show what was asked for once controlled. Arms
    # are drawn in turn, backwards at every other batch, and the reference has two batches.
    monkeypatch.setattr(evaluate, "detect", lambda image: found.pop(0))
    scenes = [scene_for_seed(seed) for seed in (7, 8, 9)]
    hit = [evaluate.Detection(colour, shape, (0, 0, 9, 9), 1.0) for colour, shape in scenes[2].objects]
    found = [*[[]] * 12, [], hit, hit, hit[:1], hit]
    arguments = ["--count", "3", "--seed-start", "7", "--steps", "2", "--batch-size", "1", "--out", str(tmp_path)]
    assert cli.main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in ("attention regulation", "energy context", "second one composed"):
        assert "33 % (+1 -0)" in lines[name]
    assert "0 %" in lines["plain"] and "0 %" in lines["first object only"]
    assert "%" in lines["same, by autograd"]

    report = json.loads((tmp_path / "demo.json").read_text())
    assert (
        report["settings"]["seeds"] == [7, 9]
        and report["settings"]["regulation"]["strength"] == evaluate.TUNED["strength"]
    )
    assert [entry["prompt"] for entry in report["pictures"]] == [scene.prompt for scene in scenes]
    assert [entry["attention regulation"]["strict"] for entry in report["pictures"]] == [False, False, True]
    assert report["pictures"][2]["attention regulation"]["found"] == [" ".join(pair) for pair in scenes[2].objects]
    for name in ("attention regulation", "energy context", "second one composed"):
        assert (report["rates"][name]["strict"]["gained"], report["rates"][name]["strict"]["lost"]) == (1, 0)
    assert [len(timing["batches"]) for timing in report["timings"].values()] == [3, 3, 3, 3, 3, 2]
    assert report["settings"]["energy"]["gamma_norm"] == evaluate.MOVED["gamma_norm"]
    assert report["pixel_difference_to_autograd"]["mean"] < 1
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB" and picture.width > 2 * 5 * 264


def test_overhead_is_the_median_over_pairs():
    assert overhead([1.0, 2.0, 4.0], [1.5, 2.0, 5.0])["median"] == pytest.approx(25)
    assert overhead([1.0, 2.0, 4.0], [3.0])["median"] == pytest.approx(200)
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_found_lines_tell_right_wrong_and_extra():
    red, blue, ring = ("red", "circle"), ("blue", "star"), ("cyan", "ring")
    assert pictures.found_lines([red, blue], [blue, red]) == [("right", "red circle"), ("right", "blue star")]
    assert pictures.found_lines([red, blue], [red, red]) == [
        ("right", "red circle"),
        ("wrong", "blue star"),
        ("extra", "red circle"),
    ]
    assert pictures.found_lines([red], [ring, red, blue])[1] == ("extra", "cyan ring and 1 more")


def test_grid_shows_every_picture_with_the_colour_of_its_frame():
    panels = [
        pictures.Panel(Image.new("RGB", (64, 64), (0, 0, 200)), "one", [("right", "it")], True),
        pictures.Panel(Image.new("RGB", (32, 64), (0, 200, 200)), "two", [], False),
    ]
    picture = pictures.draw_sheet([pictures.Strip("a prompt " * 9, panels)] * 3, title="title", columns=2, side=100)
    counts = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    assert counts[(0, 0, 200)] == 3 * 92 * 92
    assert counts[(0, 200, 200)] == 3 * 46 * 92
    assert counts[pictures._RIGHT] > 0 and counts[pictures._WRONG] > 0
