"""A UNet for the length of a guidance pass: cut after the last layer that is read, its weights frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_STAGES = ("down_blocks", "mid_block", "up_blocks")


@contextmanager
def cut_after(unet: Any, block: str) -> Iterator[None]:
    """Within the block, `unet(...)` ends with this one of its blocks (such as `up_blocks.1`) and returns its output.

    The modules are the UNet's own, so that whatever hooks and adapters they carry stay at work.
    """
    stage, _, index = block.partition(".")
    kept: dict[str, Any] = {"conv_norm_out": None, "conv_out": nn.Identity()}
    if stage != "up_blocks":
        kept["up_blocks"] = nn.ModuleList()
    if stage == "down_blocks":
        kept["mid_block"] = None
    last = getattr(unet, stage)
    if index:
        kept[stage] = last[: int(index) + 1]
        last = last[int(index)]
    resamplers = [name for name in ("downsamplers", "upsamplers") if getattr(last, name, None) is not None]
    with _replaced(unet, kept), _replaced(last, dict.fromkeys(resamplers)):
        yield


@contextmanager
def _replaced(module: nn.Module, children: dict[str, Any]) -> Iterator[None]:
    """Within the block, those of these children that the module has are others."""
    before = {name: module._modules[name] for name in children if name in module._modules}
    module._modules.update({name: children[name] for name in before})
    try:
        yield
    finally:
        module._modules.update(before)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, no parameter of the module requires a gradient."""
    # By name: sequential offloading puts other parameters into their places in the meantime.
    trained = [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    for owner, name in trained:
        owner.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for owner, name in trained:
            owner.get_parameter(name).requires_grad_(True)
