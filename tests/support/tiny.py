"""Tiny diffusers pipelines with random weights: every kind that methods attach to, a fraction of a second each on a
CPU."""

from __future__ import annotations

import inspect
import json
import string
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a",
    "an",
    "and",
    "of",
    "the",
    "photo",
    "red",
    "blue",
    "black",
    "bag",
    "apple",
    "ball",
    "dog",
    "cat",
    "two",
    ",",
)
# Spelled by several tokens; "apple" also ends "pineapple".
PIECES = {"octopus": ("octo", "pus</w>"), "pineapple": ("pine", "apple</w>")}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 16
SIDE = 32  # of the latents; the controlled layers then have 16x16 cells
SCALE = 2  # image pixels per latent


def _merge(symbols: list[str], upto: tuple[str, ...], merges: list[tuple[str, str]]) -> None:
    """Add the merges that join `symbols` into the pieces `upto`."""
    start = 0
    for piece in upto:
        joined, start = symbols[start], start + 1
        while joined != piece:
            if (joined, symbols[start]) not in merges:
                merges.append((joined, symbols[start]))
            joined, start = joined + symbols[start], start + 1


@cache
def _tokenizer_files(pad: str) -> tempfile.TemporaryDirectory[str]:
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _merge([*word[:-1], f"{word[-1]}</w>"], (f"{word}</w>",), merges)
    for word, pieces in PIECES.items():
        _merge([*word[:-1], f"{word[-1]}</w>"], pieces, merges)
    letters = string.ascii_lowercase + string.digits + ",.!-'<>|"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges), BOS, EOS]
    kept = tempfile.TemporaryDirectory(prefix="tiny-tokenizer-")
    folder = Path(kept.name)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": BOS, "eos_token": EOS}
    config |= {"unk_token": EOS, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return kept


def tokenizer(pad: str = EOS) -> Any:
    """A CLIPTokenizer of 16 tokens with the vocabulary above. SD 1.x pads with the end of text, SD 2.x and SDXL with
    "!"."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_tokenizer_files(pad).name)


def _text_encoder(tokens: Any, projection: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=16,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE * SCALE,
    ).eval()


UNETS: dict[str, dict[str, Any]] = {
    # Cross-attention at 16x16 (down_blocks.1, up_blocks.1) and in the mid block at 8x8.
    "sd1": {"attention_head_dim": 2},
    "sd2": {"attention_head_dim": (2, 4, 2), "use_linear_projection": True, "upcast_attention": True},
    # Cross-attention at 16x16 and 8x8: down_blocks.1, .2, mid, up_blocks.0, .1.
    "sdxl": {
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "cross_attention_dim": 32,
    },
}


def unet(kind: str = "sd1", in_channels: int = 4) -> Any:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": SIDE,
        "in_channels": in_channels,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16, 32),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    model = UNet2DConditionModel(**(config | UNETS[kind])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Sharper attention than random weights have, and an effect on the output that tests can see.
            if "attn2.to_q" in name or "attn2.to_k" in name:
                parameter.mul_(4)
            elif "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                parameter.mul_(3)
    return model


def scheduler(name: str = "DDIMScheduler") -> Any:
    import diffusers

    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
    }
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    return cls(**{key: value for key, value in config.items() if key in known})


def controlnet() -> Any:
    from diffusers import ControlNetModel

    model = ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16, 32),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
    ).eval()
    with torch.no_grad():
        for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)
    return model


def pipeline(cls: str = "StableDiffusionPipeline", kind: str = "sd1", *, seed: int = 0, **parts: Any) -> Any:
    """A pipeline of this diffusers class on a tiny UNet of this kind; `parts` replace or add components."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = tokenizer(EOS if kind == "sd1" else "!")
        built: dict[str, Any] = {"vae": _vae(), "text_encoder": _text_encoder(tokens), "tokenizer": tokens}
        built["unet"] = unet(kind, parts.pop("in_channels", 4))
        built["scheduler"] = scheduler()
        if kind == "sdxl":
            second = tokenizer("!")
            built |= {"tokenizer_2": second, "text_encoder_2": _text_encoder(second, projection=True)}
        else:
            built |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if "ControlNet" in cls:
            built["controlnet"] = controlnet()
        pipe = getattr(diffusers, cls)(**(built | parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ip_adapter(pipe: Any, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Random IP-Adapter weights for the pipeline's UNet, as `load_ip_adapter` takes them; images are embeddings of
    width 8."""
    generator = torch.Generator().manual_seed(seed)
    width = pipe.unet.config.cross_attention_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    weights = {}
    for index, (name, module) in enumerate(_attention(pipe.unet)):
        if name.endswith("attn2"):
            weights[f"{index}.to_k_ip.weight"] = normal(module.inner_dim, width)
            weights[f"{index}.to_v_ip.weight"] = normal(module.inner_dim, width)
    projection = {"proj.weight": normal(4 * width, 8), "proj.bias": normal(4 * width)}
    return {
        "image_proj": projection | {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": weights,
    }


def _attention(model: Any) -> list[tuple[str, Any]]:
    modules = dict(model.named_modules())
    return [(key.removesuffix(".processor"), modules[key.removesuffix(".processor")]) for key in model.attn_processors]


def latents(count: int = 1, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> torch.Tensor:
    """`[count, 4, height, width]`; the i-th does not depend on `count`."""
    each = (torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed + i)) for i in range(count))
    return torch.cat(list(each))
