"""Whether a picture shows what its prompt names, by OWLv2 (Minderer et al., arXiv 2306.09683)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .scorers import Scores, Subject
from .weights import Source

# Of transformers' own example, below which a box is no detection.
THRESHOLD = 0.1
_OVERLAP = 0.5


class Owl:
    """A judge that looks for the phrases of a prompt: zero-shot detection by a `transformers.Owlv2ForObjectDetection`.

    It gives `detected`, whether all are there, and `found`, the share of them that is; of phrases that have a box,
    `placed`, the share that is found there, with an intersection over union of at least one half. None for a prompt
    without phrases.

    Args:
        model: a folder or an id on the Hugging Face hub.
        device: where it computes.
        threshold: the least score of a detection.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        OSError: there is no such processor.
        ValueError: its weights are pickles, which are not allowed.
    """

    def __init__(
        self, model: str, device: torch.device, threshold: float = THRESHOLD, allow_pickle: bool = False
    ) -> None:
        from transformers import Owlv2Processor

        self.name, self._device, self._threshold = f"owl {model} from {threshold}", device, threshold
        what = "an OWLv2 model of transformers, such as google/owlv2-base-patch16-ensemble"
        self._source = Source("--owl", model, what, allow_pickle)
        self._processor = self._source.processor(Owlv2Processor)

    def load(self) -> None:
        from transformers import Owlv2ForObjectDetection

        self._model = self._source.weights(Owlv2ForObjectDetection)

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        phrases = subject.phrases
        if not phrases:
            return {}
        texts = [[f"a photo of a {phrase}" for phrase in phrases]]
        given = self._processor(text=texts, images=subject.image, return_tensors="pt", truncation=True)
        out = self._model.to(self._device)(**given.to(self._device))
        width, height = subject.image.size
        (boxes,) = self._processor.post_process_grounded_object_detection(
            out, threshold=self._threshold, target_sizes=[(height, width)]
        )
        size = torch.tensor([width, height, width, height])
        found = {
            phrase: (boxes["boxes"].cpu() / size)[boxes["labels"].cpu() == index].tolist()
            for index, phrase in enumerate(phrases)
        }
        there = [bool(found[phrase]) for phrase in phrases]
        scores: Scores = {"detected": all(there), "found": sum(there) / len(there)}
        wanted = {phrase: box for phrase, box in subject.boxes.items() if phrase in found}
        if wanted:
            placed = [any(_overlap(box, one) >= _OVERLAP for one in found[phrase]) for phrase, box in wanted.items()]
            scores["placed"] = sum(placed) / len(placed)
        return scores


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection over union of two boxes `x0, y0, x1, y1`."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / max(sum(areas) - shared, 1e-9)
