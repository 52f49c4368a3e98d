"""Cosine similarities between attention maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_dtype
from ._library import composite, differentiated, once_differentiable, opaque, without_autocast
from ._objective import Array, arrays, namespace, tensor
from ._triton import map_similarity as _triton
from .smooth_maps import check_maps, wide

# Of the Triton kernels, which hold all similarities of a sample in one program.
KERNEL_TOKENS = 64

map_similarity_reference = composite("map_similarity_reference(Tensor maps) -> Tensor", reference.map_similarity)


def check_kernel_tokens(maps: Tensor) -> None:
    """Raise ValueError unless the Triton kernels compare maps [B,n,M] like these."""
    check_kernel_dtype(maps)
    if maps.shape[1] > KERNEL_TOKENS:
        raise ValueError(
            f"the Triton kernels compare the maps of at most {KERNEL_TOKENS} tokens, not {maps.shape[1]}; "
            "pass fewer, or use impl='eager'"
        )


def similarities(maps: Array) -> tuple[Array, Array]:
    """The cosines [B,n,n] between maps [B,n,M], and one over their norms [B,n], 0 for a map of zeros."""
    gram = maps @ maps.swapaxes(1, 2)
    xp = namespace(gram)
    norms = xp.diagonal(gram, 0, 1, 2) ** 0.5
    norms = xp.where(norms == 0, xp.full_like(norms, xp.inf), norms)
    # Few roundings: the loss takes differences of similarities that are nearly alike.
    gram /= norms[:, :, None] * norms[:, None, :]
    return gram, 1 / norms


def mixing(slope: Array, similarity: Array, inverse: Array) -> Array:
    """W [B,n,n] such that W maps is the maps' gradient, given that of their similarities, `slope`, whose diagonal does
    not count."""
    xp = namespace(slope)
    every = np.arange(slope.shape[1]) if xp is np else torch.arange(slope.shape[1], device=slope.device)
    both = slope + slope.swapaxes(1, 2)
    both[:, every, every] = 0
    along = (both * similarity).sum(2)
    both *= inverse[:, None, :]
    both[:, every, every] = -along * inverse
    both *= inverse[:, :, None]
    return both


@without_autocast
def _forward(maps: Tensor) -> tuple[Tensor, Tensor]:
    similarity, inverse = similarities(*arrays(maps))
    return tensor(similarity), tensor(inverse)


@without_autocast
def _backward(grad: Tensor, maps: Tensor, similarity: Tensor, inverse: Tensor) -> Tensor:
    grad, maps, similarity, inverse = arrays(grad, maps, similarity, inverse)
    return tensor(mixing(grad, similarity, inverse) @ maps)


map_similarity_op = opaque(
    "map_similarity(Tensor maps) -> (Tensor, Tensor)",
    _forward,
    lambda maps: (maps.new_empty(*maps.shape[:2], maps.shape[1]), maps.new_empty(maps.shape[:2])),
)
map_similarity_backward_op = opaque(
    "map_similarity_backward(Tensor grad, Tensor maps, Tensor similarity, Tensor inverse) -> Tensor",
    _backward,
    lambda grad, maps, similarity, inverse: maps.new_empty(maps.shape),
)


class _MapSimilarity(Function):
    @staticmethod
    def forward(maps: Tensor) -> tuple[Tensor, Tensor]:
        return map_similarity_op(maps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor]:
        return (map_similarity_backward_op(grad, *ctx.saved_tensors),)


def map_similarity(maps: Tensor, *, impl: str | None = None) -> Tensor:
    """The cosine of the angle between every two maps of a sample: X^T X of maps over their norms.

    A map of zeros, as a padded token has, has similarity 0 with every map and itself, and no gradient. Differentiable
    in maps. T-SAM (arXiv 2411.15236) smooths them before, with `smooth_maps`.

    Args:
        maps: `[B,n,M]`; float.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        `[B,n,n]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: maps of another shape or dtype, or empty; or (Triton) float64 or more than 64 tokens.
    """
    check_maps(maps)
    impl = resolve(impl, maps.device)
    if impl == "triton":
        check_kernel_tokens(maps)
        return _triton.map_similarity(maps)
    if impl == "reference":
        return map_similarity_reference(wide(maps))
    maps = wide(maps)
    return (_MapSimilarity.apply if differentiated(maps) else map_similarity_op)(maps)[0]
