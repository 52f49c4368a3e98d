"""Cosine similarities between attention maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_dtype, wide_dtype
from ._library import composite, differentiable, launcher
from ._objective import Array, arrays, namespace, tensor
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
    """Return the cosines [B,n,n] between maps [B,n,M], and one over their norms [B,n], 0 for a map of zeros."""
    gram = maps @ maps.swapaxes(1, 2)
    xp = namespace(gram)
    norms = xp.diagonal(gram, 0, 1, 2) ** 0.5
    norms = xp.where(norms == 0, xp.full_like(norms, xp.inf), norms)
    # Few roundings: the loss takes differences of similarities that are nearly alike.
    gram /= norms[:, :, None] * norms[:, None, :]
    return gram, 1 / norms


def mixing(slope: Array, similarity: Array, inverse: Array) -> Array:
    """Return W [B,n,n] such that W maps is the maps' gradient.

    `slope` is that of their similarities, whose diagonal does not count.
    """
    xp = namespace(slope)
    every = np.arange(slope.shape[1]) if xp is np else torch.arange(slope.shape[1], device=slope.device)
    both = slope + slope.swapaxes(1, 2)
    both[:, every, every] = 0
    along = (both * similarity).sum(2)
    both *= inverse[:, None, :]
    both[:, every, every] = -along * inverse
    both *= inverse[:, :, None]
    return both


def _forward(maps: Tensor) -> tuple[Tensor, Tensor]:
    similarity, inverse = similarities(*arrays(maps))
    return tensor(similarity), tensor(inverse)


def _backward(
    grad: Tensor, maps: Tensor, similarity: Tensor, inverse: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    grad, maps, similarity, inverse = arrays(grad, maps, similarity, inverse)
    return [tensor(mixing(grad, similarity, inverse) @ maps)]


def _fake(maps: Tensor) -> tuple[Tensor, Tensor]:
    inverse = maps.new_empty(maps.shape[:2], dtype=wide_dtype(maps.dtype))
    return inverse.new_empty(*maps.shape[:2], maps.shape[1]), inverse


_SCHEMA = "(Tensor maps) -> (Tensor, Tensor)"
_eager = differentiable(f"map_similarity{_SCHEMA}", _forward, _fake, _backward, leaves=1, saves=(0, 1))
_triton = differentiable(
    f"map_similarity_triton{_SCHEMA}",
    launcher("similarity", "map_similarity"),
    _fake,
    launcher("similarity", "map_similarity_backward"),
    leaves=1,
    saves=(0, 1),
)


def map_similarity(maps: Tensor, *, impl: str | None = None) -> Tensor:
    """Compute the cosine of the angle between every two maps of a sample: X^T X of maps over their norms.

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
        return _triton(maps)
    if impl == "reference":
        return map_similarity_reference(wide(maps))
    return _eager(wide(maps))
