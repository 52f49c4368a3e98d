"""Judges of a sweep's pictures, and what they are shown: the detector of the shapes model, and CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from ..cli.model import check_weights
from ..shapes.detection import detect, score
from ..shapes.drawing import SIZE
from ..shapes.scene import scene_for_prompt
from .weights import Source, absent

if TYPE_CHECKING:
    from PIL.Image import Image

Scores: TypeAlias = dict[str, bool | float]


@dataclass(frozen=True)
class Subject:
    """A picture that is judged.

    Args:
        image: the picture, RGB.
        prompt: what it was drawn from.
        phrases: what of the prompt it should show.
        boxes: where some of those should be, `x0, y0, x1, y1` from 0 to 1.
        plain_file: the plain picture of the same prompt and seed; None for that one itself.
    """

    image: Image
    prompt: str
    phrases: Sequence[str] = ()
    boxes: Mapping[str, Sequence[float]] = field(default_factory=dict)
    plain_file: Path | None = None

    @cached_property
    def plain(self) -> Image | None:
        """The plain picture, None for that one itself."""
        return None if self.plain_file is None else opened(self.plain_file)


def opened(path: Path) -> Image:
    """Read a picture as RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


class Scorer(Protocol):
    """Something that judges pictures. `name` tells it from others, weights included."""

    @property
    def name(self) -> str: ...

    def load(self) -> None:
        """Load its weights, on the CPU, so that an accelerator is free until the first picture is judged.

        Raises:
            OSError: they cannot be used.
        """

    def __call__(self, subject: Subject) -> Scores:
        """Return its figures for one picture, always under the same names; none where it cannot judge this one."""


class Detector:
    """A judge that finds the shapes that a prompt names.

    It gives `strict`, `exact` and `colours` as in `shapes.Score`; none for prompts that are no scene and for pictures
    of another size than 64x64.
    """

    name = "detector"

    def load(self) -> None:
        pass

    def __call__(self, subject: Subject) -> Scores:
        scene, image = scene_for_prompt(subject.prompt), subject.image
        if scene is None or image.size != (SIZE, SIZE):
            return {}
        return dict(score(scene, detect(image))._asdict())


class Clip:
    """The CLIP score of Hessel et al. (arXiv 2104.08718), by a `transformers.CLIPModel`.

    100 max(cos, 0) of the embeddings of picture and prompt.

    Args:
        model: a folder or an id on the Hugging Face hub.
        device: where it computes.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        OSError: there is no such processor.
        ValueError: its weights are pickles, which are not allowed.
    """

    def __init__(self, model: str, device: torch.device, allow_pickle: bool = False) -> None:
        from transformers import CLIPProcessor

        self.name, self._device = f"clip {model}", device
        what = "a CLIP model of transformers, such as openai/clip-vit-large-patch14"
        self._source = Source("--clip", model, what, allow_pickle)
        self._processor = self._source.processor(CLIPProcessor)

    def load(self) -> None:
        from transformers import CLIPModel

        self._model = self._source.weights(CLIPModel)

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        image, text = self.embed(subject.image, [subject.prompt])
        return {"clip": _clip_score(image, text)}

    def embed(self, image: Image, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of a picture, `[1, C]`, and of texts, `[texts, C]`, in float32."""
        given = self._processor(text=texts, images=[image], return_tensors="pt", truncation=True, padding=True)
        out = self._model.to(self._device)(**given.to(self._device))
        return out.image_embeds.float(), out.text_embeds.float()


class OpenClip:
    """The same score by a model of `open_clip_torch`.

    Args:
        model: `MODEL:PRETRAINED` as `open_clip.list_pretrained()` has them, a file of weights as PRETRAINED, or a name
            with a scheme, such as `hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K`.
        device: where it computes.
        allow_pickle: also take a file of weights that is not safetensors.

    Raises:
        ImportError: open_clip_torch is not installed.
        ValueError: there is no such model, or its file is a pickle, which is not allowed.
    """

    def __init__(self, model: str, device: torch.device, allow_pickle: bool = False) -> None:
        if util.find_spec("open_clip") is None:
            raise ImportError("--open-clip needs open_clip_torch; run: pip install open_clip_torch")
        import open_clip

        self.name, self._source, self._device = f"open_clip {model}", model, device
        whole = model.startswith(("hf-hub:", "local-dir:"))
        self._architecture, _, pretrained = (model, "", "") if whole else model.partition(":")
        self._pretrained = pretrained or None
        there = Path(pretrained).is_file() and self._architecture in open_clip.list_models()
        if not whole and not there and (self._architecture, pretrained) not in open_clip.list_pretrained():
            raise ValueError(f"--open-clip {model!r} is not one of open_clip.list_pretrained(), as MODEL:PRETRAINED")
        if there and not allow_pickle:
            check_weights(Path(pretrained))

    def load(self) -> None:
        import open_clip

        try:
            model, _, self._transform = open_clip.create_model_and_transforms(
                self._architecture, pretrained=self._pretrained
            )
            self._model, self._tokenizer = model.eval(), open_clip.get_tokenizer(self._architecture)
        except Exception as error:
            raise absent("--open-clip", self._source, "a model that open_clip can load", error) from error

    @torch.inference_mode()
    def __call__(self, subject: Subject) -> Scores:
        model = self._model.to(self._device)
        pixels = self._transform(subject.image)[None].to(self._device)
        tokens = self._tokenizer([subject.prompt]).to(self._device)
        return {"clip": _clip_score(model.encode_image(pixels), model.encode_text(tokens))}


def _clip_score(image: torch.Tensor, text: torch.Tensor) -> float:
    return 100 * torch.cosine_similarity(image.float(), text.float()).clamp(min=0).item()
