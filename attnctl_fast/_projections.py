"""Queries, keys and values as diffusers' attention processors make them, from a layer's own modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def queries(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """q `[R,H,M,d]`."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    q = _to_heads(attn, attn.to_q(hidden_states))
    return q if attn.norm_q is None else attn.norm_q(q)


def keys_values(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """k and v `[R,H,N,d]` of a context `[R,N,C]`."""
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    k, v = _to_heads(attn, attn.to_k(text)), _to_heads(attn, attn.to_v(text))
    return k if attn.norm_k is None else attn.norm_k(k), v


def _to_heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def heads_to_channels(x: Tensor) -> Tensor:
    """`[R,M,H*d]` of `[R,H,M,d]`."""
    return x.transpose(1, 2).flatten(2)
