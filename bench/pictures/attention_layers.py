"""What the published and stock forms put in front of a UNet's attention layers, and take out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from attnctl_fast.attach.layers import Layer, unet_layers
from bench.pictures.projections import heads_to_channels
from bench.pictures.sampling import wide_dtype


def layers_of(pipe: Any, *, cross: bool | None = None) -> dict[str, Layer]:
    """The attention layers of a pipeline's UNet in order of execution; `cross`: only those, or only the others."""
    found = unet_layers(pipe.unet)
    return {name: layer for name, layer in found.items() if cross is None or layer.cross == cross}


@contextmanager
def replaced(layers: Mapping[str, Layer], processors: Mapping[str, Any]) -> Iterator[None]:
    """These layers with the processors of the same name within the block, with their own after it."""
    before = {name: layers[name].module.processor for name in processors}
    try:
        for name, processor in processors.items():
            layers[name].module.set_processor(processor)
        yield
    finally:
        for name, processor in before.items():
            layers[name].module.set_processor(processor)


def finished(attn: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    """A transformer block's layer output `[R,M,C]` for attention `[R,H,M,d]`."""
    out = attn.to_out[1](attn.to_out[0](heads_to_channels(out).to(hidden_states.dtype)))
    return out / attn.rescale_output_factor


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(wide_dtype(x.dtype))
