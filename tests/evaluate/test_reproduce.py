"""A paper's evaluation in one command: its prompts, every metric, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnctl_fast.cli import main
from attnctl_fast.cli.method_options import METHODS, make_method
from attnctl_fast.cli.model import Settings
from attnctl_fast.evaluate.coco import read_coco
from attnctl_fast.evaluate.intervals import of_ratio, of_share
from attnctl_fast.evaluate.plan import in_turns, plan
from attnctl_fast.evaluate.presets import ANIMALS, COLOURS, OBJECTS, PRESETS, attend_and_excite_prompts
from attnctl_fast.evaluate.store import Store
from attnctl_fast.evaluate.summary import merged, summary, table
from tests.support import judges, tiny, vision

ROOT = Path(__file__).resolve().parents[2]


def test_the_prompts_of_attend_and_excite() -> None:
    entries = attend_and_excite_prompts()
    texts = [entry["prompt"] for entry in entries]
    assert len(texts) == len(set(texts)) == 276 and (len(ANIMALS), len(OBJECTS), len(COLOURS)) == (12, 12, 11)
    kinds = Counter(tuple(sorted(word in ANIMALS for word in entry["targets"])) for entry in entries)
    assert kinds == {(True, True): 66, (False, True): 144, (False, False): 66}
    assert {"a cat and a dog", "a rabbit and a mouse", "a elephant with a crown"} < set(texts)
    for entry in entries:
        words = entry["prompt"].split()
        assert [word for word in words if word in ANIMALS + OBJECTS] == entry["targets"]
        coloured = [pair for pair in zip(words, words[1:], strict=False) if pair[0] in COLOURS]
        assert coloured == entry.get("pairs", []) and (entry.get("skip") == ["syngen"]) == (not coloured)
        assert [" ".join(group) for group in entry["groups"]] == [text.removeprefix("a ") for text in entry["edit"]]
    assert {pair[0] for entry in entries for pair in entry.get("pairs", [])} == set(COLOURS)
    assert texts == [entry["prompt"] for entry in attend_and_excite_prompts()]


def test_the_papers_overheads_are_those_of_the_benchmarks() -> None:
    from bench.pictures.ours import PUBLISHED, SOURCE

    table = PRESETS["table1"]
    assert {METHODS[name].cls: percent for name, percent in table.overheads.items()} == PUBLISHED
    assert table.source == SOURCE


def test_coco_files_give_prompts_targets_and_boxes(tmp_path: Path) -> None:
    images = [{"id": 7, "width": 200, "height": 100}, {"id": 8, "width": 50, "height": 50}]
    captions = [
        {"image_id": 7, "caption": " A dog beside a Cell Phone.\n"},
        {"image_id": 7, "caption": "another one"},
        {"image_id": 8, "caption": "nothing but catkins"},
    ]
    categories = [{"id": 1, "name": "cell phone"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}]
    boxes = [
        {"image_id": 7, "category_id": 2, "bbox": [100, 0, 100, 50]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 10, 10]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 10, 10]},
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    (entry,) = read_coco([tmp_path / "captions.json", tmp_path / "boxes.json"])
    assert entry == {
        "prompt": "A dog beside a Cell Phone.",
        "targets": ["dog", "cell phone"],
        "groups": [("dog",), ("cell phone",)],
        "boxes": [("dog", (0.5, 0.0, 1.0, 0.5))],
    }
    with pytest.raises(ValueError, match="holds no caption that names one of its 0 categories"):
        read_coco([tmp_path / "captions.json"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON: .*; a file of lines must not end in .json"),
        ("[1]", "no object; a file of lines must not end in .json"),
        ('{"images": []}', "is not in COCO's form: KeyError 'annotations'"),
        ('{"annotations": [{"caption": "a"}]}', "is not in COCO's form: KeyError 'image_id'"),
        ('{"annotations": [{"image_id": 1, "category_id": 1, "bbox": "x"}]}', "is not in COCO's form: ValueError"),
    ],
)
def test_coco_files_that_cannot_be_read(tmp_path: Path, text: str, message: str, capsys: Any) -> None:
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco([tmp_path / "prompts.json"])


def test_boxes_are_masks(tmp_path: Path) -> None:
    Image.fromarray(np.repeat(np.array([[0] * 16 + [255] * 48], np.uint8), 64, 0)).save(tmp_path / "ball.png")
    file = make_method("dense", {"masks": [("ball", str(tmp_path / "ball.png"))]}, "a ball")
    box = make_method("dense", {"boxes": [("ball", (0.25, 0.0, 1.0, 1.0))]}, "a ball")
    assert repr(file) == repr(box)


def command(*options: Any) -> list[str]:
    return ["reproduce", "table1", "--device", "cpu", *map(str, options)]


def test_on_the_shipped_model_killed_and_gone_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = command("--model", "shapes", "--steps", 1, "--seeds", 2, "--out", out, "--maps")
    child = os.fork()
    if not child:
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        os._exit(main(given))
    while len(list(out.glob("pictures/*.png"))) < 3:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = {path: path.stat().st_mtime_ns for path in out.glob("pictures/*.png")}
    assert 3 <= len(there) < 10 and not (out / "report.html").exists()

    assert main(given) == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    said = capsys.readouterr().out
    assert "in the paper" in said and "+48.8 %" in said and "+414.6 %" in said and PRESETS["table1"].source in said
    figures = json.loads((out / "summary.json").read_text())["methods"]
    assert list(figures) == list(PRESETS["table1"].methods)
    assert {name: entry["pictures"] for name, entry in figures.items()} == dict.fromkeys(figures, 2)
    assert all("strict" in entry and "clip" not in entry for entry in figures.values())
    # No map of the composition, whose attention cannot be captured.
    assert len(list(out.glob("maps/*.png"))) == 8
    page = (out / "report.html").read_text()
    assert "+119.5 %" in page and '"cyan"' in page

    # Everything is there: nothing is loaded, and the page can be written anew with the pictures in it.
    size = (out / "results-0.jsonl").stat().st_size
    assert main([*given, "--embed"]) == 0
    assert (out / "results-0.jsonl").stat().st_size == size
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion and all judges, tiny and with random weights."""
    folder = tmp_path_factory.mktemp("models")
    tiny.pipeline().save_pretrained(folder / "model")
    judges.clip(folder / "clip")
    judges.owl(folder / "owl")
    judges.captions(folder / "blip")
    judges.answers(folder / "vilt", {"yes": 1.0, "no": 0.0})
    things = [
        {"prompt": "a cat and a dog", "targets": ["cat", "dog"], "edit": ["a cat", "a dog"], "skip": ["syngen"]},
        {"prompt": "a bag and a red apple", "targets": ["bag", "apple"], "pairs": ["red:apple"], "edit": ["a bag"]},
    ]
    things[1]["boxes"] = ["bag=0,0,0.5,1", "apple=0.5,0,1,1"]
    (folder / "prompts").write_text("\n".join(map(json.dumps, things)))
    question = {"question": "is it there?", "answer": "yes", "choices": ["yes", "no"]}
    asked = [question | {"caption": thing["prompt"]} for thing in things]
    asked.append(asked[0] | {"answer": "no"})
    (folder / "questions").write_text(json.dumps(asked))
    (folder / "real").mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "real" / f"{seed}.png")
    return folder


def through_all(folder: Path, out: Path) -> list[str]:
    given = command("--model", folder / "model", "--prompts", folder / "prompts", "--seeds", 2, "--steps", 2)
    given += ["--owl", str(folder / "owl"), "--clip", str(folder / "clip"), "--captions", str(folder / "blip")]
    return [*given, "--questions", str(folder / "questions"), "--vqa", str(folder / "vilt"), "--out", str(out)]


METRICS = {"detected", "found", "clip", "image_text", "text_text", "questions"}


def test_through_the_metrics_of_transformers(folder: Path, tmp_path: Path) -> None:
    given = through_all(folder, tmp_path / "out")
    assert main([*given, "--method", "plain", "regulation", "syngen"]) == 0
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    assert [entry["pictures"] for entry in figures.values()] == [4, 4, 2]
    for method, entry in figures.items():
        assert entry.keys() >= METRICS, method
    assert figures["plain"]["questions"]["mean"] == 0.75 and figures["syngen"]["questions"]["mean"] == 1
    assert 0 < figures["plain"]["clip"]["mean"] < 100 and figures["plain"]["placed"]["count"] == 2
    assert figures["regulation"]["overhead"]["count"] == 3


@pytest.mark.skipif(not vision.there(), reason=f"needs {vision.NEEDED}")
def test_through_every_metric(folder: Path, tmp_path: Path) -> None:
    """LPIPS and FID as well, in a process that sees torchvision, by all methods of the table."""
    given = [*through_all(folder, tmp_path / "out"), "--lpips", "squeeze", "--fid", folder / "real", "--fid-dims", 64]
    environment = os.environ | {"TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.support.vision", *map(str, given), "--allow-pickle"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LPIPS" in done.stdout and "FID" in done.stdout
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    assert list(figures) == list(PRESETS["table1"].methods)
    for method, entry in figures.items():
        assert entry.keys() >= METRICS | {"fid"}, method
        assert ("lpips" in entry) == (method != "plain") and entry["fid"]["value"] > 0
    moved = {method: entry["lpips"]["mean"] for method, entry in figures.items() if method != "plain"}
    assert all(0 < distance < 1 for distance in moved.values())


def test_intervals_are_those_of_the_prompts() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        # Forty prompts whose pictures are alike, of ten each: as good as forty pictures, not four hundred.
        chances = rng.random(40)
        hits = [bool(rng.random() < 0.02) ^ bool(chance < 0.3) for chance in chances for _ in range(10)]
        low, high = of_share(hits, [prompt for prompt in range(40) for _ in range(10)])
        inside += low <= 0.3 * 0.98 + 0.7 * 0.02 <= high
    assert 0.92 <= inside / 400 <= 0.98
    inside = 0
    for _ in range(400):
        centres = np.repeat(rng.normal(5.0, 1.0, 12), 5)
        values = (centres + rng.normal(0, 0.5, 60)).tolist()
        low, high = of_ratio(values, [1.0] * 60, np.repeat(range(12), 5).tolist())  # type: ignore[misc]
        inside += low <= 5.0 <= high
    assert 0.92 <= inside / 400 <= 0.98
    assert of_share([True] * 60, [0] * 60)[0] < 0.3 and of_share([True] * 60, range(60))[0] > 0.9
    assert of_ratio([1.0] * 3, [1.0] * 3, range(3)) is None


def test_overhead_is_measured_in_turns() -> None:
    def row(method: str, place: int, seconds: float, run: str = "a") -> dict[str, Any]:
        return {"method": method, "place": place, "seed": 0, "seconds": seconds, "run": run, "rank": 0}

    # The machine is twice as slow at odd prompts, a method's first picture takes long, and one is of another run.
    plain = [row("plain", place, 1.0 + place % 2 + 9 * (place == 0)) for place in range(9)]
    other = [row("tsam", place, 1.5 * (1.0 + place % 2) + 99 * (place == 0)) for place in range(8)]
    figures = summary([*plain, *other, row("tsam", 8, 77.0, "b"), row("tsam", 8, 77.0, "b")], ["plain", "tsam"])
    assert figures["tsam"]["overhead"]["count"] == 7
    assert figures["tsam"]["overhead"]["percent"] == pytest.approx(50)
    assert figures["tsam"]["overhead"]["interval"] == pytest.approx([50, 50])
    assert "+50.0 %" in table(figures) and "in the paper" not in table(figures)


def test_pictures_are_drawn_in_turns() -> None:
    settings = Settings(model="shapes", prompt="")
    planned = plan(
        settings, {}, ["plain", "energy", "tsam"], [{"prompt": "a"}, {"prompt": "b", "skip": ["tsam"]}], [0, 1]
    )
    drawn = [(picture.place, picture.settings.seed, picture.method) for picture in in_turns(planned)]
    assert drawn == [
        *((0, 0, method) for method in ("plain", "energy", "tsam")),
        *((0, 1, method) for method in ("tsam", "energy", "plain")),
        *((1, 0, method) for method in ("plain", "energy")),
        *((1, 1, method) for method in ("energy", "plain")),
    ]
    with pytest.raises(ValueError, match="there is nothing to draw: every prompt skips tsam"):
        plan(settings, {}, ["tsam"], [{"prompt": "b", "skip": ["tsam"]}], [0])


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: Any) -> str:
        assert main(command("--model", "shapes", "--out", tmp_path / "out", *options)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("attnctl-fast reproduce: ") and not (tmp_path / "out").exists()
        return line

    assert "--captions compares by CLIP; add --clip" in said("--captions", "x")
    assert "--questions and --vqa go together" in said("--vqa", "x")
    assert "--fid" in said("--fid", tmp_path)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b").write_text("a red circle")
    assert "--prompts takes one file of lines" in said("--prompts", tmp_path / "a.json", tmp_path / "b")
    (tmp_path / "b").write_text('{"prompt": "a", "skip": ["paint"]}')
    assert "skip holds 'paint'; methods are" in said("--prompts", tmp_path / "b")


def test_records_of_maps_are_those_of_pictures(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "pictures").mkdir()
    lines: list[dict[str, Any]] = []
    for name in "abc":
        (tmp_path / "pictures" / name).touch()
        lines.append({"run": "1", "kind": "picture", "file": f"pictures/{name}", "seconds": 1.0})
    lines.append({"run": "1", "kind": "maps", "file": "pictures/a", "error": "not yet"})
    lines.append({"run": "1", "kind": "maps", "file": "pictures/a", "words": ["a"]})
    lines.append({"run": "1", "kind": "maps", "file": "pictures/b", "error": "no"})
    (tmp_path / "results-0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert store.unmapped(["pictures/a", "pictures/b", "pictures/c", "pictures/d"]) == ["pictures/b", "pictures/c"]
    pictures = [SimpleNamespace(file=f"pictures/{name}") for name in "abc"]
    one, other, third = merged(store, pictures, [])  # type: ignore[arg-type]
    assert one["words"] == ["a"] and "score_errors" not in one
    assert other["score_errors"] == {"maps": "no"} and "words" not in other and "words" not in third
