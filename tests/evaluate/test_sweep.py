"""Sweeps: the same pictures from any number of processes, nothing lost to a kill, and what they say of mistakes."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

import attnctl_fast as ac
from attnctl_fast import evaluate
from attnctl_fast.cli.model import Settings
from attnctl_fast.evaluate import plan, prompts, scorers
from attnctl_fast.evaluate.main import _parser
from attnctl_fast.evaluate.processes import Processes
from attnctl_fast.evaluate.scorers import Clip, OpenClip
from attnctl_fast.evaluate.store import Log, Store
from attnctl_fast.evaluate.summary import summary, table
from attnctl_fast.evaluate.sweep import _about, _prompts, _record, _shared
from attnctl_fast.shapes import detect, scene_for_seed, score
from attnctl_fast.shapes.evaluate import mcnemar
from attnctl_fast.shapes.scene import scene_for_prompt
from tests.support import judges, tiny, tiny_transformers
from tests.support.marks import full

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ["--model", "shapes", "--device", "cpu"]
LAUNCHER = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCHER += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m"]


@pytest.fixture(autouse=True)
def alone():
    """One thread, as the processes of a launcher have, and no state of Accelerate left behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    PartialState._reset_state()


@pytest.fixture
def sweep(tmp_path):
    """Run a sweep of the shapes model in one step per picture, in this process; later options win."""

    def run(*options, out="out"):
        words = [*SHAPES, "--steps", 1, "--seeds", 2, "--out", tmp_path / out, *options]
        return evaluate.main([str(word) for word in words])

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def pictures(folder):
    return {path.name: path for path in (folder / "pictures").glob("*.png")}


def forked(out, *options, **environment):
    """A sweep in a fork of this process, which spares the imports; it prints into files beside `out`."""

    def run():
        os.environ |= environment
        said = out.with_name(f"{out.name}-{os.environ.get('RANK', '')}")
        sys.stdout, sys.stderr = said.with_suffix(".out").open("w"), said.with_suffix(".err").open("w")
        PartialState._reset_state()
        status = evaluate.main([str(word) for word in (*SHAPES, "--out", out, *options)])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def shared(out, *options):
    """By two processes, as a launcher starts them; what the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [forked(out, *options, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]
    # One that fails would leave the other waiting.
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    errors = [path.read_text() for path in sorted(out.parent.glob("two-?.err"))]
    assert [rank.exitcode for rank in ranks] == [0, 0], errors
    return out.with_name("two-0.out").read_text()


def launched(out, *options):
    """By Accelerate's own launcher."""
    command = [sys.executable, "-m", *LAUNCHER, "attnctl_fast.evaluate", *SHAPES, "--out", out, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("both", [shared, full(launched)])
def test_two_processes_go_on_after_a_killed_one_and_draw_what_one_draws(sweep, tmp_path, capsys, both):
    options = ["--steps", 2, "--seeds", 4, "--method", "plain", "regulation"]
    out = tmp_path / "two"
    first = forked(out, *options)
    while not pictures(out):
        assert first.is_alive(), (tmp_path / "two-.err").read_text()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    stopped = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sweep(*options, out="two") == 2
    assert capsys.readouterr().err.startswith(f"attnctl_fast.evaluate: another sweep is at work in {out}; ")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stopped
    first.kill()
    first.join()
    before = {name: path.stat().st_mtime_ns for name, path in pictures(out).items()}
    assert 0 < len(before) < 8 and not (out / "results.jsonl").exists()

    assert both(out, *options, "--maps").count("s per picture") == 1
    after = pictures(out)
    assert {name: after[name].stat().st_mtime_ns for name in before} == before
    assert {row["rank"] for row in rows(out)} == {0, 1}
    assert not list(out.rglob("*.tmp"))
    assert [path.name for path in sorted(out.glob("maps/*.png"))] == sorted(after)
    assert all(row["words"][:2] == ["a", row["prompt"].split()[1]] for row in rows(out))

    assert sweep(*options, out="one") == 0
    alone = pictures(tmp_path / "one")
    assert len(alone) == 8 and alone.keys() == after.keys()
    for name, path in alone.items():
        assert path.read_bytes() == after[name].read_bytes(), name
    keys = ("file", "place", "prompt", "seed", "method", "strict", "exact", "colours")
    assert [[row[key] for key in keys] for row in rows(tmp_path / "one")] == [
        [row[key] for key in keys] for row in rows(out)
    ]


def test_a_sweep_of_scenes_is_judged_by_the_detector(sweep, tmp_path, capsys):
    assert sweep("--seed-start", 7, "--method", "plain", "regulation", "energy", "--strength", 0.5) == 0
    out = tmp_path / "out"
    found = rows(out)
    assert [(row["place"], row["seed"], row["method"]) for row in found] == [
        (place, 7 + place, method) for place in (0, 1) for method in ("plain", "regulation", "energy")
    ]
    for row in found:
        scene = scene_for_seed(row["seed"])
        assert row["prompt"] == scene.prompt and row["seconds"] > 0 and row["rank"] == 0
        with Image.open(out / row["file"]) as image:
            assert {name: row[name] for name in ("strict", "exact", "colours")} == score(scene, detect(image))._asdict()
    report = json.loads((out / "summary.json").read_text())
    assert list(report["methods"]) == ["plain", "regulation", "energy"]
    assert report["settings"]["strength"] == 0.5 and len(report["settings"]["prompts"]) == 2
    assert [run["versions"]["torch"] for run in report["runs"]] == [torch.__version__]
    assert report["methods"]["energy"]["against_plain"]["strict"]["count"] == 2
    assert "regulation  2 " in capsys.readouterr().out


def test_what_is_missing_is_drawn_and_nothing_else(sweep, tmp_path):
    assert sweep("--method", "plain") == 0
    out = tmp_path / "out"
    results, (first, second) = out / "results-0.jsonl", sorted(pictures(out).values())
    wanted, complete = rows(out), results.read_bytes()
    drawn = second.read_bytes()

    # A line that a kill cut off, of another number of processes, and a picture whose row was never written.
    lines = complete.splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if second.name.encode() in line)
    results.rename(out / "results-3.jsonl")
    (out / "results-3.jsonl").write_bytes(b"".join(lines[:cut]) + lines[cut][:40])
    (out / "results-0.jsonl").write_bytes(b'{"run": "2026-')
    stamps = [path.stat().st_mtime_ns for path in (first, second)]
    assert sweep("--method", "plain") == 0
    assert [path.stat().st_mtime_ns for path in (first, second)] == stamps
    adopted = rows(out)
    assert adopted[0] == wanted[0] and adopted[1]["seconds"] is None
    assert [row["strict"] for row in adopted] == [row["strict"] for row in wanted]

    # A picture that was removed, and a part of one.
    second.unlink()
    part = second.with_name(f"{second.name}.1.tmp")
    part.write_bytes(drawn[:50])
    assert sweep("--method", "plain") == 0
    assert first.stat().st_mtime_ns == stamps[0] and second.read_bytes() == drawn and not part.exists()
    assert rows(out)[1]["seconds"] > 0

    # Nothing at all: no pipeline is needed.
    size = results.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnctl_fast.evaluate.sweep.load", None)
        assert sweep("--method", "plain") == 0
    assert results.stat().st_size == size


def test_a_picture_that_fails_is_a_row_and_tried_again(sweep, tmp_path, monkeypatch, capsys):
    draw = plan.draw

    def failing(pipe, settings):
        if settings.seed == 0:
            raise RuntimeError("out of memory\nmore of it")
        return draw(pipe, settings)

    monkeypatch.setattr(plan, "draw", failing)
    assert sweep("--method", "plain") == 1
    captured = capsys.readouterr()
    assert "1 of 2 pictures failed" in captured.err and "1 (1 failed)" in captured.out
    bad, good = rows(tmp_path / "out")
    assert bad["error"] == "RuntimeError: out of memory" and "strict" not in bad and "strict" in good

    monkeypatch.setattr(plan, "draw", draw)
    stamp = (tmp_path / "out" / good["file"]).stat().st_mtime_ns
    assert sweep("--method", "plain") == 0
    assert ["error" in row for row in rows(tmp_path / "out")] == [False, False]
    assert (tmp_path / "out" / good["file"]).stat().st_mtime_ns == stamp


def test_an_interruption_keeps_what_is_drawn(sweep, tmp_path, monkeypatch, capsys):
    draw = plan.draw

    def interrupted(pipe, settings):
        if settings.seed == 1:
            raise KeyboardInterrupt
        return draw(pipe, settings)

    monkeypatch.setattr(plan, "draw", interrupted)
    assert sweep("--method", "plain") == 130
    assert "the same command goes on" in capsys.readouterr().err
    (kept,) = pictures(tmp_path / "out").values()
    stamp = kept.stat().st_mtime_ns
    monkeypatch.setattr(plan, "draw", draw)
    assert sweep("--method", "plain") == 0
    assert kept.stat().st_mtime_ns == stamp and len(rows(tmp_path / "out")) == 2


def test_prompts_have_targets_and_seeds_of_their_own(sweep, tmp_path):
    lines = [
        "# two objects",
        "",
        '{"prompt": "a red circle and a blue star", "targets": ["circle", "star"], "seeds": [5, 3]}',
        '{"prompt": "a green ring and a cyan cross", "groups": ["green+ring", "cyan+cross"], "targets": ["ring"]}',
        "a red circle",
    ]
    (tmp_path / "prompts").write_text("\n".join(lines))
    layers = ["--layers", "down_blocks.0", "up_blocks.2"]
    given = ["--prompts", tmp_path / "prompts", "--seeds", 1, "--seed-start", 9]
    assert sweep(*given, "--method", "regulation", "plain", "--targets", "circle", *layers) == 0
    found = rows(tmp_path / "out")
    assert [(row["place"], row["seed"]) for row in found if row["method"] == "plain"] == [
        (0, 5),
        (0, 3),
        (1, 9),
        (2, 9),
    ]

    entries = prompts.read_prompts(tmp_path / "prompts")
    assert entries[1]["groups"] == [("green", "ring"), ("cyan", "cross")]
    base, given = Settings(model="shapes", prompt=""), {"targets": ["circle"]}
    planned = plan.plan(base, given, ["regulation", "plain"], entries, [9])
    targets = [picture.options.get("targets") for picture in planned]
    assert targets == [["circle", "star"], None, ["circle", "star"], None, ["ring"], None, ["circle"], None]
    assert "groups" not in planned[4].options


def test_prompts_have_masks_of_their_own(sweep, tmp_path, capsys):
    Image.fromarray(np.array([[255, 0], [255, 0]], np.uint8)).save(tmp_path / "left.png")
    line = {"prompt": "a red circle and a blue star", "masks": [f"red circle={tmp_path / 'left.png'}"]}
    (tmp_path / "prompts").write_text(json.dumps(line))
    given = ["--prompts", tmp_path / "prompts", "--method", "plain", "dense", "--seeds", 1]
    assert sweep(*given) == 0
    plain, dense = (path.read_bytes() for _, path in sorted(pictures(tmp_path / "out").items(), reverse=True))
    assert plain != dense
    assert sweep(*given) == 0
    (tmp_path / "prompts").write_text(json.dumps(line | {"prompt": "a blue star"}))
    assert sweep(*given, out="other") == 2
    assert "prompt 1: masks holds 'red circle', which is not in the prompt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return judges.clip(tmp_path_factory.mktemp("clip"))


def test_clip_scores_also_pictures_that_were_drawn_before(sweep, tmp_path, clip, capsys):
    assert sweep("--method", "plain", "energy", "--gamma-attn", 1) == 0
    out = tmp_path / "out"
    stamps = {name: path.stat().st_mtime_ns for name, path in pictures(out).items()}
    assert sweep("--method", "plain", "energy", "--gamma-attn", 1, "--clip", clip) == 0
    assert {name: path.stat().st_mtime_ns for name, path in pictures(out).items()} == stamps
    assert "CLIP score" in capsys.readouterr().out

    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    found = rows(out)
    for row in found:
        with Image.open(out / row["file"]) as image, torch.no_grad():
            given = processor(text=[row["prompt"]], images=[image], return_tensors="pt", truncation=True)
            expected = 100 * model(**given).logits_per_image.item() / model.logit_scale.exp().item()
        assert row["clip"] == pytest.approx(expected, rel=1e-4) and 0 < row["clip"] < 100
    assert len({row["clip"] for row in found}) == 4
    figures = json.loads((out / "summary.json").read_text())["methods"]
    one, other = ([row["clip"] for row in found if row["method"] == name] for name in ("plain", "energy"))
    assert figures["plain"]["clip"]["mean"] == pytest.approx(sum(one) / 2)
    gained = sum(after > before for before, after in zip(one, other, strict=True))
    assert figures["energy"]["against_plain"]["clip"]["gained"] == gained


def test_clip_scores_below_zero_are_zero_and_long_prompts_are_cut(clip):
    scorer = Clip(str(clip), torch.device("cpu"))
    image = Image.new("RGB", (48, 64), "red")
    scorer.load()
    subject = scorers.Subject(image, "a red ball " * 30)
    value = scorer(subject)["clip"]
    assert value > 0
    scorer._model.text_projection.weight.data.neg_()
    assert scorer(subject)["clip"] == 0


def _without(path):
    path.unlink()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def _one_less(path):
    weights = load_file(path)
    del weights["text_projection.weight"]
    save_file(weights, path, {"format": "pt"})


def _other_shape(path):
    weights = load_file(path)
    weights["text_projection.weight"] = weights["text_projection.weight"][:3].clone()
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, "Error no file named"),
        (_cut, ""),
        (_one_less, "its weights lack text_projection.weight"),
        (_other_shape, "its text_projection.weight has another shape than its configuration says"),
    ],
)
def test_clip_weights_that_cannot_be_used_are_found_before_anything_is_drawn(
    sweep, tmp_path, clip, capsys, spoil, message
):
    shutil.copytree(clip, tmp_path / "clip")
    spoil(tmp_path / "clip" / "model.safetensors")
    capsys.readouterr()
    assert sweep("--method", "plain", "--clip", tmp_path / "clip") == 2
    # Transformers tells of its own progress before.
    line = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "clip"
    what = "a CLIP model of transformers, such as openai/clip-vit-large-patch14"
    assert line.startswith(f"attnctl_fast.evaluate: --clip '{path}' is not {what}: {message}")
    assert not (tmp_path / "out").exists()


def test_pickled_clip_weights_are_loaded_only_when_told(sweep, tmp_path, clip, capsys):
    assert sweep("--method", "plain") == 0
    shutil.copytree(clip, tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    assert sweep("--method", "plain", "--clip", tmp_path / "clip") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "clip/pytorch_model.bin is a pickle" in line and line.endswith("add --allow-pickle")
    assert sweep("--method", "plain", "--clip", tmp_path / "clip", "--allow-pickle") == 0
    assert "CLIP score" in capsys.readouterr().out


def test_a_pickled_file_of_open_clip_is_refused(tmp_path, monkeypatch):
    library = SimpleNamespace(list_models=lambda: ["ViT-B-32"], list_pretrained=lambda: [])
    monkeypatch.setitem(sys.modules, "open_clip", library)
    monkeypatch.setattr(scorers.util, "find_spec", lambda name: library)
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="weights.pt is a pickle"):
        OpenClip(f"ViT-B-32:{tmp_path / 'weights.pt'}", torch.device("cpu"))
    OpenClip(f"ViT-B-32:{tmp_path / 'weights.pt'}", torch.device("cpu"), allow_pickle=True)
    OpenClip(f"ViT-B-32:{tmp_path / 'weights.safetensors'}", torch.device("cpu"))


def test_an_open_clip_checkpoint_that_does_not_fit_is_found_before_anything_is_drawn(
    sweep, tmp_path, capsys, monkeypatch
):
    def mismatch(*names, **options):
        raise RuntimeError("Error(s) in loading state_dict for CLIP:\n\tMissing key(s)")

    library = SimpleNamespace(
        list_models=lambda: ["ViT-B-32"],
        list_pretrained=lambda: [("ViT-B-32", "openai")],
        create_model_and_transforms=mismatch,
    )
    monkeypatch.setitem(sys.modules, "open_clip", library)
    monkeypatch.setattr(scorers.util, "find_spec", lambda name: library if name == "open_clip" else find_spec(name))
    assert sweep("--method", "plain", "--open-clip", "ViT-B-32:openai") == 2
    assert capsys.readouterr().err == (
        "attnctl_fast.evaluate: --open-clip 'ViT-B-32:openai' is not a model that open_clip can load: "
        "Error(s) in loading state_dict for CLIP:\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_judged_is_a_row_and_tried_again(sweep, tmp_path, monkeypatch, capsys):
    judge = scorers.Detector.__call__
    bad = scene_for_seed(0).prompt

    def failing(self, subject):
        if subject.prompt == bad:
            raise RuntimeError("out of memory\nmore of it")
        return judge(self, subject)

    monkeypatch.setattr(scorers.Detector, "__call__", failing)
    assert sweep("--method", "plain") == 1
    assert "1 of 2 pictures are not judged, pictures/00000-0-plain.png by detector with Ru" in capsys.readouterr().err
    first, second = rows(tmp_path / "out")
    assert first["score_errors"] == {"detector": "RuntimeError: out of memory"} and "strict" not in first
    assert "strict" in second and "score_errors" not in second

    monkeypatch.setattr(scorers.Detector, "__call__", judge)
    assert sweep("--method", "plain") == 0
    assert ["strict" in row and "score_errors" not in row for row in rows(tmp_path / "out")] == [True, True]
    report = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert report["methods"]["plain"]["strict"]["count"] == 2


def test_pictures_are_judged_where_they_are_drawn(sweep, tmp_path, capsys, monkeypatch):
    devices = []

    def clip(model, device, allow_pickle):
        devices.append(device)
        raise OSError("enough")

    monkeypatch.setattr("attnctl_fast.evaluate.sweep.Clip", clip)
    assert sweep("--method", "plain", "--device", "cpu:0", "--clip", "x") == 2
    assert devices == [torch.device("cpu:0")]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the GPU of {device}")
    assert _about(Processes(cpu=True), torch.device("cuda:1"))["device"] == "the GPU of cuda:1"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 8])
def test_every_item_is_one_processes_own(items, count):
    processes, shares = Processes(cpu=True), []
    processes.count = count
    for processes.rank in range(count):
        shares.append(processes.share(range(items)))
    assert sum(shares, []) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_folder_is_one_sweeps_at_a_time(sweep, tmp_path, capsys):
    store = Store(tmp_path / "out")
    store.lock()
    store.lock()
    assert sweep("--method", "plain") == 2
    assert "another sweep is at work in" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.lock"]
    store.close()
    assert sweep("--method", "plain") == 0


def test_pairs_are_counted_by_prompt_and_seed():
    def row(method, seed, **scores):
        return {"place": 0, "seed": seed, "method": method, "seconds": 1.0 + seed, **scores}

    plain = [row("plain", seed, strict=seed == 0, clip=20.0) for seed in range(4)] + [row("plain", 9, error="x")]
    other = [row("tsam", seed, strict=seed > 0, clip=19.0 + seed) for seed in range(4)] + [row("tsam", 9, strict=True)]
    figures = summary(plain + other, ["plain", "tsam"])
    assert figures["plain"]["strict"]["rate"] == 0.25 and figures["plain"]["failed"] == 1
    assert figures["plain"]["seconds"] == {"median": 2.5, "low": 1.75, "high": 3.25}
    against = figures["tsam"]["against_plain"]
    assert against["strict"] == {"gained": 3, "lost": 1, "p_value": mcnemar(3, 1), "count": 4}
    assert (against["clip"]["gained"], against["clip"]["lost"]) == (2, 1)
    assert "80.0 % (+3 -1, p = 0.6)" in table(figures) and "20.50 (+2 -1, p = 1)" in table(figures)


def test_a_log_goes_on_after_a_cut_line(tmp_path):
    (tmp_path / "results-0.jsonl").write_text('{"run": "a", "kind": "picture", "fi')
    log = Log(tmp_path / "results-0.jsonl", "b", 0, {"device": "cpu"})
    log.write("picture", {"file": "x", "seconds": 1.0})
    log.write("picture", {"file": "y", "error": "no"})
    assert [row["kind"] for row in Store(tmp_path).records()] == ["run", "picture", "picture"]
    assert (tmp_path / "results-0.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("prompt", ["", "a red", "a red circle and", "a red circle and a red star", "two red circles"])
def test_prompts_that_are_no_scene(prompt):
    assert scene_for_prompt(prompt) is None


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_prompts_of_scenes(objects):
    scene = scene_for_seed(4, objects)
    assert scene_for_prompt(scene.prompt) == scene


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", 2], "steps is 1 there and 2 here"),
        (["--method", "plain", "energy"], "methods is .*plain.* there and .*energy.* here"),
        (["--seeds", 3], "seeds is .0, 2. there and .0, 3. here"),
        (["--seed-start", 1], "seeds is .0, 2. there and .1, 2. here"),
        (["--prompts", "ONE"], "it has 2 prompts, this one 1"),
        (["--prompts", "TWO"], "prompt 1 is .*a cyan square and a red cross.* there and .*a red circle.* here"),
    ],
)
def test_other_settings_are_refused(sweep, tmp_path, capsys, options, message):
    store = Store(tmp_path / "out")
    arguments = _parser().parse_args([*SHAPES, "--steps", "1", "--seeds", "2", "--method", "plain"])
    base, given = _shared(arguments, Processes(cpu=True))
    store.claim(_record(base, given, ["plain"], _prompts(arguments, given, range(2)), range(2)))
    (tmp_path / "ONE").write_text("a red circle\n")
    (tmp_path / "TWO").write_text("a red circle\na blue star\n")
    given = [tmp_path / word if word in ("ONE", "TWO") else word for word in options]
    assert sweep("--method", "plain", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnctl_fast.evaluate: ") and "holds another sweep" in line
    assert re.search(message, line), line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pictures", "sweep.json"]


@pytest.mark.parametrize(
    ("options", "lines", "message"),
    [
        ((), [], "prompts holds no prompt; write one a line"),
        ((), ['{"prompt": '], "line 1 is not JSON"),
        ((), ["a red circle", '{"text": "a"}'], "line 2 has the field 'text'; known are prompt, "),
        ((), ['{"targets": ["a"]}'], "has no field 'prompt'"),
        ((), ['{"prompt": 3}'], "prompt is 3; it must be text"),
        ((), ['{"prompt": "a", "targets": "a"}'], "targets is 'a'; it must be a list of texts"),
        ((), ['{"prompt": "a", "pairs": ["red"]}'], "pairs must be MODIFIER:NOUN"),
        ((), ['{"prompt": "a", "token_weights": ["a=b"]}'], "token_weights must be WORD=FACTOR.*got 'a=b'"),
        ((), ['{"prompt": "a", "seeds": [1, 1]}'], "seeds is .1, 1.; it must be a list of whole numbers, none twice"),
        ((), ['{"prompt": "a", "seeds": [-1]}'], "seeds must be a whole number from 0 to"),
        ((), ["a red circle"], "prompt 1 .'a red circle'.: --method regulation needs --targets"),
        ((), ['{"prompt": "a red circle", "targets": ["cat"]}'], "prompt 1: targets holds 'cat', which is not in the"),
        (("--method", "plain", "--targets", "a"), ["a"], "--targets is an option of .* and excite, not of plain"),
        (("--method", "plain", "energy", "plain"), ["a"], "--method names plain twice"),
        (("--targets", "circle", "--layers", "mid_block.7"), ["a circle"], "mid_block.7"),
        (("--device", "abacus"), None, "abacus"),
        (("--targets", "circle"), None, "--targets goes with --prompts; the scenes of --model shapes have their own"),
        (("--model", "/nowhere"), None, "--model /nowhere needs --prompts"),
        (("--model", "/nowhere", "--method", "plain"), ["a"], "/nowhere"),
        (("--clip", "/no/clip"), None, "--clip '/no/clip' is not a CLIP model"),
        (
            ("--open-clip", "ViT-B-32:openai"),
            None,
            "--open-clip needs open_clip_torch; run: pip install open_clip_torch",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_is_drawn(sweep, tmp_path, capsys, monkeypatch, options, lines, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(scorers.util, "find_spec", lambda name: None if name == "open_clip" else find_spec(name))
    given = []
    if lines is not None:
        (tmp_path / "prompts").write_text("\n".join(lines))
        given = ["--prompts", tmp_path / "prompts"]
    assert sweep(*given, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attnctl_fast.evaluate: ") and re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["unet", "sdxl", *tiny_transformers.KINDS])
def test_words_are_found_beforehand_where_the_call_finds_them(kind):
    """The tokens that are checked before anything is drawn are those that a call with the prompt alone has."""
    seen, prompt = [], "A photo of a pineapple and an Octopus"

    class Look(ac.Method):
        layers = None

        def start(self, call, sites):
            seen.append(call.prompts)
            raise RuntimeError("enough")

    if kind in tiny_transformers.KINDS:
        pipe = tiny_transformers.pipeline(kind)
    else:
        pipe = tiny.pipeline("StableDiffusionXLPipeline", kind="sdxl") if kind == "sdxl" else tiny.pipeline()
    if kind == "pixart_sigma":
        pipe.transformer.register_to_config(sample_size=32)
    options = {"text_encoder_out_layers": (0, 1, 2)} if kind.startswith("flux2") else {}
    with ac.control(pipe, Look()), pytest.raises(RuntimeError, match="enough"):
        pipe(prompt=prompt, **options)
    found, (expected,) = plan.prompts_of(pipe, prompt), seen
    assert (found.rows, found.length) == (expected.rows, expected.length)
    for word in ("octopus", "a pineapple"):
        assert found.occurrences(word, 0, "targets") == expected.occurrences(word, 0, "targets")
    with pytest.raises(ValueError, match="'apple', which is not in the prompt"):
        found.find("apple", 0, "targets")


def test_pipelines_whose_tokens_are_unknown_are_not_checked():
    pipe = tiny.pipeline()
    pipe.tokenizer = None
    assert plan.prompts_of(pipe, "a bag") is None


@pytest.mark.parametrize("kind", ["flux", full("sd3"), full("sana")])
def test_a_sweep_on_a_transformer(sweep, tmp_path, capsys, monkeypatch, kind):
    tiny_transformers.of_any_size(monkeypatch)
    folder = tiny_transformers.saved(kind, tmp_path / "model")
    lines = [{"prompt": tiny_transformers.PROMPT, "targets": ["bag", "an apple"]}, {"prompt": "a photo of a dog"}]
    (tmp_path / "prompts").write_text("\n".join(map(json.dumps, lines)))
    given = ["--model", folder, "--prompts", tmp_path / "prompts", "--height", 32, "--width", 32, "--seeds", 1]
    given += ["--method", "plain", "regulation", "--targets"]
    assert sweep(*given, "bag") == 2
    assert "prompt 2: targets holds 'bag', which is not in the prompt" in capsys.readouterr().err
    assert sweep(*given, "dog") == 0
    drawn = {name: path.read_bytes() for name, path in pictures(tmp_path / "out").items()}
    assert len(set(drawn.values())) == 4


def test_a_negative_prompt_of_one_line_must_have_an_effect(sweep, tmp_path, capsys):
    lines = [{"prompt": "a red circle"}, {"prompt": "a red circle", "negative_prompt": "a star"}]
    (tmp_path / "prompts").write_text("\n".join(map(json.dumps, lines)))
    assert sweep("--prompts", tmp_path / "prompts", "--method", "plain", "--guidance-scale", 1) == 2
    error = capsys.readouterr().err
    assert "StableDiffusionPipeline reads a negative prompt only with guidance_scale above 1" in error


def test_prompts_that_cannot_be_read(sweep, tmp_path, capsys):
    assert sweep("--prompts", tmp_path / "none") == 2
    assert capsys.readouterr().err.endswith("none cannot be read: No such file or directory\n")
    (tmp_path / "latin").write_bytes("ein Möwe".encode("latin-1"))
    assert sweep("--prompts", tmp_path / "latin") == 2
    assert "latin is not UTF-8 text" in capsys.readouterr().err


def test_folders_of_something_else_are_left_alone(sweep, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("mine")
    assert sweep("--method", "plain") == 2
    assert "holds other files and no sweep; choose another --out" in capsys.readouterr().err
    assert sweep("--method", "plain", "--out", tmp_path / "out" / "letter") == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert sweep("--method", "plain", "--out", tmp_path / "out" / "letter" / "further") == 2
    assert "letter/further" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter"]


@pytest.mark.parametrize("wrong", [["--method", "paint"], ["--clip", "a", "--open-clip", "b:c"], ["--seeds", "0"]])
def test_wrong_usage_exits_with_two_and_only_the_first_process_says_so(wrong, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*SHAPES, *wrong])
    assert stopped.value.code == 2 and "usage: attnctl_fast.evaluate" in capsys.readouterr().err
    # A launcher kills the first process, which may not have said yet what is wrong, once another one has failed.
    monkeypatch.setenv("RANK", "1")
    assert evaluate.main([*SHAPES, *wrong]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_processes_that_are_not_joined_are_refused(sweep, tmp_path, capsys, monkeypatch):
    Processes(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweep() == 2
    assert "2 processes were started, which Accelerate does not join" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_only_another_process_met_is_raised_here_too(monkeypatch):
    processes = Processes(cpu=True)
    monkeypatch.setattr("attnctl_fast.evaluate.processes.gather_object", lambda mine: [*mine, "no such device"])
    with pytest.raises(ValueError, match="no such device"):
        processes.together(lambda: 3)
    with pytest.raises(OSError, match="own"):
        processes.together(lambda: (_ for _ in ()).throw(OSError("own")))
    monkeypatch.setattr("attnctl_fast.evaluate.processes.gather_object", lambda mine: [*mine, None])
    assert processes.together(lambda: 3) == processes.by_first(lambda: 3) == 3


def test_missing_extras_are_named_with_the_remedy(sweep, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "accelerate" else object())
    assert sweep() == 2
    assert 'accelerate not installed; run: pip install "attnctl-fast[diffusers]"' in capsys.readouterr().err
