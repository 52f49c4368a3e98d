"""What several test files need."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes pipeline as it is before training, in the layout of `save_pretrained`."""
    from diffusers import StableDiffusionPipeline

    from attnctl_fast.shapes.model import build_scheduler, build_unet, build_vae
    from attnctl_fast.shapes.text import build_text_encoder, build_tokenizer

    folder = tmp_path_factory.mktemp("untrained")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=build_vae(),
            unet=build_unet(),
            text_encoder=build_text_encoder(),
            tokenizer=build_tokenizer(folder / "tokenizer"),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder
