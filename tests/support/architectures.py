"""The architectures of the bench, `bench.pictures.architectures`, with their real structure at small widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.pictures import architectures

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
UNET = {"sample_size": 16, "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 2}
VAE = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
SDXL = {"transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 32, "addition_time_embed_dim": 8}
SDXL |= {"projection_class_embeddings_input_dim": 6 * 8 + 16}


@contextmanager
def small() -> Iterator[pytest.MonkeyPatch]:
    """Have pipelines be small that are made within the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in architectures.CONFIGS.items():
            widths = (8, 8, 16, 16)[: len(config.get("block_out_channels", (0,) * 4))]
            narrow = {"block_out_channels": widths, "cross_attention_dim": 16, **(SDXL if name == "sdxl" else {})}
            patch.setitem(architectures.CONFIGS, name, config | UNET | narrow)
            texts = [text | TEXT for text in architectures.TEXT_CONFIGS[name]]
            texts = [text | {"projection_dim": 16} if "projection_dim" in text else text for text in texts]
            patch.setitem(architectures.TEXT_CONFIGS, name, texts)
        patch.setattr(architectures, "VAE_CONFIG", architectures.VAE_CONFIG | VAE)
        yield patch
