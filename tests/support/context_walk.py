"""Energy-based cross-attention as a walk over the layers, from the equations: full logits, Python state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnctl_fast.attach.layers import cross_attention_layers


@dataclass
class EditWalk:
    """texts: contexts `[samples,N,C]`. weight: signed. start: first step."""

    texts: Tensor
    weight: float
    gamma_attn: float = 0.0
    gamma_norm: float = 0.0
    start: int = 0


@dataclass
class Walk:
    """Processors that do by hand what `EnergyContext` and `Composition` do; `gammas` are (attn, norm) of every step."""

    gammas: list[tuple[float, float]]
    edits: list[EditWalk] = field(default_factory=list)
    token_weight: Tensor | None = None
    mask: Tensor | None = None
    alpha: float = 0.0
    convention: str = "official"
    layers: tuple[str, ...] = ("",)
    guided: bool = True
    step: int = -1
    contexts: list[Tensor] = field(default_factory=list)

    @contextlib.contextmanager
    def on(self, pipe: Any) -> Iterator[Walk]:
        layers = cross_attention_layers(pipe.unet)
        before = {name: layer.module.processor for name, layer in layers.items()}
        for index, (name, layer) in enumerate(layers.items()):
            layer.module.set_processor(_Processor(self, index == 0, name.startswith(self.layers), layer))
        try:
            yield self
        finally:
            for name, layer in layers.items():
                layer.module.set_processor(before[name])

    def start(self, text: Tensor) -> None:
        self.step += 1
        self.main = text
        self.now = [edit for edit in self.edits if self.step >= edit.start]
        self.own = [edit.texts for edit in self.now]
        half = len(text) // 2 if self.guided else 0
        self.other = text[:half]


class _Processor:
    def __init__(self, walk: Walk, first: bool, moves: bool, layer: Any) -> None:
        self.walk, self.first, self.moves, self.layer = walk, first, moves, layer

    def attention(self, attn: Any, hidden: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output after the projection, softmax_m(l^T) (w Q) and the keys, heads side by side."""
        heads, width = attn.heads, attn.to_q.out_features // attn.heads
        q, k, v = (
            f(x).reshape(len(x), -1, heads, width)
            for f, x in zip((attn.to_q, attn.to_k, attn.to_v), (hidden, text, text), strict=True)
        )
        logits = torch.einsum("bmhd,bnhd->bhmn", q, k) / width**0.5
        out = torch.einsum("bhmn,bnhd->bmhd", logits.softmax(3), v)
        weighted = q if mask is None else q * mask[:, :, None, None]
        pull = torch.einsum("bhmn,bmhd->bnhd", logits.softmax(2), weighted)
        return attn.to_out[0](out.flatten(2)), pull.flatten(2), k.flatten(2)

    def increment(
        self, attn: Any, pull: Tensor, keys: Tensor, gamma_attn: float, gamma_norm: float, u: Any = 1.0
    ) -> Tensor:
        square = (keys * keys).sum(2)
        share = (square if self.walk.convention == "official" else square / 2).softmax(1)[..., None]
        return (gamma_attn * u * (pull - self.walk.alpha * keys) - gamma_norm * share * keys) @ attn.to_k.weight

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        walk = self.walk
        if self.first:
            walk.start(encoder_hidden_states)
        walk.contexts.append(walk.main)
        rows = len(hidden_states) // 2 if walk.guided else 0
        mask = None
        if walk.mask is not None:
            side = int(hidden_states.shape[1] ** 0.5)
            mask = (
                torch.nn.functional.interpolate(walk.mask, size=(side, side)).flatten(1).expand(len(hidden_states), -1)
            )
        out, pull, keys = self.attention(attn, hidden_states, walk.main, mask)
        total = 1 + sum(edit.weight for edit in walk.now)
        sums = [out[:rows], out[rows:]]
        others = []
        for index, edit in enumerate(walk.now):
            part = None if mask is None else mask[rows:]
            one, edit_pull, edit_keys = self.attention(attn, hidden_states[rows:], walk.own[index], part)
            sums[1] = sums[1] + edit.weight * one
            walk.own[index] = walk.own[index] + self.plain(attn, edit_pull, edit_keys, edit)
            if rows:
                one, edit_pull, edit_keys = self.attention(attn, hidden_states[:rows], walk.other, part)
                sums[0] = sums[0] + edit.weight * one
                others.append(self.plain(attn, edit_pull, edit_keys, edit))
        if others:
            # The mean is over all edits, started or not.
            walk.other = walk.other + torch.stack(others).sum(0) / len(walk.edits)
        gammas = walk.gammas[walk.step]
        if self.moves:
            u = 1.0
            if walk.token_weight is not None:
                u = torch.cat([torch.ones_like(walk.token_weight)] * bool(rows) + [walk.token_weight])[..., None]
            walk.main = walk.main + self.increment(attn, pull, keys, *gammas, u)
        return torch.cat(sums) / total

    def plain(self, attn: Any, pull: Tensor, keys: Tensor, edit: EditWalk) -> Tensor:
        """The increment of an edit, always by the released code's convention."""
        share = (keys * keys).sum(2).softmax(1)[..., None]
        return (edit.gamma_attn * pull - edit.gamma_norm * share * keys) @ attn.to_k.weight
