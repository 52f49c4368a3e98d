"""Loading the model of `--model`: what is refused, and how it is said."""

import json
import re
import shutil

import pytest

from attnctl_fast import cli
from tests.support import tiny


@pytest.fixture
def pickled(tmp_path):
    """A folder with a tiny pipeline whose weights are pickles (but for the text encoder's, with transformers 5)."""
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
    assert re.search(rf"{pickled}/\w+/\w+.bin is a pickle, .* add --allow-pickle$", line)
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


def test_pickles_that_an_index_of_safetensors_lists_are_refused(pickled, tmp_path, capsys):
    tiny.pipeline().save_pretrained(tmp_path / "model")
    part = tmp_path / "model" / "unet"
    shutil.copy(pickled / "unet" / "diffusion_pytorch_model.bin", part / "shard.bin")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "shard.bin"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    words = ["generate", "--prompt", "a red bag", "--method", "energy", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--model", str(tmp_path / "model")]) == 2
    assert f"{part / 'shard.bin'} is a pickle" in capsys.readouterr().err


def test_what_comes_from_the_hub_is_checked_too(pickled, tmp_path, capsys, monkeypatch):
    from diffusers import DiffusionPipeline

    asked = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **files: asked.append((name, files)) or pickled)
    words = ["generate", "--model", "org/name", "--prompt", "a red bag", "--method", "energy", "--steps", "1"]
    words += ["--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert ".bin is a pickle" in capsys.readouterr().err
    assert cli.main([*words, "--allow-pickle"]) == 0
    assert [name for name, _ in asked] == ["org/name"] * 2
    assert [files["use_safetensors"] for _, files in asked] == [True, None]


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


def test_a_folder_without_a_pipeline_is_named(tmp_path, capsys):
    assert cli.main(["maps", "--model", str(tmp_path), "--prompt", "a bag"]) == 2
    assert "without model_index.json" in capsys.readouterr().err


def test_an_index_that_is_no_json_is_named(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("[")
    assert cli.main(["maps", "--model", str(tmp_path), "--prompt", "a bag"]) == 2
    assert f"{tmp_path / 'model_index.json'} is not a JSON object" in capsys.readouterr().err
