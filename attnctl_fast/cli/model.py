"""Loading the model that `--model` names, and drawing with it."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .report import first_line

# What `--model` calls the shipped models, and `load_pipeline` does.
SHAPES = {"shapes": "unet", "shapes-mmdit": "mmdit"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a picture but the method; the fields are options of the command line."""

    model: str
    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    allow_pickle: bool = False

    @classmethod
    def of(cls, arguments: argparse.Namespace, **changes: Any) -> Settings:
        """Take the fields from parsed arguments, or from `changes`."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in vars(arguments).items() if name in names} | changes)


def load(settings: Settings) -> Any:
    """Load the pipeline and move it to its device.

    Pickled weights are refused unless they are allowed, code that comes with a model always.

    Raises:
        ValueError: there is no such device, or the model needs what is refused.
        OSError: there is no such model.
    """
    device = device_named(settings.device)
    if settings.model in SHAPES:
        from ..shapes.load import load_pipeline

        # float16 is enough for both.
        dtype = dtype_named(settings.dtype, device, ["unet"])
        return load_pipeline(SHAPES[settings.model], dtype=dtype, device=device)
    from diffusers import DiffusionPipeline

    files: dict[str, Any] = {"variant": settings.variant, "use_safetensors": None if settings.allow_pickle else True}
    folder = Path(settings.model)
    try:
        if not folder.is_dir():
            folder = Path(DiffusionPipeline.download(settings.model, **files))
    except (OSError, ValueError) as error:
        raise _absent(settings, error) from error
    parts = _check_folder(folder, settings.allow_pickle)
    dtype = dtype_named(settings.dtype, device, parts)
    try:
        return DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **files).to(device)
    except (OSError, ValueError) as error:
        raise _absent(settings, error) from error


def _absent(settings: Settings, error: Exception) -> OSError:
    reason = first_line(error)
    if "safetensors" in reason and not settings.allow_pickle:
        reason += "; weights that are not safetensors need --allow-pickle"
    return OSError(f"--model {settings.model!r} is neither a saved pipeline nor to be had from the hub: {reason}")


def _check_folder(folder: Path, allow_pickle: bool) -> list[str]:
    """Return the names of a saved pipeline's parts.

    A folder is refused that is no saved pipeline, that holds code to run, or pickled weights where they are not
    allowed.

    Raises:
        FileNotFoundError, ValueError: as above.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"--model {str(folder)!r} is a folder without model_index.json: not a saved diffusers pipeline"
        )
    try:
        entries = json.loads(index.read_text(encoding="utf-8")).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is not a JSON object: {first_line(error)}") from error
    parts = {name: value[0] for name, value in entries if isinstance(value, list) and value}
    for name, module in parts.items():
        code = (folder if name == "_class_name" else folder / name) / f"{module}.py"
        if code.is_file():
            raise ValueError(
                f"--model {str(folder)!r} comes with code, {code}, which attnctl-fast does not run; if you trust it, "
                "load the pipeline in Python and use attnctl_fast.control there"
            )
        if not allow_pickle:
            check_weights(folder / name)
    return [name for name, module in parts.items() if module is not None]


def check_weights(path: Path) -> None:
    """Raise ValueError if a file of weights is a pickle, or all in a folder are, or one that its index lists."""
    files = [path] if path.is_file() else sorted(path.glob("*"))
    pickles = [file for file in files if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if any(file.suffix == ".safetensors" for file in files):
        pickles = []
    for index in path.glob("*.safetensors.index.json"):
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        pickles += [path / file for file in listed if not file.endswith(".safetensors")]
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when it is loaded; get the weights as safetensors, or, if "
            "you trust the file, add --allow-pickle"
        )


def call_arguments(pipe: Any, settings: Settings, count: int = 1) -> dict[str, Any]:
    """Return what the pipeline is called with for `count` pictures, but for their generators.

    Raises:
        ValueError: the pipeline does not take one of the settings, or would draw the same without its negative prompt.
    """
    negative = settings.negative_prompt
    if negative is None and settings.true_cfg_scale is not None:
        # FLUX has no such guidance without one.
        negative = ""
    given = {
        "prompt": [settings.prompt],
        "negative_prompt": None if negative is None else [negative],
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "true_cfg_scale": settings.true_cfg_scale,
        "height": settings.height,
        "width": settings.width,
        "num_images_per_prompt": count,
    }
    given = {name: value for name, value in given.items() if value is not None}
    known = inspect.signature(pipe.__call__).parameters
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave those options out or choose another model"
        )
    scale = next((name for name in ("true_cfg_scale", "guidance_scale") if name in known), None)
    if settings.negative_prompt and scale is not None:
        value = given.get(scale, known[scale].default)
        if value is None or value <= 1:
            raise ValueError(
                f"{type(pipe).__name__} reads a negative prompt only with {scale} above 1, and here it is {value}; "
                f"add --{scale.replace('_', '-')} 4, for instance, or leave the negative prompt out"
            )
    return given


def draw(pipe: Any, settings: Settings, count: int = 1) -> list[Any]:
    """Draw pictures of consecutive seeds, each from the noise of a CPU generator of its seed.

    Raises:
        ValueError: the pipeline does not take one of the settings.
    """
    generators = [torch.Generator().manual_seed(settings.seed + i) for i in range(count)]
    return list(pipe(**call_arguments(pipe, settings, count), generator=generators).images)


def dtype_named(name: str, device: torch.device, parts: Collection[str]) -> torch.dtype:
    """Return the dtype of `--dtype` for a pipeline of these parts.

    `auto` is float32, but on a GPU float16, and bfloat16 for transformers: FLUX overflows in float16.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if "transformer" in parts else torch.float16


def device_named(name: str) -> torch.device:
    """Return the device of `--device`; `auto` is a GPU if there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not to be had here: {first_line(error)}") from error
    return device
