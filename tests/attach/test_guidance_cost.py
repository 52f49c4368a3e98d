"""What a guidance pass costs: operations and memory, counted on models of real configurations without weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

import attnctl_fast as ac
from attnctl_fast.attach.call import Call, Site
from attnctl_fast.attach.evaluation import Evaluation
from attnctl_fast.attach.families import FAMILIES
from attnctl_fast.attach.guidance import reading
from attnctl_fast.attach.rows import Rows
from bench.pictures import architectures
from tests.support import tiny
from tests.support.marks import full


class Sum(ac.LatentGuidance):
    """Of all maps of the layers of half the grid on each axis, or a quarter where there are such."""

    def default_layers(self, layers: dict[str, Any]) -> list[str]:
        factor = min(4, max(layer.factor for layer in layers.values() if layer.block != "mid_block"))
        return [name for name, layer in layers.items() if layer.factor == factor]

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return maps.sum((1, 2))


def given(unet: Any) -> dict[str, Any]:
    config, side = unet.config, unet.config.sample_size
    arguments: dict[str, Any] = {
        "sample": torch.ones(1, 4, side, side),
        "timestep": torch.ones(()),
        "encoder_hidden_states": torch.ones(1, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return arguments


def guidance(unet: Any, method: ac.LatentGuidance, arguments: dict[str, Any]) -> tuple[Any, Evaluation, list[Site]]:
    """The method at the first step of a call, the evaluation of the UNet that it guides, and its layers."""
    family = next(family for family in FAMILIES if family.model == type(unet).__name__)
    side = int(unet.config.get("sample_size", 128))
    layers = {name: layer for name, layer in family.layers(unet).items() if layer.cross}
    prompts: Any = SimpleNamespace(count=1, length=arguments["encoder_hidden_states"].shape[1])
    call: Any = Call(None, prompts, 1, None, step=0, steps=50, latents=(side, side))  # type: ignore[arg-type]
    sites = [Site(layers[name]) for name in method.default_layers(layers)]
    for site in sites:
        site.grid = site.layer.grid(call.latents)
    tap: Any = SimpleNamespace(latents=None, moved=None, factor=lambda *_: None)
    return method.start(call, sites), Evaluation(call, family, unet, Rows(1, [0], [0]), tap, (), arguments), sites


def _of_attention(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of queries, and columns, and the width of a head."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


# Of operations of ours that would otherwise count as none: shapes in place of tensors.
OURS = {
    torch.ops.attnctl_fast.attention: _of_attention,
    # Five products, where the forward has two.
    torch.ops.attnctl_fast.attention_backward: lambda out, lse, q, k, *args, **kwargs: _of_attention(q, k) * 5 // 2,
    torch.ops.attnctl_fast.maps_from_lse: lambda q, k, lse, ids, *args, **kwargs: (
        2 * q[0] * q[1] * q[2] * q[3] * ids[-1]
    ),
}


def flops(run: Callable[[], Any]) -> int:
    # Without its hooks on modules, which torch.autograd.grad does not support.
    counter = FlopCounterMode(display=False, custom_mapping=OURS)
    with _FlopCounterMode(counter):
        run()
    return counter.get_total_flops()


def saved(unet: Any, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, besides the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("name", "forward", "both"), [("sd15", 0.495, 1.05), full("sdxl", 0.766, 1.6)])
def test_operations(name: str, forward: float, both: float) -> None:
    """In units of a full forward pass: the cut one, and with its backward pass; the whole UNet takes far more."""
    with torch.device("meta"):
        unet = architectures.unet(name)
        arguments = given(unet)
        full = flops(lambda: unet(**arguments))
        cut, evaluation, sites = guidance(unet, Sum(), arguments)
        whole, other, _ = guidance(unet, Sum(truncate=False, freeze=False), arguments)
        with reading(evaluation, sites, None) as read, torch.no_grad():
            assert flops(lambda: read(arguments["sample"])) <= forward * full
        spent = flops(lambda: cut.before_denoiser(evaluation))
        assert spent <= both * full
        assert flops(lambda: whole.before_denoiser(other)) > 1.1 * spent


# By their classes in diffusers.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3.5 medium": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "flux.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}


def given_transformer(model: Any) -> dict[str, Any]:
    """What a call at 1024 pixels gives a transformer."""
    if type(model).__name__ == "FluxTransformer2DModel":
        return {
            "hidden_states": torch.ones(1, 4096, 64),
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.ones(1, 512, 4096),
            "pooled_projections": torch.ones(1, 768),
            "img_ids": torch.ones(4096, 3),
            "txt_ids": torch.ones(512, 3),
            "guidance": torch.ones(1),
        }
    return {
        "hidden_states": torch.ones(1, 16, 128, 128),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.ones(1, 333, 4096),
        "pooled_projections": torch.ones(1, 2048),
    }


class Words(ac.LatentGuidance):
    """Of the maps of eight tokens, in the layers where guidance reads them by default."""

    def tokens(self, prompts: Any) -> list[list[int]]:
        return [list(range(8))]

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return maps.sum((1, 2))


@pytest.mark.full
@pytest.mark.parametrize(("name", "forward", "both"), [("sd3.5 medium", 0.985, 2.5), ("flux.1 dev", 0.33, 0.75)])
def test_operations_of_transformers(name: str, forward: float, both: float) -> None:
    """All of SD 3's blocks have two streams; of FLUX's those that are read are a third of the model."""
    with torch.device("meta"):
        kind, config = TRANSFORMERS[name]
        model = getattr(diffusers, kind)(**config).eval()
        arguments = given_transformer(model)
        full = flops(lambda: model(**arguments))
        cut, evaluation, sites = guidance(model, Words(), arguments)
        whole, other, _ = guidance(model, Words(truncate=False, freeze=False), arguments)
        with reading(evaluation, sites, torch.ones(8, dtype=torch.int64)) as read, torch.no_grad():
            assert flops(lambda: read(arguments["hidden_states"])) <= forward * full
        spent = flops(lambda: cut.before_denoiser(evaluation))
        print(name, spent / full)
        assert spent <= both * full
        assert flops(lambda: whole.before_denoiser(other)) > spent


class Down(Sum):
    def default_layers(self, layers: dict[str, Any]) -> list[str]:
        return [name for name in layers if name.startswith("down_blocks.1")]


def test_memory_falls_as_the_unet_is_cut() -> None:
    """What autograd keeps; on a CPU, for on the meta device PyTorch's attention is not the fused one."""
    unet = tiny.unet()
    methods = {
        "down blocks": Down(),
        "cut": Sum(),
        "cut, trainable": Sum(freeze=False),
        "whole": Sum(truncate=False),
        "whole, trainable": Sum(truncate=False, freeze=False),
    }
    kept = {}
    for name, method in methods.items():
        at_work, evaluation, _ = guidance(unet, method, given(unet))
        kept[name] = saved(unet, lambda at_work=at_work, evaluation=evaluation: at_work.before_denoiser(evaluation))
    assert kept["down blocks"] < kept["cut"] < kept["cut, trainable"]
    assert kept["cut"] < 0.8 * kept["whole"]
    assert kept["whole"] < kept["whole, trainable"]
