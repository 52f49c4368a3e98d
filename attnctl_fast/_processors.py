"""The attention processors that stand in front of a layer's own: one lets methods edit the conditional rows, one gives
maps to a guidance pass."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _impl, ops
from ._projections import heads_to_channels, keys_values, own_keys_values, queries

if TYPE_CHECKING:
    from ._contexts import Slot
    from ._engine import Engine
    from ._layers import Layer

NOT_HOOKED = (
    "the UNet ran without its forward hooks, which tell the sampling step; call it as unet(...), not as "
    "unet.forward(...), and where pipelines share it, all with or all without torch.compile"
)
# Processors whose text attention is softmax(scale q k^T) v between to_q, to_k, to_v and to_out.
_STANDARD = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
_IP_ADAPTER = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


def is_supported(processor: Any) -> bool:
    """Whether attention through this processor can be edited: diffusers' standard and IP-Adapter ones."""
    from diffusers.models import attention_processor

    known = (getattr(attention_processor, name, None) for name in _STANDARD + _IP_ADAPTER)
    return type(processor) in [cls for cls in known if cls is not None]


def _upcast(attn: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return `tensors` in float32 where the layer asks for it (`upcast_attention`, of SD 2.1).

    Half precision stays what it is where kernels run: their logits, softmax and sums are float32 anyway, and float32
    inputs are multiplied without matrix units.
    """
    if not attn.upcast_attention:
        return tensors
    like = tensors[0]
    if like.dtype.itemsize == 2 and _impl.resolve(None, like.device) == "triton":
        return tensors
    return tuple(x.float() for x in tensors)


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
    _engine: Engine | None
    _keywords: frozenset[str]
    _edited: bool
    _slot: Slot | None

    def __init__(self, inner: Any, layer: Layer, engine: Engine | None) -> None:
        names = inspect.signature(inner.__call__).parameters
        self.__dict__.update(_inner=inner, _layer=layer, _engine=engine, _keywords=frozenset(names))
        self._set(edited=False, slot=None)

    def _set(self, **state: Any) -> None:
        """`edited`: whether methods edit or captures record this layer. `slot`: what it does with the contexts of the
        call under way."""
        self.__dict__.update({f"_{name}": value for name, value in state.items()})

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
        run = self._run_outside_graph if self._edited else self._run
        return run(attn, hidden_states, encoder_hidden_states, attention_mask, optional)

    @torch.compiler.disable
    def _run_outside_graph(self, *arguments: Any) -> Tensor:
        return self._run(*arguments)

    def _run(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None,
        optional: dict[str, Any],
    ) -> Tensor:
        kwargs = self._known(optional)

        def own(context: Any) -> Tensor:
            return self._inner(
                attn, hidden_states, encoder_hidden_states=context, attention_mask=attention_mask, **kwargs
            )

        engine, layer, slot = self._engine, self._layer, self._slot
        assert engine is not None
        if engine.guiding:
            return own(encoder_hidden_states)
        edit, recordings = engine.at(layer) if self._edited else (None, [])
        if slot is not None:
            if not slot.contexts.prepared:
                raise RuntimeError(NOT_HOOKED)
            if slot.first and slot.contexts.cascades:
                slot.contexts.reset(self._split(encoder_hidden_states)[0])
            if not slot.contexts.on():
                slot = None
        if edit is None and not recordings and slot is None:
            return own(encoder_hidden_states)
        text, images = self._split(encoder_hidden_states)
        context = text if slot is None else slot.contexts.read(text)
        acts = slot is not None and slot.acts()
        if edit is None and not recordings and not acts:
            return own(context if images is None else (context, images))
        self._unmasked(attention_mask)
        q = queries(attn, hidden_states, optional["temb"])
        if context is None:
            k, v = own_keys_values(attn, hidden_states, optional["temb"])
        else:
            k, v = keys_values(attn, context)
        if edit is not None or acts:
            q, k, v = _upcast(attn, q, k, v)
        edited = None
        if edit is not None or recordings:
            rows = engine.conditional(hidden_states.shape[0])
        if edit is not None:
            edited = edit.attend(layer, q[rows:], k[rows:], v[rows:], attn.scale)
        for recording in recordings:
            recording.record(layer, q[rows:], k[rows:], attn.scale, edited)

        if slot is not None and acts:
            out = slot.contexts.attend(slot, attn, text, q, k, v, None if edited is None else edited.out)
        elif edited is None:
            return own(context if images is None else (context, images))
        else:
            out = edited.out
            if rows:
                plain = F.scaled_dot_product_attention(q[:rows], k[:rows], v[:rows], scale=attn.scale)
                out = torch.cat([plain, out])
        return self._finished(attn, hidden_states, q, out, text, images, kwargs)

    def _known(self, optional: dict[str, Any]) -> dict[str, Any]:
        """The optional arguments that are given and that the processor behind takes."""
        return {name: value for name, value in optional.items() if value is not None and name in self._keywords}

    def _unmasked(self, attention_mask: Tensor | None) -> None:
        """Raise ValueError for a mask."""
        if attention_mask is not None:
            raise ValueError(
                f"{self._layer.name} was given an attention mask; editing, capturing or guiding by attention under a "
                "mask is not supported. Call the UNet without encoder_attention_mask, or leave this layer out"
            )

    def _finished(
        self, attn: Any, hidden_states: Tensor, q: Tensor, out: Tensor, text: Tensor, images: Any, kwargs: Any
    ) -> Tensor:
        """The layer's output for attention `out` `[R,H,M,d]`: an IP-Adapter's images are attended to as well."""
        out = heads_to_channels(out).to(hidden_states.dtype)
        if images is not None:
            query = heads_to_channels(q).to(hidden_states.dtype)
            out = out + self._inner(_Muted(attn), query, (text[:, :1], images), **kwargs)
        out = attn.to_out[1](attn.to_out[0](out))
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def _split(self, encoder_hidden_states: Any) -> tuple[Any, Any]:
        """The text's context (None in self-attention), and an IP-Adapter's images or None."""
        if isinstance(encoder_hidden_states, tuple):
            text, images = encoder_hidden_states
            return text, images
        if "ip_adapter_masks" in self._keywords:
            raise ValueError(
                f"{self._layer.name} has an IP-Adapter but was given text and image embeddings in one tensor; "
                "pass the images as added_cond_kwargs={'image_embeds': ...}, as the pipelines do"
            )
        return encoder_hidden_states, None


class GuidedProcessor(ControlledProcessor):
    """Stands in for a layer's processor while the latents are guided: attention that also gives its maps.

    Args:
        inner: the processor that is there, standard, IP-Adapter or a `ControlledProcessor`.
        layer: the layer.
        token_ids: whose maps, `[B,n]`, or None for every token.
        maps: where they go, `[B,n,M]`.
    """

    _token_ids: Tensor | None
    _maps: list[Tensor]

    def __init__(self, inner: Any, layer: Layer, token_ids: Tensor | None, maps: list[Tensor]) -> None:
        super().__init__(inner._inner if type(inner) is ControlledProcessor else inner, layer, None)
        self._set(token_ids=token_ids, maps=maps)

    def _run(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any,
        attention_mask: Tensor | None,
        optional: dict[str, Any],
    ) -> Tensor:
        kwargs = self._known(optional)
        self._unmasked(attention_mask)
        text, images = self._split(encoder_hidden_states)
        q = queries(attn, hidden_states, optional["temb"])
        k, v = keys_values(attn, text)
        q, k, v = _upcast(attn, q, k, v)
        out, maps = ops.attention_with_maps(q, k, v, self._token_ids, scale=attn.scale)
        self._maps.append(maps)
        return self._finished(attn, hidden_states, q, out, text, images, kwargs)
