"""What the methods on contexts do to pictures of the trained shapes model: an edit of a given picture, an object added,
an object taken away."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnctl_fast as ac
from attnctl_fast.shapes import Scene, detect, load_pipeline, render, score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("edit_image", ROOT / "examples" / "edit_image.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RED, BLUE = Scene((("red", "circle"),)), Scene((("blue", "circle"),))


def test_a_given_picture_is_edited(pipe: Any, example: Any) -> None:
    """Inverted and drawn again it is the same picture; with edits its object has another colour at the same place."""
    pictures = [render(RED, seed=seed).image for seed in range(4)]
    captions = [RED.prompt] * 4
    noise = example.invert(pipe, pictures, captions, 25)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler"
    again = pipe(captions, latents=noise, num_inference_steps=25, guidance_scale=1.0).images
    for before, after in zip(pictures, again, strict=True):
        difference = np.asarray(before, np.float64) - np.asarray(after, np.float64)
        assert np.abs(difference).mean() < 8

    how = {"gamma_attn": 5e-4, "gamma_norm": 5e-4, "start": 0.1}
    edits = [ac.Edit(BLUE.prompt, 1.0, **how), ac.Edit(RED.prompt, 0.7, direction=-1, **how)]
    edited = example.edit(pipe, pictures, captions, edits, steps=25, guidance_scale=5.0)
    found = [detect(picture) for picture in edited]
    hits = [score(BLUE, seen).exact for seen in found]
    assert sum(hits) >= 3
    for before, seen, hit in zip(pictures, found, hits, strict=True):
        if hit:
            np.testing.assert_allclose(seen[0].box, detect(before)[0].box, atol=4)


def test_inversion_restores_the_scheduler(pipe: Any, example: Any) -> None:
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="prompt"):
        example.invert(pipe, [render(RED, seed=0).image], 3, 2)
    assert pipe.scheduler is scheduler


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any, capsys: Any) -> None:
    out = tmp_path / "edited.png"
    arguments = ["--add", "a blue circle", "--remove", "a red circle", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["edit_image.py", *arguments])
    example.main()
    assert out.is_file() and str(out) in capsys.readouterr().out
    for bad in (["--model", "m", "--add", "a"], []):
        monkeypatch.setattr(sys, "argv", ["edit_image.py", *bad])
        with pytest.raises(SystemExit) as stopped:
            example.main()
        assert stopped.value.code == 2


@pytest.mark.parametrize("direction", [1, -1])
def test_objects_are_added_and_taken_away(pipe: Any, direction: int) -> None:
    """Over eight seeds, with the settings of the README, against the plain prompt."""
    from attnctl_fast.shapes.evaluate import Arm, first_object, interleaved, second_object

    options = first_object if direction > 0 else None
    arms = {"plain": Arm(options=options), "edited": Arm(second_object(direction), options=options)}
    results = interleaved(pipe, range(8), arms, batch_size=8, num_inference_steps=15, progress=False)
    there = {
        name: sum(
            scene.objects[1] in [(seen.colour, seen.shape) for seen in found]
            for scene, found in zip(result.scenes, result.detections, strict=True)
        )
        for name, result in results.items()
    }
    assert direction * (there["edited"] - there["plain"]) >= 2
