"""Normalized attention guidance at its best in stock PyTorch: fused attention, and few passes over its results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.pictures import ours
from bench.pictures.attention_layers import finished, keys_values, layers_of, queries, replaced
from bench.pictures.sampling import Drawn, Setting, encode, sample


class _Guided:
    """A cross-attention layer. negative: keys and values `[B,H,N,d]`, which are the same at every step."""

    def __init__(self, method: Any, negative: tuple[Tensor, Tensor]) -> None:
        self.method, self.negative = method, negative

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, (k, v) = queries(attn, hidden_states), keys_values(attn, encoder_hidden_states)
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        half, method = len(q) // 2, self.method
        positive = out[half:]
        negative = F.scaled_dot_product_attention(q[half:], *self.negative, scale=attn.scale)
        guided = negative.mul_(1 - method.scale).add_(positive, alpha=method.scale)
        sizes = [torch.linalg.vector_norm(x, 2, (1, 3), keepdim=True) for x in (guided, positive)]
        share = method.alpha * (method.tau * sizes[1] / sizes[0]).clamp_(max=1.0)
        positive.mul_(1 - method.alpha).addcmul_(guided, share.to(guided.dtype))
        return finished(attn, out, hidden_states)


def nag(setting: Setting) -> Drawn:
    """Attention to the negative prompt in the conditional rows alone; its keys and values are made once."""
    method, layers = ours.method("NAG", setting), layers_of(setting.pipe, cross=True)
    with torch.no_grad():
        context = encode(setting, method.negative_prompt).context
        processors = {name: _Guided(method, keys_values(layer.module, context)) for name, layer in layers.items()}
    with replaced(layers, processors):
        return Drawn(sample(setting))
