"""Energy-based cross-attention (arXiv 2306.09869): github.com/EnergyAttention/Energy-Based-CrossAttention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.official import repository
from bench.official.repository import SEED, Adapter, Clone, Comparison, Results, attention_layer, projected
from bench.pictures.attention_layers import keys_values, queries

REPOSITORY = "Energy-Based-CrossAttention"
MARKER = "modules/models/energy_attention.py"
MODULE = "modules.models.energy_attention"
GAMMAS: dict[str, Any] = {"gamma_attn": 0.01, "gamma_norm": 0.02}
ALPHA = 0.4


def layer(clone: Clone, device: torch.device, edited: bool) -> Comparison:
    """A layer's output and the increment of its context, from its inputs; with one editorial context, which is moved as
    well, if `edited`."""
    processor = clone.load(MODULE).EnergyCrossAttnProcessor()
    attn, image, text = attention_layer(device)
    generator = torch.Generator().manual_seed(SEED + 1)
    edit = torch.randn(*text.shape, generator=generator).to(device)
    options = {
        "alpha": [ALPHA],
        "edit_prompt_embeds": edit,
        "editing_direction": [1],
        "gamma_attn_comp": [GAMMAS["gamma_attn"]],
        "gamma_norm_comp": [GAMMAS["gamma_norm"]],
    }

    def theirs() -> Results:
        found = processor(attn, image, encoder_hidden_states=text, **GAMMAS, **(options if edited else {}))
        out, moved, edits = found[:3]
        return (out, moved, *edits)

    def attended(q: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = keys_values(attn, context)
        out, pull = ops.attention_with_context_gradient(q, k, v, scale=attn.scale)
        return out, ops.context_update(pull, k, attn.to_k, **GAMMAS)

    def ours() -> Results:
        q = queries(attn, image)
        out, moved = attended(q, text)
        if not edited:
            return projected(attn, out), moved
        other, edit_moved = attended(q, edit)
        out = (out + ALPHA * other) / (1 + ALPHA)
        return projected(attn, out), moved, edit_moved

    return Comparison(repository.LAYER.sizes, theirs, ours, 1e-3)


ADAPTERS = (
    Adapter("EnergyCrossAttnProcessor.__call__", "layer of EnergyContext", partial(layer, edited=False)),
    Adapter("EnergyCrossAttnProcessor.__call__ with an edit", "layer of Composition", partial(layer, edited=True)),
)
