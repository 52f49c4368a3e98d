"""T-SAM's loss: the similarities of the tokens' maps against the text encoder's self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .._impl import resolve
from .._validate import check_dtype, wide_dtype
from ._library import composite, differentiable, differentiated, launcher, made
from ._objective import Array, arrays, namespace, tensor
from .map_similarity import check_kernel_tokens, mixing, similarities
from .smooth_maps import check_kernel_taps, check_maps, check_smoothing, smooth, wide

# By variant, the weight where none is given.
DEFAULT_WEIGHT = {"cosine": 0.2, "normalised_cosine": 1.0, "absolute": 1.0}

_ARGUMENTS = "Tensor maps, Tensor text_similarity, Tensor? lengths, int[] grid, float[] taps, str variant, float weight"
similarity_loss_reference = composite(f"similarity_loss_reference({_ARGUMENTS}) -> Tensor", reference.similarity_loss)


def _unit(x: Array) -> tuple[Array, Array]:
    """Return x over its norm along the last dimension, and one over the norm; 0 where it is 0."""
    xp = namespace(x)
    norm = (x * x).sum(-1, keepdims=True) ** 0.5
    inverse = 1 / xp.where(norm == 0, xp.full_like(norm, xp.inf), norm)
    return x * inverse, inverse


def _cosine_distance(ours: Array, theirs: Array) -> tuple[Array, Array]:
    """Return 1 - cos of every row [B,n,n], and its gradient by ours.

    With d the difference of the unit rows, 1 - cos = |d|^2 / 2: no digit is lost where they are alike.
    """
    (ours, inverse), (theirs, inverse_text) = _unit(ours), _unit(theirs)
    apart = ours - theirs
    distance = (apart * apart).sum(-1, keepdims=True) / 2
    slope = (apart - distance * ours) * (inverse * (inverse_text != 0))
    xp = namespace(ours)
    distance = xp.where((inverse == 0) | (inverse_text == 0), xp.ones_like(distance), distance)
    return distance[..., 0], slope


def _places(similarity: Array) -> Array:
    """Return 0, 1, .., n - 1 beside `similarity` [..,n,n]."""
    if namespace(similarity) is np:
        return np.arange(similarity.shape[1])
    return torch.arange(similarity.shape[1], device=similarity.device)


def _distance(similarity: Array, text: Array, lengths: Array, variant: str, weight: float) -> tuple[Array, Array]:
    """Return the loss [B], and its gradient by the similarities [B,n,n], which is zero on the diagonal and above.

    `text` is zero in padded rows.
    """
    xp = namespace(similarity)
    place = _places(similarity)
    counted = (place < lengths[:, None]) & (place > 0)
    below = counted[:, :, None] & (place < place[:, None])
    zero = xp.zeros_like(similarity)
    ours = xp.where(below, similarity, zero)
    if variant == "cosine":
        theirs = xp.where(below, text, zero)
        factor = weight * xp.asarray(counted * place, dtype=similarity.dtype)
        distance, slope = _cosine_distance(ours, theirs)
    else:
        itself = counted[:, :, None] & (place == place[:, None])
        theirs = xp.where(below | itself, text, zero)
        factor = weight * xp.asarray(counted * (place + 1), dtype=similarity.dtype)
        factor = factor / xp.asarray(xp.clip(lengths, 1, None)[:, None], dtype=similarity.dtype)
        ours = ours + itself
        total = ours.sum(-1, keepdims=True)
        inverse = xp.where(total != 0, 1 / xp.where(total != 0, total, xp.ones_like(total)), xp.zeros_like(total))
        ours = ours * inverse
        if variant == "absolute":
            apart = ours - theirs
            distance, slope = abs(apart).sum(-1), xp.sign(apart)
        else:
            distance, slope = _cosine_distance(ours, theirs)
        slope = (slope - (slope * ours).sum(-1, keepdims=True)) * inverse
    return (factor * distance).sum(-1), xp.where(below, slope * factor[..., None], zero)


def _forward(
    maps: Tensor,
    text_similarity: Tensor,
    lengths: Tensor | None,
    grid: Sequence[int],
    taps: Sequence[float],
    variant: str,
    weight: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and to `keep` for its gradient the smoothed maps and how it mixes them."""
    smoothed = smooth(maps, grid, taps)
    text, lengths = arrays(text_similarity, lengths)
    xp = namespace(smoothed)
    if lengths is None:
        lengths = _places(text)[-1:] + 1
    else:
        real = (_places(text) < lengths[:, None])[:, :, None]
        smoothed, text = xp.where(real, smoothed, xp.zeros_like(smoothed)), xp.where(real, text, xp.zeros_like(text))
    similarity, inverse = similarities(smoothed)
    loss, slope = _distance(similarity, text, lengths, variant, weight)
    if not keep:
        return tensor(loss), maps.new_empty(0), maps.new_empty(0)
    smoothed = tensor(smoothed)
    # Not the maps themselves, which an operation may not return.
    smoothed = smoothed.clone(memory_format=torch.contiguous_format) if len(taps) == 1 else smoothed
    return tensor(loss), smoothed, tensor(mixing(slope, similarity, inverse))


def _backward(grad: Tensor, *arguments: Any) -> list[Tensor | None]:
    _, _, _, grid, taps, _, _, smoothed, mixing, _ = arguments
    outer, maps, matrix = arrays(grad[:, None, None], smoothed, mixing)
    mixed = tensor((outer * matrix) @ maps)
    return [mixed if len(taps) == 1 else tensor(smooth(mixed, grid, taps, adjoint=True))]


def _fake(maps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = maps.new_empty(maps.shape[0], dtype=wide_dtype(maps.dtype))
    if not rest[-1]:
        return loss, loss.new_empty(0), loss.new_empty(0)
    return loss, loss.new_empty(maps.shape), loss.new_empty(*maps.shape[:2], maps.shape[1])


_launch = launcher("similarity", "similarity_loss")


def _triton_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, smoothed, mixing = _launch(*arguments)
    return loss, made(smoothed, loss), made(mixing, loss)


_SCHEMA = f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
_eager = differentiable(f"similarity_loss{_SCHEMA}", _forward, _fake, _backward, leaves=1, saves=(1, 2), keeps=True)
_triton = differentiable(
    f"similarity_loss_triton{_SCHEMA}",
    _triton_forward,
    _fake,
    launcher("similarity", "similarity_loss_backward"),
    leaves=1,
    saves=(1, 2),
    keeps=True,
)


def _check_lengths(lengths: Tensor | Sequence[int] | None, maps: Tensor) -> Tensor | None:
    """Return `lengths` as int64 [B] on the device of maps.

    Their values are read where that costs no synchronisation.
    """
    if lengths is None:
        return None
    batch, tokens = maps.shape[:2]
    if isinstance(lengths, Tensor):
        if lengths.dtype != torch.int64:
            raise ValueError(f"lengths has dtype {lengths.dtype}; it must be torch.int64")
        readable = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        values = lengths.tolist() if readable and not isinstance(lengths, FakeTensor) else None
        found = lengths.to(maps.device)
    else:
        values = list(lengths)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
            raise ValueError(f"lengths is {values}; it must be one int per sample")
        found = torch.tensor(values, dtype=torch.int64, device=maps.device)
    if found.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(found.shape)}; it must be one number per sample [{batch}]")
    for length in values or ():
        if not 0 <= length <= tokens:
            raise ValueError(f"lengths holds {length}, but the maps are of {tokens} tokens")
    return found


def _check_text(text_similarity: Tensor, maps: Tensor) -> Tensor:
    batch, tokens = maps.shape[:2]
    shape = (batch, tokens, tokens)
    if tuple(text_similarity.shape) not in (shape, shape[1:]):
        raise ValueError(
            f"text_similarity has shape {tuple(text_similarity.shape)}; it must be {list(shape[1:])} or {list(shape)}, "
            "of the same tokens as maps"
        )
    if text_similarity.device != maps.device:
        raise ValueError(f"text_similarity is on {text_similarity.device} but maps is on {maps.device}; move it there")
    if differentiated(text_similarity):
        raise ValueError("text_similarity requires a gradient, but the loss has none by it; detach() it")
    return check_dtype("text_similarity", text_similarity, wide_dtype(maps.dtype)).expand(shape)


def similarity_loss(
    maps: Tensor,
    text_similarity: Tensor,
    grid: tuple[int, int],
    *,
    variant: str = "cosine",
    weight: float | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    sigma: float = 0.5,
    kernel_size: int = 3,
    impl: str | None = None,
) -> Tensor:
    """Compute T-SAM's loss (arXiv 2411.15236).

    It is how far the similarities C of the tokens' smoothed maps are from the text encoder's self-attention T.
    Differentiable in maps; T is a constant.

    With i counted from 0 and s the sample's number of tokens,

    - `"cosine"`, the released code's default: `sum_{i>=1} weight i (1 - cos(T[i,:i], C[i,:i]))`;
    - `"normalised_cosine"`, in the released code too: the rows `C[i,:i+1]`, with 1 on the diagonal, over their sums:
      `sum_{i>=1} weight (i+1)/s (1 - cos(T[i,:i+1], C[i,:i+1]))`;
    - `"absolute"`, there as well: the same rows and weights with `sum_j |T_ij - C_ij|`.

    Smoothing, all similarities, the loss and its gradient are one operation each way, without a loop over pairs. A map
    of zeros has similarity 0 with every other one; a row of zeros has cosine 0 and no gradient.

    Args:
        maps: `[B,n,M]`, the tokens' attention averaged over heads and layers; float.
        text_similarity: T, `[n,n]` or `[B,n,n]`: its rows sum to 1; what is above the diagonal is ignored.
        grid: (height, width) of the maps, height * width = M.
        variant: which of the three.
        weight: None for 0.2 (`"cosine"`, as released) or 1.0 (the others; the released code has no value).
        lengths: the number of tokens of each sample, `[B]`, int64 or ints, where prompts differ; None for n each.
            Tokens from there on take no part, whatever their maps and rows hold, and get zero gradients.
        sigma: width of the smoothing in cells, as in `smooth_maps`.
        kernel_size: its cells along an axis, odd; 1 does not smooth.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        loss `[B]` in float32 (float64 for float64 maps).

    Raises:
        ValueError: shapes that do not fit, an unknown variant, a length beyond n, a text_similarity that requires a
            gradient, what `smooth_maps` refuses, or (Triton) more than 64 tokens. Lengths on an accelerator are
            trusted, for reading them would synchronise.
    """
    check_maps(maps)
    sides, taps = check_smoothing(grid, maps.shape[2], sigma, kernel_size)
    if variant not in DEFAULT_WEIGHT:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(map(repr, DEFAULT_WEIGHT))}")
    weight = DEFAULT_WEIGHT[variant] if weight is None else float(weight)
    if not math.isfinite(weight):
        raise ValueError(f"weight is {weight}; it must be finite")
    text, lengths = _check_text(text_similarity, maps), _check_lengths(lengths, maps)
    impl = resolve(impl, maps.device)
    if impl == "triton":
        check_kernel_tokens(maps)
        check_kernel_taps(taps)
        return _triton(maps, text, lengths, sides, taps, variant, weight)
    arguments = (wide(maps), text, lengths, sides, taps, variant, weight)
    if impl == "reference":
        return similarity_loss_reference(*arguments)
    return _eager(*arguments)
