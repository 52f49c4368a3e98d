"""Similarities of a picture and of its caption with its prompt, as Attend-and-Excite and T-SAM measure them."""

from __future__ import annotations

import torch

from .scorers import Clip, Scores, Subject
from .weights import Source

_LONGEST = 30


class Captions:
    """A judge that compares the prompt with the picture and with a caption of it, by CLIP's embeddings.

    It gives two cosines: `image_text`, of picture and prompt, and `text_text`, of a caption that another model writes
    and the prompt. (Attend-and-Excite averages the prompt's embedding over 80 templates, such as "a photo of ..."; here
    it is that of the prompt alone.)

    Args:
        model: what writes captions, such as BLIP: a folder or an id on the Hugging Face hub.
        clip: the judge whose CLIP model compares.
        device: where it computes.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        OSError: there is no such processor.
        ValueError: its weights are pickles, which are not allowed.
    """

    def __init__(self, model: str, clip: Clip, device: torch.device, allow_pickle: bool = False) -> None:
        from transformers import AutoProcessor

        self.name, self._clip, self._device = f"captions {model} {clip.name}", clip, device
        what = "a captioning model of transformers, such as Salesforce/blip-image-captioning-base"
        self._source = Source("--captions", model, what, allow_pickle)
        self._processor = self._source.processor(AutoProcessor)

    def load(self) -> None:
        from transformers import AutoModelForImageTextToText

        self._model = self._source.weights(AutoModelForImageTextToText)
        self._clip.load()

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        given = self._processor(images=subject.image, return_tensors="pt").to(self._device)
        tokens = self._model.to(self._device).generate(**given, max_new_tokens=_LONGEST, do_sample=False)
        (caption,) = self._processor.batch_decode(tokens, skip_special_tokens=True)
        image, (prompt, said) = self._clip.embed(subject.image, [subject.prompt, caption.strip()])
        return {
            "image_text": torch.cosine_similarity(image[0], prompt, dim=0).item(),
            "text_text": torch.cosine_similarity(said, prompt, dim=0).item(),
        }
