"""The work of `context_update` before its projection by a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from .._library import opaque


def _forward(
    update: Tensor,
    k: Tensor,
    gamma_attn: Tensor,
    gamma_norm: Tensor,
    token_weight: Tensor | None,
    alpha: float,
    halved: bool,
) -> Tensor:
    from ...kernels import context_pull as kernels

    return kernels.context_pull(update, k, gamma_attn, gamma_norm, token_weight, alpha, halved)


def _fake(
    update: Tensor,
    k: Tensor,
    gamma_attn: Tensor,
    gamma_norm: Tensor,
    token_weight: Tensor | None,
    alpha: float,
    halved: bool,
) -> Tensor:
    batch, heads, tokens, width = k.shape
    return k.new_empty(batch, tokens, heads * width)


context_pull = opaque(
    "context_pull_triton(Tensor update, Tensor k, Tensor gamma_attn, Tensor gamma_norm, Tensor? token_weight, "
    "float alpha, bool halved) -> Tensor",
    _forward,
    _fake,
)
