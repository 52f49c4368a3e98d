"""Judges of pictures: models with random weights against the library's own answers, and pictures of known answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl_fast.cli.model import Settings
from attnctl_fast.evaluate import weights
from attnctl_fast.evaluate.captions import Captions
from attnctl_fast.evaluate.frechet import Fid
from attnctl_fast.evaluate.judging import measure_methods, measured, unmeasured
from attnctl_fast.evaluate.owl import Owl
from attnctl_fast.evaluate.perceptual import Lpips
from attnctl_fast.evaluate.plan import Picture
from attnctl_fast.evaluate.questions import Questions, read_questions
from attnctl_fast.evaluate.scorers import Clip, Subject
from attnctl_fast.evaluate.store import Log, Store
from tests.support import judges

CPU = torch.device("cpu")
PROMPT = "a red ball and a dog"


def picture(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.owl(tmp_path_factory.mktemp("owl"))


def test_owl_counts_a_box_for_its_likeliest_phrase(owl: Path) -> None:
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    phrases = ["ball", "dog", "cat", "bag", "apple"]
    model, processor = Owlv2ForObjectDetection.from_pretrained(owl).eval(), Owlv2Processor.from_pretrained(owl)
    texts = [[f"a photo of a {phrase}" for phrase in phrases]]
    with torch.no_grad():
        logits = model(**processor(text=texts, images=picture(), return_tensors="pt", truncation=True)).logits[0]
    best = {int(index): 0.0 for index in range(len(phrases))}
    for score, index in zip(*(part.tolist() for part in logits.sigmoid().max(-1)), strict=True):
        best[index] = max(best[index], score)
    certain = sorted(best.values())
    threshold = (certain[-1] + certain[-2]) / 2
    judge = Owl(str(owl), CPU, threshold)
    judge.load()
    assert judge(Subject(picture(), PROMPT, phrases)) == {"detected": False, "found": 0.2}
    assert judge(Subject(picture(), PROMPT, [phrases[max(best, key=best.__getitem__)]]))["detected"]
    assert judge(Subject(picture(), PROMPT)) == {}


@pytest.mark.parametrize(
    ("ball", "dog", "expected"),
    [
        # In pixels of a picture of 64x48, left, top, right, bottom; the ball belongs into the left half.
        ((0, 0, 32, 48), (40, 10, 60, 40), {"detected": True, "found": 1.0, "placed": 1.0}),
        ((32, 0, 64, 48), (40, 10, 60, 40), {"detected": True, "found": 1.0, "placed": 0.0}),
        ((0, 0, 32, 26), (40, 10, 60, 40), {"detected": True, "found": 1.0, "placed": 1.0}),
        ((0, 0, 32, 22), None, {"detected": False, "found": 0.5, "placed": 0.0}),
        (None, None, {"detected": False, "found": 0.0, "placed": 0.0}),
    ],
)
def test_owl_on_known_boxes(
    owl: Path, ball: tuple[int, ...] | None, dog: tuple[int, ...] | None, expected: dict[str, Any]
) -> None:
    """What the model says, replaced; all that is made of it is the library's. OWLv2 sees the picture padded to a
    square of 64."""
    logits, boxes = torch.full((1, 4, 2), -9.0), torch.zeros(1, 4, 4)
    for index, corners in enumerate((ball, dog)):
        if corners is not None:
            left, top, right, bottom = corners
            boxes[0, index] = torch.tensor([left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)]) / 128
            logits[0, index, index] = 3.0
    judge = Owl(str(owl), CPU)
    judge.load()
    judge._model = SimpleNamespace(to=lambda device: lambda **given: SimpleNamespace(logits=logits, pred_boxes=boxes))
    subject = Subject(picture(), PROMPT, ["ball", "dog"], {"ball": (0.0, 0.0, 0.5, 1.0)})
    assert judge(subject) == expected


def test_captions_are_compared_by_clip(tmp_path: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

    clip, blip = judges.clip(tmp_path / "clip"), judges.captions(tmp_path / "blip")
    judge = Captions(str(blip), Clip(str(clip), CPU), CPU)
    judge.load()
    found = judge(Subject(picture(), PROMPT))

    writer, reader = BlipForConditionalGeneration.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    tokens = writer.generate(**reader(images=picture(), return_tensors="pt"), max_new_tokens=30, do_sample=False)
    caption = reader.decode(tokens[0], skip_special_tokens=True).strip()
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        alone = [
            model(**processor(text=[text], images=picture(), return_tensors="pt", truncation=True))
            for text in (PROMPT, caption)
        ]
    prompt, said = (one.text_embeds[0] for one in alone)
    assert found["text_text"] == pytest.approx((prompt @ said).item(), abs=1e-5)
    assert found["image_text"] == pytest.approx((prompt @ alone[0].image_embeds[0]).item(), abs=1e-5)
    assert caption != PROMPT and found["text_text"] < 0.9999


def test_questions_of_known_answers(tmp_path: Path) -> None:
    def asked(answer: str, *choices: str) -> dict[str, Any]:
        return {"caption": PROMPT, "question": "what is it?", "answer": answer, "choices": list(choices), "id": "1"}

    entries = [
        asked("Yes", "yes", "no"),
        asked("no", "yes", "no"),
        asked("a dog"),
        asked("cat", "cat", "the cat and the dog"),
        {**asked("yes"), "caption": "something else"},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(entries))
    folder = judges.answers(tmp_path / "vilt", {"no": 0.0, "yes": 1.0, "dog": 3.0, "cat": 2.0})
    judge = Questions(tmp_path / "questions.json", str(folder), CPU)
    judge.load()
    # "yes" twice, right and wrong; "dog" of all answers; "cat" of those that it may choose.
    assert judge(Subject(picture(), PROMPT)) == {"questions": 0.75}
    assert judge(Subject(picture(), "a prompt that nobody asks about")) == {}


def test_questions_answered_in_writing(tmp_path: Path) -> None:
    from transformers import BlipForQuestionAnswering

    folder = judges.writes(tmp_path / "blip")
    entry = {"caption": PROMPT, "question": "what colour?", "answer": "red"}
    for answer, expected in (("x", 0.0), (None, 1.0)):
        (tmp_path / "questions.json").write_text(json.dumps([entry | {"answer": answer or "red"}]))
        judge = Questions(tmp_path / "questions.json", str(folder), CPU)
        judge.load()
        assert isinstance(judge._model, BlipForQuestionAnswering)
        if answer is None:
            said = judge._answer(picture(), entry)
            (tmp_path / "questions.json").write_text(json.dumps([entry | {"answer": said}]))
            judge._asked = read_questions(tmp_path / "questions.json")
        assert judge(Subject(picture(), PROMPT)) == {"questions": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("[", "is not JSON"),
        ("{}", "is no list of questions"),
        ('[{"caption": "a", "question": "b"}]', "entry 1: caption, question and answer must be texts"),
        ('[{"caption": "a", "question": "b", "answer": "c", "choices": 3}]', "entry 1: choices is 3"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "q").write_text(text)
    with pytest.raises((OSError, ValueError), match=message):
        read_questions(tmp_path / "q")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Owl(model, CPU), "--owl 'MODEL' is not an OWLv2 model of transformers, such as google/owlv2"),
        (lambda model: Clip(model, CPU), "--clip 'MODEL' is not a CLIP model of transformers, such as openai/"),
        (lambda model: Captions(model, SimpleNamespace(name="x"), CPU), "--captions 'MODEL' is not .* Salesforce/blip"),
        (lambda model: Questions(Path("q"), model, CPU), "--vqa 'MODEL' is not a visual-question .* dandelin/vilt"),
    ],
)
def test_weights_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "q").write_text('[{"caption": "a", "question": "b", "answer": "c"}]')
    for model in ("no/such-model", str(tmp_path)):
        with pytest.raises(OSError, match=message.replace("MODEL", model)):
            make(model)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*--allow-pickle"):
        make("pickled")


def test_files_of_torch_are_fetched_checked_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    folder = tmp_path / "hub" / "checkpoints"
    digest = hashlib.sha256(b"good").hexdigest()[:8]
    url = f"https://nowhere.invalid/net-{digest}.pth"
    with pytest.raises(OSError, match=rf"--lpips needs {folder}/net-{digest}.pth, which cannot be fetched from {url}"):
        weights.hub_file("--lpips", url, False)
    path = folder / f"net-{digest}.pth"
    path.write_bytes(b"bad")
    with pytest.raises(ValueError, match="is a pickle.*and not the file of its name.*--allow-pickle"):
        weights.hub_file("--lpips", url, False)
    assert weights.hub_file("--lpips", url, True) == path
    path.write_bytes(b"good")
    assert weights.hub_file("--lpips", url, False) == path


def test_metrics_that_are_not_installed_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.util, "find_spec", lambda name: None if name == "torchvision" else object())
    remedy = r'needs torchvision; run: pip install "attnctl-fast\[evaluate\]"'
    with pytest.raises(ImportError, match=f"--lpips {remedy}"):
        Lpips("alex", CPU)
    with pytest.raises(ImportError, match=f"--fid {remedy}"):
        Fid(tmp_path, 64, CPU)
    monkeypatch.setattr(weights.util, "find_spec", lambda name: object())
    picture().save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="holds 1 pictures; name a folder with two or more"):
        Fid(tmp_path, 64, CPU)


def test_a_methods_pictures_are_measured_again_when_others_are_there(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    settings = Settings(model="shapes", prompt="a")
    pictures = [
        Picture(0, method, replace(settings, seed=seed), {}, None, {"prompt": "a"})
        for seed in range(2)
        for method in ("plain", "tsam")
    ]
    store, log = Store(tmp_path), Log(tmp_path / "results-0.jsonl", "a", 0, {})

    def draw(*places: int) -> None:
        for place in places:
            (tmp_path / pictures[place].file).touch()
            log.write("picture", {**pictures[place].record(), "seconds": 1.0})

    def distance(files: list[Path]) -> float:
        if len(files) < 2:
            raise RuntimeError("two or more")
        return float(len(files))

    distance.name = "fid"  # type: ignore[attr-defined]
    draw(0, 1, 2)
    assert unmeasured(distance, pictures, store) == ["plain", "tsam"]  # type: ignore[arg-type]
    measure_methods(distance, ["plain", "tsam"], pictures, store, log)  # type: ignore[arg-type]
    found = measured("fid", pictures, store)
    assert found["plain"]["value"] == found["plain"]["count"] == 2
    assert found["tsam"]["error"] == "RuntimeError: two or more" and "value" not in found["tsam"]
    assert unmeasured(distance, pictures, store) == ["tsam"]  # type: ignore[arg-type]
    draw(3)
    assert list(measured("fid", pictures, store)) == ["plain"]
    measure_methods(distance, ["tsam"], pictures, store, log)  # type: ignore[arg-type]
    assert unmeasured(distance, pictures, store) == []  # type: ignore[arg-type]
