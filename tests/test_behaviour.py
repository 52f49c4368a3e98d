"""What the methods on contexts do to pictures of the trained shapes model: an edit of a given picture, an object added,
an object taken away, and the measurement of all that."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attnctl_fast as ac
from attnctl_fast.shapes import Scene, detect, load_pipeline, render, score

ROOT = Path(__file__).resolve().parents[1]


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

    how = {"gamma_attn": 5e-4, "gamma_norm": 5e-4, "start": 0.5}
    edits = [ac.Edit(BLUE.prompt, 0.75, **how), ac.Edit(RED.prompt, 0.65, direction=-1, **how)]
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


def test_behaviour_is_measured_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task on two seeds and two steps: the rates are those of its question, the pictures are drawn."""
    from bench.quality import behaviour
    from bench.report import tables

    run: dict[str, Any] = {
        "versions": {"torch": "2", "processor": "a CPU"},
        "settings": {"count": 2, "seed_start": 0, "steps": 2, "guidance_scale": 5.0},
        "tasks": {},
    }
    pipe, rows = load_pipeline(), []
    for name, task in behaviour.TASKS.items():
        quick = replace(task, settings=task.settings[:1])
        run["tasks"][name], results = behaviour.run_task(
            pipe, quick, quick.settings, range(2), 2, steps=2, progress=False
        )
        for arm, rate in ((results[0], "plain"), (results[1], "rows")):
            answers = [
                task.counts(scene, [(seen.colour, seen.shape) for seen in found])
                for scene, found in zip(arm.scenes, arm.detections, strict=True)
            ]
            entry = run["tasks"][name][rate]
            assert (entry if rate == "plain" else entry[0])["rate"] == sum(answers) / 2
        assert any(
            (np.asarray(a) != np.asarray(b)).any() for a, b in zip(results[0].images, results[1].images, strict=True)
        )
        rows += behaviour.strips_of(name, task, results, 2)
    json.dumps(run)
    assert len(rows) == 2 * len(behaviour.TASKS)
    shown = tables.behaviour_table(run).splitlines()
    assert len(shown) == 2 + len(behaviour.TASKS) + 2
    assert len({line.count("|") for line in shown if line.startswith("|")}) == 1


def test_questions_about_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.quality import behaviour

    scene = Scene((("red", "circle"), ("blue", "star")))
    red, blue, ring = ("red", "circle"), ("blue", "star"), ("cyan", "ring")
    assert behaviour.both(scene, [blue, ring, red]) and not behaviour.both(scene, [red])
    assert behaviour.only_first(scene, [red, ring]) and not behaviour.only_first(scene, [red, blue])
    (other,) = behaviour.recoloured(RED).objects
    assert other != red and other[1] == "circle"
    assert behaviour.only_recoloured(RED, [other]) and not behaviour.only_recoloured(RED, [other, ring])
    erased = behaviour.erased([scene], [3])
    pixels, mask = np.asarray(erased["image"][0]), np.asarray(erased["mask_image"][0])
    assert (pixels[mask > 0] == pixels[0, 0]).all() and 0 < (mask > 0).mean() < 0.5
    assert [(seen.colour, seen.shape) for seen in detect(erased["image"][0])] == [red]


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
