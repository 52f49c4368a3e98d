"""Loading the shapes models that ship with the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .autoencoder import build_vae
from .denoiser import MODELS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS: Mapping[str, Path] = {model: Path(__file__).parent / "weights" / model for model in MODELS}


def load_pipeline(
    model: str = "unet",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: Path | str | None = None,
) -> Any:
    """Load a shapes model as an ordinary pipeline of diffusers.

    It draws prompts such as `a red circle and a blue star`, on pictures of 64x64 pixels from latents of 4x16x16.

    Args:
        model: `"unet"` for a `StableDiffusionPipeline`, `"mmdit"` for a `StableDiffusion3Pipeline`.
        dtype: the floating-point type of all weights.
        device: where to put them.
        weights: a folder in the layout of `save_pretrained`; the weights of the package by default.

    Raises:
        ValueError: for another model.
        ImportError: if diffusers or transformers is missing.
        FileNotFoundError: if the folder holds no pipeline.
    """
    if model not in MODELS:
        raise ValueError(f"no shapes model is called {model!r}: choose from {', '.join(MODELS)}")
    try:
        import diffusers.utils.logging  # noqa: F401
        import transformers.utils.logging  # noqa: F401
    except ImportError as error:
        raise ImportError('the shapes models need diffusers: pip install "attnctl-fast[diffusers]"') from error
    folder = Path(WEIGHTS[model] if weights is None else weights)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {folder}: reinstall attnctl-fast, or train one with "
            f"python -m attnctl_fast.shapes.train {model}"
        )
    with _quiet():
        from diffusers import DiffusionPipeline

        none = {"safety_checker": None, "feature_extractor": None} if model == "unet" else {}
        pipe = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, **none)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # Not part.to(dtype): diffusers then warns of layers to keep in float32, of which these models have none.
            torch.nn.Module.to(part, dtype)
    return pipe.to(device)


def load_vae() -> AutoencoderKL:
    """Load the autoencoder that ships with the UNet, in float32."""
    from safetensors.torch import load_file

    # Not from_pretrained, whose configuration remembers the folder.
    vae = build_vae()
    vae.load_state_dict(load_file(WEIGHTS["unet"] / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Run without loading bars, and without the advice to install torchvision for a part that is not used."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    transformers_logging.set_verbosity_error()
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bar()
