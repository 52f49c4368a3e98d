"""Attention regulation (arXiv 2403.06381): github.com/YaNgZhAnG-V5/attention_regulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast import ops
from bench.official import repository
from bench.official.repository import SEED, Adapter, Clone, Comparison, Results, attention_layer, projected
from bench.pictures.attention_layers import keys_values, queries

REPOSITORY = "attention_regulation"
MARKER = "attention_regulation/attn_processor.py"
MODULE = "attention_regulation.attn_processor"
TARGETS, END = [2, 5], 8
EMA = 0.25


def _processor(clone: Clone) -> Any:
    return clone.load(MODULE).AttnProcessorAttnMapEdit()


def _theta(device: torch.device) -> Tensor:
    """The weights [1,H,T,r_y,r_x] that the released code draws from the global generator: [H,r_x*r_y,T] there."""
    rows, columns = ops.basis_shape(repository.LAYER.grid)
    torch.manual_seed(SEED)
    drawn = torch.rand(repository.LAYER.heads, columns * rows, len(TARGETS), device=device)
    return drawn.unflatten(1, (columns, rows)).permute(0, 3, 2, 1)[None].contiguous()


def descent(clone: Clone, device: torch.device) -> Comparison:
    """Twenty steps on the bias of a layer, given its logits or what we keep of them, and the bias that they find."""
    processor = _processor(clone)
    layer = repository.LAYER._replace(batch=1)
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (
        1.4 * torch.randn(1, layer.heads, tokens, layer.width, generator=generator).to(device)
        for tokens in (layer.image_tokens, layer.tokens, layer.tokens)
    )
    logits = (layer.width**-0.5 * q @ k.mT)[0].unflatten(1, layer.grid)
    edited = torch.empty_like(logits).repeat(2, 1, 1, 1)
    stats = ops.target_statistics(q, k, v, TARGETS)
    theta = _theta(device)

    def theirs() -> Results:
        internals: dict[str, list[Tensor]] = {}
        torch.manual_seed(SEED)
        processor._optimise_attention_maps(edited, logits, [TARGETS], internals, 0)
        (bias,) = internals["ma_attn"]
        return (bias.flatten(1, 2).mT[None],)

    def ours() -> Results:
        return (ops.regulate(stats, layer.grid, theta=theta).bias.cpu(),)

    return Comparison(layer.sizes, theirs, ours, 1e-2)


def layer(clone: Clone, device: torch.device) -> Comparison:
    """A layer's output with the edit of its conditional half, from its inputs."""
    processor = _processor(clone)
    attn, image, text = attention_layer(device)
    theta = _theta(device)

    def theirs() -> Results:
        torch.manual_seed(SEED)
        return (
            processor(
                attn,
                image,
                encoder_hidden_states=text,
                target_ids=[TARGETS],
                replace_id=END,
                internals={},
                current_step=0,
                num_edit_steps=1,
            ),
        )

    def ours() -> Results:
        q = queries(attn, image)
        k, v = keys_values(attn, text)
        plain = F.scaled_dot_product_attention(q[:1], k[:1], v[:1], scale=attn.scale)
        stats = ops.target_statistics(q[1:], k[1:], v[1:], TARGETS, pinned_ids=[0, END], scale=attn.scale)
        found = ops.regulate(stats, repository.LAYER.grid, theta=theta, ema=EMA)
        merged = ops.merge_targets(stats, v[1:], TARGETS, found.bias, pinned_ids=[0, END])
        return (projected(attn, torch.cat([plain, merged])),)

    # Their logits pass through half precision.
    return Comparison(repository.LAYER.sizes, theirs, ours, 1e-2)


ADAPTERS = (
    Adapter("AttnProcessorAttnMapEdit._optimise_attention_maps", "regulate", descent),
    Adapter("AttnProcessorAttnMapEdit.__call__", "layer of AttentionRegulation", layer),
)
