"""The attention processor that stands in front of a layer's own and lets methods edit the conditional rows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ._engine import Engine
    from ._layers import Layer

# Processors whose text attention is softmax(scale q k^T) v between to_q, to_k, to_v and to_out.
_STANDARD = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
_IP_ADAPTER = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


def is_supported(processor: Any) -> bool:
    """Whether attention through this processor can be edited: diffusers' standard and IP-Adapter ones."""
    from diffusers.models import attention_processor

    known = (getattr(attention_processor, name, None) for name in _STANDARD + _IP_ADAPTER)
    return type(processor) in [cls for cls in known if cls is not None]


class Projected(NamedTuple):
    """q `[R,H,M,d]`, k and v `[R,H,N,d]` of all rows, and the input of the layer for its residual connection."""

    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor


def project(attn: Any, hidden_states: Tensor, text: Tensor, temb: Tensor | None) -> Projected:
    """Queries, keys and values as diffusers' processors make them, from the layer's own modules."""
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    if attn.norm_cross:
        text = attn.norm_encoder_hidden_states(text)
    q, k, v = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
    )
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    return Projected(q, k, v, residual)


def _heads_to_channels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class _Muted:
    """An attention layer whose text values are zero and which projects nothing: with it, an IP-Adapter's processor
    returns the attention to its images alone."""

    spatial_norm = group_norm = norm_q = norm_k = None
    norm_cross = residual_connection = False
    rescale_output_factor = 1.0
    to_out = (torch.nn.Identity(), torch.nn.Identity())

    def __init__(self, attn: Any) -> None:
        self._attn = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, query: Tensor) -> Tensor:
        self._query = query
        return query

    def to_k(self, text: Tensor) -> Tensor:
        return self._query.new_zeros(len(text), 1, self._query.shape[2])

    to_v = to_k


class ControlledProcessor:
    """Stands in for a layer's processor, and is taken for it: attributes and `isinstance` are those of the processor
    behind.

    So an IP-Adapter's weights stay part of the UNet and `set_ip_adapter_scale` reaches them while control is on.
    """

    _inner: Any
    _layer: Layer
    _engine: Engine
    _keywords: frozenset[str]

    def __init__(self, inner: Any, layer: Layer, engine: Engine) -> None:
        names = inspect.signature(inner.__call__).parameters
        self.__dict__.update(_inner=inner, _layer=layer, _engine=engine, _keywords=frozenset(names))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__dict__["_inner"])

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._inner, name, value)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        optional = {"temb": temb, "scale": scale, "ip_adapter_masks": ip_adapter_masks}
        return self._run(attn, hidden_states, encoder_hidden_states, attention_mask, optional)

    @torch.compiler.disable
    def _run(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None,
        optional: dict[str, Any],
    ) -> Tensor:
        kwargs = {name: value for name, value in optional.items() if value is not None and name in self._keywords}

        def own() -> Tensor:
            return self._inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )

        engine, layer = self._engine, self._layer
        edit, recordings = engine.at(layer)
        if edit is None and not recordings:
            return own()
        if attention_mask is not None:
            raise ValueError(
                f"{layer.name} was given an attention mask; editing or capturing attention under a mask is not "
                "supported. Call the UNet without encoder_attention_mask, or leave this layer out"
            )
        text, images = encoder_hidden_states, None
        if isinstance(encoder_hidden_states, tuple):
            text, images = encoder_hidden_states
        elif "ip_adapter_masks" in self._keywords:
            raise ValueError(
                f"{layer.name} has an IP-Adapter but was given text and image embeddings in one tensor; "
                "pass the images as added_cond_kwargs={'image_embeds': ...}, as the pipelines do"
            )
        rows = engine.conditional(hidden_states.shape[0])
        q, k, v, residual = project(attn, hidden_states, text, optional["temb"])
        edited = None
        if edit is not None:
            if attn.upcast_attention:
                q, k, v = q.float(), k.float(), v.float()
            edited = edit.attend(layer, q[rows:], k[rows:], v[rows:], attn.scale)
        for recording in recordings:
            recording.record(layer, q[rows:], k[rows:], attn.scale, edited)
        if edited is None:
            return own()

        out = edited.out
        if rows:
            plain = F.scaled_dot_product_attention(q[:rows], k[:rows], v[:rows], scale=attn.scale)
            out = torch.cat([plain, out])
        out = _heads_to_channels(out).to(hidden_states.dtype)
        if images is not None:
            query = _heads_to_channels(q).to(hidden_states.dtype)
            out = out + self._inner(_Muted(attn), query, (text[:, :1], images), **kwargs)
        out = attn.to_out[1](attn.to_out[0](out))
        if residual.ndim == 4:
            out = out.transpose(1, 2).unflatten(2, residual.shape[2:])
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor
