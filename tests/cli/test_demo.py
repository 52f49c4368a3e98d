"""`attnctl-fast demo`, and how it sums up times."""

import json

import pytest
from PIL import Image

from attnctl_fast import cli
from attnctl_fast.cli import demo
from attnctl_fast.cli.report import overhead, spread
from attnctl_fast.shapes import evaluate, load_pipeline, scene_for_seed


def test_demo_writes_the_picture_and_every_result(untrained, tmp_path, capsys, monkeypatch):
    def load(model, **options):
        return load_pipeline(model, weights=untrained if model == "unet" else None, **options)

    monkeypatch.setattr(demo, "load_pipeline", load)
    # Nothing is found but in the third of the UNet's pictures, which show what was asked for once controlled. Arms are
    # drawn in turn, backwards at every other batch, and the reference has two batches.
    monkeypatch.setattr(evaluate, "detect", lambda image: found.pop(0))
    scenes = [scene_for_seed(seed) for seed in (7, 8, 9)]
    hit = [evaluate.Detection(colour, shape, (0, 0, 9, 9), 1.0) for colour, shape in scenes[2].objects]
    found = [*[[]] * 12, [], hit, hit, hit[:1], hit, *[[]] * 6]
    arguments = ["--count", "3", "--seed-start", "7", "--steps", "2", "--batch-size", "1", "--out", str(tmp_path)]
    assert cli.main(["demo", *arguments]) == 0
    out = capsys.readouterr().out
    assert not found
    unet, transformer = out.split("joint transformer")
    lines = {line.split("  ")[0]: line for line in unet.splitlines()}
    for name in ("attention regulation", "conform", "second one composed"):
        assert "33 % (+1 -0)" in lines[name]
    assert "0 %" in lines["plain"] and "0 %" in lines["first object only"]
    assert "%" in lines["same, by autograd"]
    assert transformer.count("0 % (+0 -0)") == 3

    report = json.loads((tmp_path / "demo.json").read_text())
    assert (
        report["settings"]["seeds"] == [7, 9]
        and report["settings"]["regulation"]["strength"] == evaluate.TUNED["strength"]
    )
    assert list(report["models"]) == ["unet", "mmdit"]
    for model in report["models"].values():
        assert [entry["prompt"] for entry in model["pictures"]] == [scene.prompt for scene in scenes]
    report = report | report["models"]["unet"]
    assert [entry["attention regulation"]["strict"] for entry in report["pictures"]] == [False, False, True]
    assert report["pictures"][2]["attention regulation"]["found"] == [" ".join(pair) for pair in scenes[2].objects]
    for name in ("attention regulation", "conform", "second one composed"):
        assert (report["rates"][name]["strict"]["gained"], report["rates"][name]["strict"]["lost"]) == (1, 0)
    assert [len(timing["batches"]) for timing in report["timings"].values()] == [3, 3, 3, 3, 3, 2]
    assert report["settings"]["conform"] == evaluate.CONTRASTED
    assert report["pixel_difference_to_autograd"]["mean"] < 1
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB" and picture.width > 2 * 5 * 264


def test_overhead_is_the_median_over_pairs():
    assert overhead([1.0, 2.0, 4.0], [1.5, 2.0, 5.0])["median"] == pytest.approx(25)
    assert overhead([1.0, 2.0, 4.0], [3.0])["median"] == pytest.approx(200)
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
