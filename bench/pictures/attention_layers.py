"""What the published and stock forms put in front of a UNet's attention layers, and take out again.

Diffusers calls a processor with more than any of them reads: a mask, and what only other models' layers have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnctl_fast.attach.layers import Layer, unet_layers
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


def heads(attn: Any, x: Tensor) -> Tensor:
    """`[R,H,N,d]` of a projection `[R,N,H*d]`."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def heads_to_channels(x: Tensor) -> Tensor:
    """`[R,N,H*d]` of `[R,H,N,d]`."""
    return x.transpose(1, 2).flatten(2)


def queries(attn: Any, image: Tensor) -> Tensor:
    """q `[R,H,M,d]` of the image tokens `[R,M,C]`."""
    return heads(attn, attn.to_q(image))


def keys_values(attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """k and v `[R,H,N,d]` of a context `[R,N,C]`."""
    return heads(attn, attn.to_k(context)), heads(attn, attn.to_v(context))


def finished(attn: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
    """A transformer block's layer output `[R,M,C]` for attention `[R,H,M,d]`."""
    out = attn.to_out[1](attn.to_out[0](heads_to_channels(out).to(hidden_states.dtype)))
    return out / attn.rescale_output_factor


def flat_heads(attn: Any, image: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `[R*H,N,d]`, as released codes have them."""
    q, k, v = (attn.head_to_batch_dim(x) for x in (attn.to_q(image), attn.to_k(context), attn.to_v(context)))
    return q, k, v


def flat_logits(attn: Any, q: Tensor, k: Tensor) -> Tensor:
    """Logits in memory `[R*H,M,N]`."""
    return torch.baddbmm(q.new_empty(len(q), q.shape[1], k.shape[1]), q, k.mT, beta=0, alpha=attn.scale)


def flat_output(attn: Any, probabilities: Tensor, v: Tensor) -> Tensor:
    """The layer's output `[R,M,C]`, before the factor that it may be divided by."""
    out = attn.batch_to_head_dim(torch.bmm(probabilities, v))
    return attn.to_out[1](attn.to_out[0](out))


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(wide_dtype(x.dtype))
