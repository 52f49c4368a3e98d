"""Queries, keys and values as diffusers' attention processors make them, from a layer's own modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _image(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """The image tokens `[R,M,C]` as the projections read them."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def queries(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
    """q `[R,H,M,d]`."""
    q = _to_heads(attn, attn.to_q(_image(attn, hidden_states, temb)))
    return q if attn.norm_q is None else attn.norm_q(q)


def keys_values(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
    """k and v `[R,H,N,d]` of a context `[R,N,C]`."""
    return _keys_values(attn, attn.norm_encoder_hidden_states(text) if attn.norm_cross else text)


def own_keys_values(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v `[R,H,M,d]` of self-attention."""
    return _keys_values(attn, _image(attn, hidden_states, temb))


def _keys_values(attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    k, v = _to_heads(attn, attn.to_k(context)), _to_heads(attn, attn.to_v(context))
    return k if attn.norm_k is None else attn.norm_k(k), v


def _to_heads(attn: Any, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def heads_to_channels(x: Tensor) -> Tensor:
    """`[R,M,H*d]` of `[R,H,M,d]`."""
    return x.transpose(1, 2).flatten(2)
