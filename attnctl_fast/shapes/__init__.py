"""Small text-to-image models of coloured shapes that ship with the package: a UNet and a joint transformer.

`load_pipeline("unet" | "mmdit")` gives a pipeline of diffusers, `scene_for_seed` and `render` draw what they were
trained on, `detect` and `score` tell whether a picture shows what its prompt asks for, `evaluate` measures methods on
pairs of pictures. Importing this package needs neither diffusers nor transformers; `load_pipeline` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .scene import COLOURS, SHAPES, Scene, scene_for_seed

if TYPE_CHECKING:
    from . import evaluate
    from .detection import Detection, Score, detect, score
    from .drawing import Render, render
    from .load import load_pipeline
    from .unet import LAYERS

_HOMES = {
    "Detection": "detection",
    "Score": "detection",
    "detect": "detection",
    "score": "detection",
    "Render": "drawing",
    "render": "drawing",
    "LAYERS": "unet",
    "load_pipeline": "load",
}

__all__ = [
    "COLOURS",
    "LAYERS",
    "SHAPES",
    "Detection",
    "Render",
    "Scene",
    "Score",
    "detect",
    "evaluate",
    "load_pipeline",
    "render",
    "scene_for_seed",
    "score",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return import_module(f"{__name__}.evaluate")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
