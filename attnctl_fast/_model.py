"""The user's own model: which one, how it is loaded, what it is called with, what a report says of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ._report import versions

SHAPES = "shapes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What decides a picture; the fields are the options of the commands of the same name."""

    model: str
    prompt: str
    negative_prompt: str | None = None
    layers: list[str] | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None


def check_absent(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raise FileExistsError if one of the files is there and may not be overwritten."""
    present = next((path for path in paths if path.exists()), None)
    if present is not None and not overwrite:
        raise FileExistsError(f"{present} is there already; choose another --out, or replace it with --overwrite")


def load(settings: ModelSettings) -> Any:
    """The pipeline, on its device.

    Raises:
        ValueError: there is no such device.
        OSError: there is no such model.
    """
    device = device_named(settings.device)
    dtype = {"auto": torch.float16 if device.type == "cuda" else torch.float32}.get(settings.dtype)
    dtype = dtype or getattr(torch, settings.dtype)
    if settings.model == SHAPES:
        from .shapes.model import load_pipeline

        return load_pipeline(dtype, device)
    from diffusers import DiffusionPipeline

    folder = Path(settings.model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--model {settings.model!r} is a folder without model_index.json: not a saved diffusers pipeline"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(settings.model, dtype=dtype, variant=settings.variant)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"--model {settings.model!r} is neither a saved pipeline nor to be had from the hub: {reason}"
        ) from error
    return pipe.to(device)


def call_arguments(pipe: Any, settings: ModelSettings, count: int = 1) -> dict[str, Any]:
    """What the pipeline is called with for `count` pictures, but for their generators.

    Raises:
        ValueError: the pipeline does not take one of the settings.
    """
    given = {
        "prompt": [settings.prompt],
        "negative_prompt": settings.negative_prompt and [settings.negative_prompt],
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "num_images_per_prompt": count,
    }
    given = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(pipe.__call__).parameters.keys())
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave those options out or choose another model"
        )
    return given


def draw(pipe: Any, settings: ModelSettings, count: int = 1) -> list[Any]:
    """The pictures of as many seeds from the settings' one on, each from the noise of a CPU generator of its seed.

    Raises:
        ValueError: the pipeline does not take one of the settings.
    """
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(count)]
    return list(pipe(**call_arguments(pipe, settings, count), generator=generators).images)


def write_report(path: Path, pipe: Any, settings: ModelSettings, results: dict[str, Any]) -> None:
    """Write what was drawn how as JSON."""
    report = {
        "settings": asdict(settings) | {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")},
        "pipeline": type(pipe).__name__,
        **results,
        "versions": versions(),
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(path)


def device_named(name: str) -> torch.device:
    """What --device names; `auto` is a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device
