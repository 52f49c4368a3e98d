"""The choice of layers, from the configuration of real UNets (built without weights)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.layers import choose, cross_attention_layers, last_down_first_up, unet_layers
from tests.support import tiny
from tests.support.touched import touched

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


def layers_of(**config: Any) -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return cross_attention_layers(UNet2DConditionModel(**config))


@pytest.mark.parametrize("config", [SD1, SD2], ids=["SD 1.x", "SD 2.x"])
def test_stable_diffusion(config: dict[str, Any]) -> None:
    layers = layers_of(**config)
    assert len(layers) == 16
    default = last_down_first_up(layers)
    assert default == choose(layers, ("down_blocks.2", "up_blocks.1"))
    assert len(default) == 5
    assert choose(layers, ac.by_downsampling(4)) == default
    assert [layers[name].grid((64, 96)) for name in default] == [(16, 24)] * 5
    assert choose(layers, ac.by_downsampling(8)) == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert {name.split(".attentions")[0] for name in choose(layers, ac.by_downsampling(1))} == {
        "down_blocks.0",
        "up_blocks.3",
    }


def test_sdxl() -> None:
    layers = layers_of(**SDXL)
    blocks = list(dict.fromkeys(layer.block for layer in layers.values()))
    assert blocks == ["down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert {layers[name].block for name in last_down_first_up(layers)} == {"down_blocks.2", "up_blocks.0"}
    assert {layers[name].block for name in choose(layers, ac.by_downsampling(2))} == {"down_blocks.1", "up_blocks.1"}
    assert layers["mid_block.attentions.0.transformer_blocks.9.attn2"].grid((128, 128)) == (32, 32)


def test_order_is_that_of_execution() -> None:
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl")
    executed = []
    layers = cross_attention_layers(pipe.unet)
    for name in layers:
        pipe.unet.get_submodule(name).register_forward_hook(lambda *_, name=name: executed.append(name))
    pipe("a bag", num_inference_steps=1, output_type="latent")
    assert executed == list(layers)


def test_grids_are_those_of_the_network() -> None:
    """Also where the latents' sides are odd or not divisible by the UNet's factor."""
    pipe = tiny.pipeline("StableDiffusionXLPipeline", "sdxl")
    layers = cross_attention_layers(pipe.unet)
    seen = {}
    for name in layers:
        pipe.unet.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].shape[1])
        )
    pipe.check_inputs = lambda *args, **kwargs: None
    for size in [(32, 32), (34, 20), (18, 30)]:
        pipe("a bag", num_inference_steps=1, output_type="latent", height=size[0] * 2, width=size[1] * 2)
        for name, layer in layers.items():
            height, width = layer.grid(size)
            assert seen[name] == height * width


def test_blocks_without_cross_attention_and_attention_to_text_alone() -> None:
    layers = layers_of(
        block_out_channels=(32, 64, 64),
        down_block_types=(CROSS, PLAIN, PLAIN),
        up_block_types=(PLAIN_UP, PLAIN_UP, CROSS_UP),
        mid_block_type="UNetMidBlock2D",
        only_cross_attention=(True, False, False),
    )
    assert {layer.block for layer in layers.values()} == {"down_blocks.0", "up_blocks.2"}
    assert {name.rsplit(".", 1)[1] for name in layers} == {"attn1", "attn2"}
    assert last_down_first_up(layers) == list(layers)
    assert choose(layers, ac.by_downsampling(1)) == list(layers)


def test_prefixes() -> None:
    layers = layers_of(**SD1)
    whole = "down_blocks.2.attentions.1.transformer_blocks.0.attn2"
    assert choose(layers, (whole,)) == [whole]
    assert choose(layers, ("down_blocks.2.attentions.1",)) == [whole]
    assert choose(layers, ("mid_block", "down_blocks.0")) == choose(layers, ("down_blocks.0", "mid_block"))
    assert choose(layers, ("down_blocks",)) == [name for name in layers if name.startswith("down")]
    for prefix in ("down_blocks.3", "down_blocks.2.attentions.1.transformer_blocks.0.att", "attn2", "down"):
        with pytest.raises(
            ValueError, match=rf"'{prefix}' matches no layer with text; this model has down_blocks\.0\."
        ):
            choose(layers, (prefix,))
    with pytest.raises(
        ValueError,
        match=r"grid by 16; this model has by_downsampling of 1 \(down_blocks\.0, up.*\), 2 \(.*\), 4 \(.*\), 8",
    ):
        choose(layers, ac.by_downsampling(16))


@pytest.mark.parametrize("factor", [0, 3, -2, 2.0, True])
def test_bad_factor(factor: Any) -> None:
    with pytest.raises(ValueError, match="it must be a power of two"):
        ac.by_downsampling(factor)


@pytest.mark.parametrize(
    ("layers", "edited"),
    [
        (None, {"down_blocks.1", "up_blocks.1"}),
        ("mid_block", {"mid_block"}),
        (["down_blocks.1", "mid_block"], {"down_blocks.1", "mid_block"}),
        (ac.by_downsampling(2), {"down_blocks.1", "up_blocks.1"}),
    ],
)
def test_only_the_chosen_layers_are_touched(layers: Any, edited: set[str]) -> None:
    pipe = tiny.pipeline()
    changed = touched(pipe, ac.AttentionRegulation(["bag"], layers=layers), num_inference_steps=1)
    assert {name.split(".attentions")[0] for name in changed} == edited
    assert all(name.endswith("attn2") for name in changed)


@pytest.mark.parametrize(("config", "count"), [(SD1, 16), (SDXL, 70)], ids=["SD 1.x", "SDXL"])
def test_self_attention(config: dict[str, Any], count: int) -> None:
    """One beside every cross-attention layer, at its grid and before it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = unet_layers(unet)
    cross = cross_attention_layers(unet)
    assert [name for name, layer in layers.items() if layer.cross] == list(cross)
    assert len(layers) == 2 * count
    for own, other in zip(list(layers.values())[::2], cross.values(), strict=True):
        assert own.name == other.name.replace("attn2", "attn1") and not own.cross
        assert (own.factor, own.block) == (other.factor, other.block)
