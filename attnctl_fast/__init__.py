"""Attention control for text-to-image diffusion models, made fast."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._impl import use

if TYPE_CHECKING:
    from . import ops, schedules, shapes
    from .methods import (
        CONFORM,
        NAG,
        PLADIS,
        TACA,
        TSAM,
        AttendAndExcite,
        AttentionRegulation,
        ComposableDiffusion,
        Composition,
        DenseDiffusion,
        Edit,
        EnergyContext,
        GuidanceContext,
        LatentGuidance,
        Method,
        Regions,
        Run,
        SynGen,
    )
    from .pipeline import by_downsampling, capture, control, enable

__version__ = "0.1.0"

__all__ = [
    "AttendAndExcite",
    "AttentionRegulation",
    "ComposableDiffusion",
    "Composition",
    "CONFORM",
    "DenseDiffusion",
    "Edit",
    "EnergyContext",
    "GuidanceContext",
    "LatentGuidance",
    "Method",
    "NAG",
    "PLADIS",
    "Regions",
    "Run",
    "SynGen",
    "TACA",
    "TSAM",
    "by_downsampling",
    "capture",
    "control",
    "enable",
    "ops",
    "schedules",
    "shapes",
    "use",
]

_HOME = {
    "AttendAndExcite": "methods",
    "AttentionRegulation": "methods",
    "ComposableDiffusion": "methods",
    "Composition": "methods",
    "CONFORM": "methods",
    "DenseDiffusion": "methods",
    "Edit": "methods",
    "EnergyContext": "methods",
    "GuidanceContext": "methods",
    "LatentGuidance": "methods",
    "Method": "methods",
    "NAG": "methods",
    "PLADIS": "methods",
    "Regions": "methods",
    "Run": "methods",
    "SynGen": "methods",
    "TACA": "methods",
    "TSAM": "methods",
    "by_downsampling": "pipeline",
    "capture": "pipeline",
    "control": "pipeline",
    "enable": "pipeline",
}

_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    # A checkout or an editable install: kernels/ lies at the repository root (setup.py maps it here in a wheel).
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name in ("ops", "schedules", "shapes"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
