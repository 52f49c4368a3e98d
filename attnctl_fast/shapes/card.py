"""Writing a trained model as a pipeline folder, and measuring it for its card."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .detection import Score
from .evaluate import evaluate
from .localisation import localisation_table
from .model import build_scheduler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def export_pipeline(
    folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write float16 safetensors in the layout of `save_pretrained`; the modules themselves stay as they are."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=_half(vae),
        text_encoder=_half(text_encoder),
        tokenizer=tokenizer,
        unet=_half(unet),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    # Older releases of transformers read these two files instead of tokenizer.json.
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def detection_rates(
    pipe: StableDiffusionPipeline, seeds: Sequence[int], objects: int, *, batch_size: int = 32
) -> dict[str, float]:
    """The shares of `strict`, `exact` and `colours` among pictures of the plain pipeline, 25 steps at guidance 5."""
    drawn = evaluate(pipe, seeds, objects=objects, batch_size=batch_size)
    return {name: drawn.hits(name) / len(seeds) for name in Score._fields}


def measure(pipe: StableDiffusionPipeline, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of the model card: detection rates at one, two and three objects, and localisation per layer."""
    return {
        "seeds": [min(seeds), max(seeds)],
        "sampler": "DDIM, 25 steps, guidance 5",
        "detection": {str(objects): detection_rates(pipe, seeds, objects) for objects in (1, 2, 3)},
        "localisation_auc_t500": localisation_table(pipe, seeds),
    }


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `card.json` beside the weights."""
    (folder / "card.json").write_text(json.dumps(_rounded(card), indent=2) + "\n", encoding="utf-8")


def _half(module: Any) -> Any:
    return copy.deepcopy(module).to("cpu", torch.float16)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value
