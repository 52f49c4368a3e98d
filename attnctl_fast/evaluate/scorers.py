"""Judges of a sweep's pictures: the detector of the shapes model, and CLIP."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from ..cli.model import check_weights
from ..cli.report import first_line
from ..shapes.detection import detect, score
from ..shapes.drawing import SIZE
from ..shapes.scene import scene_for_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

Scores: TypeAlias = dict[str, bool | float]


class Scorer(Protocol):
    """Something that judges pictures. `name` tells it from others, weights included."""

    @property
    def name(self) -> str: ...

    def load(self) -> None:
        """Load its weights, on the CPU, so that an accelerator is free until the first picture is judged.

        Raises:
            OSError: they cannot be used.
        """

    def __call__(self, image: Image, prompt: str) -> Scores:
        """Return its figures for one picture, always under the same names; none where it cannot judge this one."""


class Detector:
    """A judge that finds the shapes that a prompt names.

    It gives `strict`, `exact` and `colours` as in `shapes.Score`; none for prompts that are no scene and for pictures
    of another size than 64x64.
    """

    name = "detector"

    def load(self) -> None:
        pass

    def __call__(self, image: Image, prompt: str) -> Scores:
        scene = scene_for_prompt(prompt)
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

        self.name, self._source, self._device = f"clip {model}", model, device
        self._safe = None if allow_pickle else True
        if not allow_pickle:
            check_weights(Path(model))
        try:
            self._processor = CLIPProcessor.from_pretrained(model)
        except Exception as error:
            raise _absent("--clip", model, "a CLIP model of transformers with its processor", error) from error

    def load(self) -> None:
        from transformers import CLIPModel

        try:
            model, found = CLIPModel.from_pretrained(
                self._source, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=self._safe
            )
            # Transformers leaves both as they were initialised.
            if found["missing_keys"]:
                raise ValueError(f"its weights lack {min(found['missing_keys'])}")
            if found["mismatched_keys"]:
                name = min(found["mismatched_keys"])[0]
                raise ValueError(f"its {name} has another shape than its configuration says")
        except Exception as error:
            raise _absent("--clip", self._source, "a CLIP model of transformers", error) from error
        self._model = model.eval()

    @torch.inference_mode()
    def __call__(self, image: Image, prompt: str) -> Scores:
        given = self._processor(text=[prompt], images=[image], return_tensors="pt", truncation=True)
        out = self._model.to(self._device)(**given.to(self._device))
        return {"clip": _clip_score(out.image_embeds, out.text_embeds)}


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
            raise _absent("--open-clip", self._source, "a model that open_clip can load", error) from error

    @torch.inference_mode()
    def __call__(self, image: Image, prompt: str) -> Scores:
        model = self._model.to(self._device)
        pixels = self._transform(image)[None].to(self._device)
        tokens = self._tokenizer([prompt]).to(self._device)
        return {"clip": _clip_score(model.encode_image(pixels), model.encode_text(tokens))}


def _clip_score(image: torch.Tensor, text: torch.Tensor) -> float:
    return 100 * torch.cosine_similarity(image.float(), text.float()).clamp(min=0).item()


def _absent(option: str, model: str, what: str, error: Exception) -> OSError:
    return OSError(f"{option} {model!r} is not {what}: {first_line(error)}")
