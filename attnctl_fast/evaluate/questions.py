"""Questions about pictures, in the form of TIFA's files (Hu et al., arXiv 2303.11897), asked of a model."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from .scorers import Scores, Subject
from .weights import Source

_LONGEST = 10


def read_questions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read a file of questions as TIFA has them and return those of every prompt, its `caption` there.

    A list of objects with `caption`, `question`, `answer` and, where an answer is one of a few, `choices`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not as above.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"--questions {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--questions {path} is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--questions {path} is no list of questions, the form of TIFA's files")
    found: dict[str, list[dict[str, Any]]] = {}
    for number, entry in enumerate(entries, start=1):
        texts = [entry.get(name) for name in ("caption", "question", "answer")] if isinstance(entry, dict) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"--questions {path}, entry {number}: caption, question and answer must be texts")
        choices = entry.get("choices", [])
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"--questions {path}, entry {number}: choices is {choices!r}; it must be a list of texts")
        found.setdefault(entry["caption"], []).append(entry)
    return found


class Questions:
    """A judge that asks a visual-question model of transformers, such as ViLT or BLIP, about the picture.

    It gives `questions`, the share of a prompt's questions that the model answers as the file does; none for prompts
    without questions. A model that chooses among answers chooses among a question's `choices`, where it knows any of
    them; one that writes answers has to write the right one. (TIFA maps what is written to the nearest choice by a
    sentence model.)

    Args:
        path: the file of questions.
        model: a folder or an id on the Hugging Face hub.
        device: where it computes.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        OSError: there is no such file or processor.
        ValueError: the file has another form, or its weights are pickles, which are not allowed.
    """

    def __init__(self, path: Path, model: str, device: torch.device, allow_pickle: bool = False) -> None:
        from transformers import AutoProcessor

        self._asked, self._device = read_questions(path), device
        digest = hashlib.sha256(json.dumps(self._asked, sort_keys=True).encode()).hexdigest()[:12]
        self.name = f"questions {digest} {model}"
        what = "a visual-question model of transformers, such as dandelin/vilt-b32-finetuned-vqa"
        self._source = Source("--vqa", model, what, allow_pickle)
        self._processor = self._source.processor(AutoProcessor)

    def load(self) -> None:
        from transformers import AutoModelForVisualQuestionAnswering

        self._model = self._source.weights(AutoModelForVisualQuestionAnswering)

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        asked = self._asked.get(subject.prompt, [])
        if not asked:
            return {}
        right = [_plain(self._answer(subject.image, entry)) == _plain(entry["answer"]) for entry in asked]
        return {"questions": sum(right) / len(right)}

    def _answer(self, image: Any, entry: dict[str, Any]) -> str:
        given = self._processor(images=image, text=entry["question"], return_tensors="pt", truncation=True)
        model, given = self._model.to(self._device), given.to(self._device)
        if model.can_generate():
            tokens = model.generate(**given, max_new_tokens=_LONGEST, do_sample=False)
            return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0])
        logits = model(**given).logits[0].float()
        choices = {_plain(choice) for choice in entry.get("choices", [])}
        names = model.config.id2label
        known = [index for index in range(len(logits)) if _plain(names[index]) in choices] or range(len(logits))
        return str(names[max(known, key=lambda index: logits[index].item())])


def _plain(text: str) -> str:
    """Return an answer without case, articles and signs."""
    return " ".join(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))
