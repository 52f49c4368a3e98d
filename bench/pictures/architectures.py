"""Pipelines and UNets of real configurations, for measuring: random weights, or none on the meta device."""

from __future__ import annotations

from typing import Any

import torch

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# The text encoders; the last of two gives the pooled embedding.
TEXT_CONFIGS: dict[str, list[dict[str, Any]]] = {
    "sd15": [_CLIP_L],
    "sd2": [
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        }
    ],
    "sdxl": [
        _CLIP_L,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
    ],
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "force_upcast": False,
}
# Pixels along a side at which the model was trained.
SIZES = {"sd15": 512, "sd2": 512, "sdxl": 1024, "shapes": 64}
# Sides are multiples of this, so that every block halves its grid evenly: pixels per latent, times three halvings.
SIDES = {"sd15": 64, "sd2": 64, "sdxl": 64, "shapes": 32}
TOKENS = 77


def unet(name: str) -> Any:
    """The UNet of `CONFIGS[name]`, on the current default device, in evaluation mode."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONFIGS[name]).eval()


def _text_encoder(config: dict[str, Any], tokenizer: Any, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    made = CLIPTextConfig(**config, **ends, pad_token_id=tokenizer.pad_token_id)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(made).eval()


def pipeline(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline of diffusers with DDIM: the trained one of `shapes`, or an architecture with random weights.

    Its tokenizer knows the words of `attnctl_fast.shapes`, with CLIP's 77 tokens.

    Raises:
        ValueError: an architecture that is not known.
    """
    if name not in SIZES:
        raise ValueError(f"--arch is {name!r}; it must be one of {', '.join(SIZES)}")
    if name == "shapes":
        from attnctl_fast.shapes import load_pipeline

        pipe: Any = load_pipeline(device=device).to(dtype)
    else:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            pipe = _random(name).to(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(name: str) -> Any:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline

    from attnctl_fast.shapes.text import build_tokenizer
    from attnctl_fast.shapes.unet import build_scheduler

    tokenizer = build_tokenizer(TOKENS)
    configs = TEXT_CONFIGS[name]
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(**VAE_CONFIG).eval(),
        "unet": unet(name),
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(configs[0], tokenizer, projection=False),
        "scheduler": build_scheduler(),
    }
    if len(configs) == 2:
        second = _text_encoder(configs[1], tokenizer, projection=True)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    spared = dict.fromkeys(("safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, **spared, requires_safety_checker=False)
