"""The attention maps of chosen tokens, from the logsumexp that another attention returned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import (
    TokenIds,
    check_columns,
    check_kernel_limits,
    check_key_bias,
    check_lse,
    check_qkv,
    check_reduce,
    check_scale,
)
from ._heads import Grouped
from ._library import composite, differentiable, launcher, may_hold_columns
from ._tiled import product
from .attention import gather_columns, gather_key_bias

# Numbers of the maps of all heads that are made at a time: what a core's own cache holds in float32; and the fewest
# rows of them, for the matrix products.
TILE = 1 << 17
LEAST_ROWS = 128

maps_from_lse_reference = composite(
    "maps_from_lse_reference(Tensor q, Tensor k, Tensor lse, Tensor token_ids, bool per_head, float scale, "
    "Tensor? key_bias) -> Tensor",
    reference.maps_from_lse,
)


def _subtracted(lse: Tensor) -> Tensor:
    """Return lse as [B,H,1,M], inf in place of -inf: a row without columns has maps of zeros."""
    if not lse.is_cpu or not lse.amin().item() > -torch.inf:  # nor is NaN
        lse = torch.where(lse.isneginf(), torch.inf, lse)
    return lse.unsqueeze(2)


class _Columns:
    """The chosen columns: what makes their maps, some rows at a time."""

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor, ids: Tensor, key_bias: Tensor | None, scale: float) -> None:
        self._q, self._count, self._scale = q, ids.shape[-1], scale
        self.keys = gather_columns(k, ids).to(lse.dtype)  # [B,H,n,d]
        # What is subtracted from the logits of a row [B,H,1,M], and added to those of a column [B,n,1].
        self._less = _subtracted(lse)
        self._more = None if key_bias is None else gather_key_bias(key_bias, ids).unsqueeze(-1)

    def tiles(self, whole: bool) -> Iterator[tuple[int, slice]]:
        """Yield samples, and blocks of their rows; `whole`: all of them."""
        batch, heads, image_tokens, _ = self._q.shape
        step = image_tokens if whole else max(LEAST_ROWS, TILE // (heads * self._count))
        for b in range(batch):
            for start in range(0, image_tokens, step):
                yield b, slice(start, min(start + step, image_tokens))

    def queries(self, b: int, rows: slice) -> Tensor:
        return self._q[b, :, rows].to(self.keys.dtype)

    def maps(self, b: int, rows: slice, out: Tensor | None = None) -> Tensor:
        """Return exp(l - lse), [H,n,m], in `out` where it is given."""
        less, queries = self._less[b, ..., rows], self.queries(b, rows)
        if self._more is not None:
            less = less - self._more[b]
        return torch.baddbmm(less, self.keys[b], queries.mT, beta=-1, alpha=self._scale, out=out).exp_()


def _empty(q: Tensor, lse: Tensor, ids: Tensor, per_head: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the maps, and room to keep those of all heads [B,H,n,M] in, or nothing where they are not kept."""
    (batch, heads, image_tokens), count = q.shape[:3], ids.shape[-1]
    maps = lse.new_empty(batch, *([heads] if per_head else []), count, image_tokens)
    keep = keep and may_hold_columns(q, count)
    return maps, lse.new_empty((batch, heads, count, image_tokens) if keep else 0)


def _padding(ids: Tensor, per_head: bool) -> Tensor:
    """Return which maps are of padded tokens: bool [B,n,1], or [B,1,n,1]."""
    padded = (ids < 0).unsqueeze(-1)
    return padded.unsqueeze(1) if per_head else padded


def _forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: Tensor,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the maps, and to `keep` them where they may be held, those of all heads."""
    plain = not (per_head or keep) and key_bias is None and token_ids.ndim == 1 and q.dtype == lse.dtype
    if plain and lse.numel() * token_ids.shape[0] <= TILE and (q.shape[0] == 1 or q.is_contiguous()):
        # Not in place, which takes longer where cores share no cache.
        logits = (scale * k.index_select(2, token_ids)) @ q.mT - _subtracted(lse)
        return logits.exp().mean(1), lse.new_empty(0)
    maps, kept = _empty(q, lse, token_ids, per_head, keep)
    columns = _Columns(q, k, lse, token_ids, key_bias, scale)
    if per_head:
        for b, rows in columns.tiles(True):
            columns.maps(b, rows, maps[b])
        if kept.numel():
            kept.copy_(maps)
    else:
        held = kept.numel() > 0
        for b, rows in columns.tiles(held):
            torch.mean(columns.maps(b, rows, kept[b] if held else None), 0, out=maps[b, :, rows])
    if token_ids.ndim == 2:
        maps.masked_fill_(_padding(token_ids, per_head), 0.0)
    return maps, kept


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: Tensor,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    kept: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients, from maps that were kept or are made again."""
    columns = _Columns(q, k, lse, token_ids, key_bias, scale)
    dq, dlse = (
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip((q, lse), (needed[0], needed[2]), strict=True)
    )
    keys, of_columns = scale * columns.keys, torch.zeros_like(columns.keys) if needed[1] else None
    grad = grad if per_head else grad / q.shape[1]
    if token_ids.ndim == 2:
        grad = grad.masked_fill(_padding(token_ids, per_head), 0.0)
    held = kept.numel() > 0
    for b, rows in columns.tiles(held):
        given = grad[b, ..., rows]
        found = kept[b, ..., rows] * given if held else columns.maps(b, rows).mul_(given)  # [H,n,m]
        if needed[0]:
            product(found.mT, keys[b], dq[b, :, rows])
        if of_columns is not None:
            of_columns[b].baddbmm_(found, columns.queries(b, rows), alpha=scale)
        if needed[2]:
            torch.sum(found, 1, out=dlse[b, :, rows])
    dk = None if of_columns is None else _scattered(of_columns.to(k.dtype), token_ids, k)
    return [dq if needed[0] else None, dk, dlse.neg_() if needed[2] else None]


def _scattered(chosen: Tensor, ids: Tensor, k: Tensor) -> Tensor:
    """Return the rows `chosen` [B,H,n,d] at the places `ids` of zeros as k. Those of padded tokens are zeros."""
    made = k.new_zeros(k.shape)
    if ids.ndim == 1:
        return made.index_copy_(2, ids, chosen)
    return made.scatter_add_(2, ids.clamp(min=0)[:, None, :, None].expand_as(chosen), chosen)


_ARGUMENTS = "(Tensor q, Tensor k, Tensor lse, Tensor token_ids, Tensor? key_bias, bool per_head, float scale) -> "
_eager = differentiable(
    f"maps_from_lse{_ARGUMENTS}(Tensor, Tensor)",
    _forward,
    lambda q, k, lse, ids, key_bias, per_head, scale, keep: _empty(q, lse, ids, per_head, keep),
    _backward,
    leaves=3,
    saves=(1,),
    keeps=True,
)


def _triton_fake(
    q: Tensor, k: Tensor, lse: Tensor, token_ids: Tensor, key_bias: Any, per_head: bool, scale: float
) -> Tensor:
    return _empty(q, lse, token_ids, per_head, False)[0]


_triton = differentiable(
    f"maps_from_lse_triton{_ARGUMENTS}Tensor",
    launcher("maps_from_lse", "maps_from_lse"),
    _triton_fake,
    launcher("maps_from_lse", "maps_from_lse_backward"),
    leaves=3,
)


def maps_from_lse(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    token_ids: TokenIds,
    *,
    reduce: str = "mean",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the attention maps of chosen tokens from the logsumexp that another attention returned.

    The maps are columns of softmax(scale q k^T + key_bias), one per token: exp(scale q k_t + key_bias_t - lse). With
    the logsumexp of all columns, as `attention`, flash attention or cuDNN return it, only the chosen columns are
    computed: a small share of the attention itself where text and image tokens are one sequence (SD 3, FLUX). There, q
    holds the image's rows and k all columns.

    Differentiable in q, k and lse; the gradient of lse takes the rest of the way through the attention that made it.
    The maps of single heads are held nowhere where their mean is asked for, except for the backward pass on a CPU and
    up to 64 MiB. NaN and inf propagate.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B,H,N,d]` of all columns, of the dtype and device of q, any strides.
        lse: logsumexp `[B,H,M]` of the scaled logits, key_bias included, of all columns; float32 (float64 for float64
            inputs), any strides.
        token_ids: ids of the n columns whose maps are wanted, `[n]` for all samples or `[B,n]` padded with -1; distinct
            and in 0..N-1.
        reduce: `"mean"` over the heads, or `"none"`.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`, and as in lse.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        maps `[B,n,M]` or, with `reduce="none"`, `[B,H,n,M]` in float32 (float64 for float64 inputs); zeros for a padded
        or masked token, and for a row whose lse is -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an empty dimension; no token_ids; an id out of range or
            twice; another `reduce`; or (Triton) float64 or a head width outside 8..256. Ids on an accelerator are
            trusted, for reading them would synchronise.
    """
    grouped = check_qkv(q, k, k)
    check_reduce(reduce)
    ids, lse, key_bias = check_columns(token_ids, k), check_lse(lse, q), check_key_bias(key_bias, k)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        how: dict[str, Any] = {"reduce": reduce, "scale": scale, "key_bias": heads.samples(key_bias), "impl": impl}
        given = heads.queries(q), heads.keys(k), heads.queries(lse), heads.samples(ids)
        maps = maps_from_lse(*given, **how)
        return heads.whole(maps) if reduce == "none" else heads.mean(maps)
    if impl == "triton":
        check_kernel_limits(q)
        return _triton(q, k, lse, ids, key_bias, reduce == "none", scale)
    if impl == "eager":
        return _eager(q, k, lse, ids, key_bias, reduce == "none", scale)
    return maps_from_lse_reference(q, k, lse, ids, reduce == "none", scale, key_bias)
