"""The parts of the shapes model: a small autoencoder, a small UNet with cross-attention at 16x16, and the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .text import MAX_LENGTH, WIDTH

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

WEIGHTS = Path(__file__).parent / "weights"
LATENT_SIZE = 16
LAYERS = ("down_blocks.0", "up_blocks.2")


def build_vae() -> AutoencoderKL:
    """Build a randomly initialised autoencoder, 0.7 M parameters.

    It maps images `[B,3,64,64]` to latents `[B,4,16,16]`.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=4 * LATENT_SIZE,
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """Build a randomly initialised UNet, 2.7 M parameters.

    It has cross-attention in the blocks of `LAYERS`, all at 16x16.

    The 8x8 and 4x4 blocks are plain, so that the prompt acts only where its attention maps have the finest grid.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def cross_attention_layers() -> tuple[str, ...]:
    """Return the names of the UNet's cross-attention modules, all of them at 16x16, in order of execution."""
    return (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.2.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.2.attentions.1.transformer_blocks.0.attn2",
    )


def load_pipeline(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, weights: Path | str = WEIGHTS
) -> StableDiffusionPipeline:
    """Load the shapes model as an ordinary `StableDiffusionPipeline`.

    It draws prompts such as `a red circle and a blue star`.

    It makes pictures of 64x64 pixels from latents of 4x16x16.

    Args:
        dtype: the floating-point type of all weights.
        device: where to put them.
        weights: a folder in the layout of `save_pretrained`; the weights of the package by default.

    Raises:
        ImportError: if diffusers or transformers is missing.
        FileNotFoundError: if the folder holds no pipeline.
    """
    try:
        import diffusers.utils.logging  # noqa: F401
        import transformers.utils.logging  # noqa: F401
    except ImportError as error:
        raise ImportError('the shapes model needs diffusers: pip install "attnctl-fast[diffusers]"') from error
    if not (Path(weights) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no pipeline in {weights}: reinstall attnctl-fast, or train one with python -m attnctl_fast.shapes.train"
        )
    with _quiet():
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            str(weights),
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        # Not part.to(dtype): diffusers then warns of layers to keep in float32, of which these models have none.
        torch.nn.Module.to(part, dtype)
    return pipe.to(device)


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


def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """Return the text encoder's last hidden states `[B, 20, 128]` of prompts padded to 20 tokens."""
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids.to(pipe.device)).last_hidden_state
