"""What a guidance pass costs: operations and memory, counted on UNets of real configurations without weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

import attnctl_fast as ac
from attnctl_fast.attach.call import Call, Site
from attnctl_fast.attach.evaluation import Evaluation
from attnctl_fast.attach.families import UNET
from attnctl_fast.attach.guidance import reading
from attnctl_fast.attach.layers import cross_attention_layers
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
    layers = cross_attention_layers(unet)
    side = arguments["sample"].shape[-1]
    prompts: Any = SimpleNamespace(count=1, length=arguments["encoder_hidden_states"].shape[1])
    call: Any = Call(None, prompts, 1, None, step=0, steps=50, latents=(side, side))  # type: ignore[arg-type]
    sites = [Site(layers[name]) for name in method.default_layers(layers)]
    tap: Any = SimpleNamespace(latents=arguments["sample"], moved=None, factor=lambda *_: None)
    return method.start(call, sites), Evaluation(call, UNET, unet, Rows(1, [0], [0]), tap, (), arguments), sites


def flops(run: Callable[[], Any]) -> int:
    # Without its hooks on modules, which torch.autograd.grad does not support.
    counter = FlopCounterMode(display=False)
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
