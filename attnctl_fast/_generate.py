"""`attnctl-fast generate`: the user's own model with a method on."""

from __future__ import annotations

import inspect
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._grid import Panel, Row, draw_grid
from ._report import versions
from .methods import AttentionRegulation, Composition, Edit, EnergyContext
from .pipeline import control

if TYPE_CHECKING:
    from PIL.Image import Image

SHAPES = "shapes"
# The options that not every method has, and the methods that have them.
_METHODS_OF = {
    "targets": ("regulation",),
    "strength": ("regulation",),
    "convention": ("regulation", "energy"),
    "gamma_attn": ("energy", "compose"),
    "gamma_norm": ("energy", "compose"),
    "token_weights": ("energy",),
    "edit": ("compose",),
    "negate": ("compose",),
    "edit_weight": ("compose",),
    "edit_start": ("compose",),
}


@dataclass(frozen=True)
class Settings:
    """What decides the pictures; the fields are the options of the command of the same name."""

    model: str
    prompt: str
    negative_prompt: str | None = None
    method: str = "regulation"
    targets: list[str] | None = None
    strength: float | None = None
    convention: str | None = None
    gamma_attn: float | None = None
    gamma_norm: float | None = None
    token_weights: list[tuple[str, float]] | None = None
    edit: list[str] | None = None
    negate: list[str] | None = None
    edit_weight: float | None = None
    edit_start: float | None = None
    layers: list[str] | None = None
    seed: int = 0
    num_images: int = 1
    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None


def generate(settings: Settings, *, compare: bool, overwrite: bool, out: Path) -> None:
    """Draw and save the pictures and `generate.json`.

    Raises:
        ValueError: a setting that the model or the machine cannot meet, such as a target that is not in the prompt.
        OSError: the model is not found, or a file is there already.
    """
    arms = ["plain", settings.method] if compare else [settings.method]
    seeds = range(settings.seed, settings.seed + settings.num_images)
    files = {(seed, arm): out / f"{seed}-{arm}.png" for seed in seeds for arm in arms}
    others = [out / "generate.json", *([out / "compare.png"] if compare else [])]
    present = [path for path in (*files.values(), *others) if path.exists()]
    if present and not overwrite:
        raise FileExistsError(f"{present[0]} is there already; choose another --out, or replace it with --overwrite")

    method = _method(settings)
    device = _device(settings.device)
    pipe = _load(settings, device)
    arguments = _call_arguments(pipe, settings)
    images: dict[tuple[int, str], Image] = {}
    seconds = {}
    for arm in arms:
        start = time.perf_counter()
        with nullcontext() if arm == "plain" else control(pipe, method):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            drawn = pipe(**arguments, generator=generators).images
        seconds[arm] = time.perf_counter() - start
        images.update({(seed, arm): image for seed, image in zip(seeds, drawn, strict=True)})

    out.mkdir(parents=True, exist_ok=True)
    for key, path in files.items():
        images[key].save(path)
        print(path)
    if compare:
        rows = [Row(f"{seed}: {settings.prompt}", [Panel(images[seed, arm], arm) for arm in arms]) for seed in seeds]
        draw_grid(rows, title=settings.model, columns=2, side=384).save(out / "compare.png")
        print(out / "compare.png")
    report = {
        "settings": asdict(settings) | {"device": str(device), "dtype": str(pipe.dtype).removeprefix("torch.")},
        "pipeline": type(pipe).__name__,
        "method": {"name": type(method).__name__, **asdict(method)},
        "seconds": seconds,
        "files": [path.name for path in files.values()],
        "versions": versions(),
    }
    (out / "generate.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(out / "generate.json")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def _load(settings: Settings, device: torch.device) -> Any:
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


def _method(settings: Settings) -> AttentionRegulation | EnergyContext | Composition:
    for name, methods in _METHODS_OF.items():
        if getattr(settings, name) is not None and settings.method not in methods:
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of --method {' and '.join(methods)}, not of {settings.method}"
            )
    if settings.method == "compose":
        return _composition(settings)
    paper = settings.convention == "paper"
    options = {
        name: getattr(settings, name)
        for name in ("strength", "gamma_attn", "gamma_norm")
        if getattr(settings, name) is not None
    }
    if settings.method == "energy":
        make = EnergyContext.paper if paper else EnergyContext.official
        weights = dict(settings.token_weights or ())
        if len(weights) < len(settings.token_weights or ()):
            raise ValueError("--token-weights names a word twice; name it once")
        return make(token_weights=weights or None, layers=settings.layers, **options)
    if not settings.targets:
        raise ValueError("--method regulation needs --targets, the words of the prompt to enforce")
    regulate = AttentionRegulation.paper if paper else AttentionRegulation.official
    return regulate([settings.targets], layers=settings.layers, **options)


def _composition(settings: Settings) -> Composition:
    texts = [(text, 1) for text in settings.edit or []] + [(text, -1) for text in settings.negate or []]
    if not texts:
        raise ValueError("--method compose needs --edit or --negate, the texts to add to the prompt or to take away")
    edits = [
        Edit(
            text,
            1.0 if settings.edit_weight is None else settings.edit_weight,
            direction=direction,
            gamma_attn=settings.gamma_attn or 0.0,
            gamma_norm=settings.gamma_norm or 0.0,
            start=settings.edit_start or 0.0,
        )
        for text, direction in texts
    ]
    return Composition(edits, layers=settings.layers)


def _call_arguments(pipe: Any, settings: Settings) -> dict[str, Any]:
    """The pipeline's arguments, those that were left open excepted; an error for one that it does not take."""
    given = {
        "prompt": [settings.prompt],
        "negative_prompt": settings.negative_prompt and [settings.negative_prompt],
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "num_images_per_prompt": settings.num_images,
    }
    given = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(given.keys() - inspect.signature(pipe.__call__).parameters.keys())
    if unknown:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave those options out or choose another model"
        )
    return given
