"""`region_attention` by a Triton kernel."""

from __future__ import annotations

from torch import Tensor

from .._library import opaque


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    from ...kernels import region_attention as kernels

    return kernels.region_attention(q, k, v, row_regions, column_regions, weight, key_bias, scale)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape)


region_attention = opaque(
    "region_attention_triton(Tensor q, Tensor k, Tensor v, Tensor row_regions, Tensor column_regions, Tensor weight, "
    "Tensor? key_bias, float scale) -> Tensor",
    _forward,
    _fake,
)
