"""Normalized attention guidance as its authors' code does it: the negative prompt's rows stand behind the others in the
text's batch, the queries of the prompt's rows are there twice, and what joins both attentions is eager."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.pictures import ours
from bench.pictures.attention_layers import heads_to_channels, keys_values, layers_of, queries, replaced
from bench.pictures.sampling import Drawn, Setting, encode, sample


class _Guided:
    """A cross-attention layer. negative: the context that is behind the UNet's own."""

    def __init__(self, method: Any, negative: Tensor) -> None:
        self.method, self.negative = method, negative

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, torch.cat([encoder_hidden_states, self.negative]))
        count = len(self.negative)
        q = torch.cat([q, q[-count:]])
        out = heads_to_channels(F.scaled_dot_product_attention(q[:-count], k[:-count], v[:-count], scale=attn.scale))
        negative = F.scaled_dot_product_attention(q[-count:], k[-count:], v[-count:], scale=attn.scale)
        unconditional, positive = out[:-count], out[-count:]
        positive = self._joined(positive, heads_to_channels(negative))
        out = attn.to_out[1](attn.to_out[0](torch.cat([unconditional, positive])))
        return out / attn.rescale_output_factor

    def _joined(self, positive: Tensor, negative: Tensor) -> Tensor:
        scale, tau, alpha = self.method.scale, self.method.tau, self.method.alpha
        guided = positive * scale - negative * (scale - 1)
        own = torch.norm(positive, p=2, dim=-1, keepdim=True).expand(*positive.shape)
        ratio = torch.norm(guided, p=2, dim=-1, keepdim=True).expand(*positive.shape) / own
        guided = guided * torch.minimum(ratio, ratio.new_ones(1) * tau) / ratio
        return guided * alpha + positive * (1 - alpha)


def nag(setting: Setting) -> Drawn:
    """NAG (arXiv 2505.21179); see the top of this file."""
    method = ours.method("NAG", setting)
    with torch.no_grad():
        negative = encode(setting, method.negative_prompt).context
    layers = layers_of(setting.pipe, cross=True)
    with replaced(layers, dict.fromkeys(layers, _Guided(method, negative))):
        return Drawn(sample(setting))
