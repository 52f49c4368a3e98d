"""The work of `context_update` before its projection by a Triton kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import opaque


def _forward(*arguments: Any) -> Tensor:
    from ...kernels import context_pull as kernels

    return kernels.context_pull(*arguments)


def _fake(update: Tensor, k: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, width = k.shape
    return k.new_empty(batch, tokens, heads * width)


context_pull = opaque(
    "context_pull_triton(Tensor update, Tensor k, Tensor gamma_attn, Tensor gamma_norm, Tensor? token_weight, "
    "float alpha, bool halved) -> Tensor",
    _forward,
    _fake,
)
