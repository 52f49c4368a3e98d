"""Attention a tile of rows at a time, whose logits a CPU's caches hold."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of the map that are held at a time: about what the caches of two cores hold in float32.
TILE = 1 << 20
# Up to so many columns, and from so many rows on, three calls for a tile are faster than PyTorch's fused attention: by
# a fifth at 77 columns and 256 rows, even at 110 columns or 64 rows, slower by 20 % at 333 columns.
FEW_COLUMNS, LEAST_ROWS = 96, 128
# A product with a multiple of so many columns is up to a fifth faster.
ALIGNED = 8

# What a thread keeps of a tile's memory, by its place in the computation and dtype, and the most numbers of it.
_areas = threading.local()
LARGEST_AREA = 2 * TILE


def tiles(q: Tensor, k: Tensor, most: int | None = None) -> Iterator[tuple[int, slice]]:
    """Yield samples of q [B,H,M,d], and blocks of their rows whose maps are at most `most` numbers, or one row."""
    batch, heads, rows, _ = q.shape
    step = max(1, (TILE if most is None else most) // (heads * k.shape[2]))
    # Of about one size.
    step = -(-rows // -(-rows // step))
    for b in range(batch):
        for start in range(0, rows, step):
            yield b, slice(start, min(start + step, rows))


def is_tile(x: Tensor) -> bool:
    """Return whether the caches hold x."""
    return x.numel() <= TILE


def area(like: Tensor, place: int, *shape: int) -> Tensor:
    """Return memory for a tile, in which this thread's next tile with the same `place` is written as well.

    New memory is cleared by the system, page by page, which may take as long as what is computed in it.
    """
    count = math.prod(shape)
    if like.device.type != "cpu" or count > LARGEST_AREA:
        return like.new_empty(shape)
    kept = _areas.__dict__.get((place, like.dtype))
    if kept is None or len(kept) < count:
        with torch.inference_mode(False):
            kept = _areas.__dict__[place, like.dtype] = torch.empty(count, dtype=like.dtype)
    return kept[:count].view(shape)


def aligned_columns(q: Tensor, k: Tensor) -> int:
    """Return how many columns `aligned` makes of the N of k."""
    tokens = k.shape[2]
    spare = -tokens % ALIGNED
    return tokens + spare if q.device.type == "cpu" and 8 * spare <= tokens <= q.shape[2] else tokens


def aligned(q: Tensor, x: Tensor) -> Tensor:
    """Return keys or values [B,H,N,d] for q [B,H,M,d] with columns of zeros, where products are faster with these."""
    tokens, columns = x.shape[2], aligned_columns(q, x)
    if columns == tokens:
        return x
    found = x.new_empty(*x.shape[:2], columns, x.shape[3])
    found[:, :, :tokens] = x
    found[:, :, tokens:] = 0.0
    return found


def tile_logits(q: Tensor, k: Tensor, tokens: int, key_bias: Tensor | None, scale: float) -> Tensor:
    """Return the logits of one sample's queries [H,m,d] until the next tile's, -inf in all but the first `tokens`.

    Keys are [H,N,d], `aligned` or not, key_bias [tokens].
    """
    spare, out = k.shape[1] - tokens, area(q, 0, *q.shape[:2], k.shape[1])
    if key_bias is None:
        out.baddbmm_(q, k.mT, beta=0, alpha=scale)
    else:
        torch.baddbmm(F.pad(key_bias, (0, spare)), q, k.mT, alpha=scale, out=out)
    if spare:
        out[..., tokens:] = -torch.inf
    return out


def tile_softmax(logits: Tensor, key_bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return a tile's probabilities, zeros where every column is masked: in `out`, or until the next tile's."""
    # Not in place, which takes a third longer.
    found = torch._softmax(logits, -1, False, out=area(logits, 1, *logits.shape) if out is None else out)
    return found if key_bias is None else found.masked_fill_(key_bias.isneginf().all(), 0.0)


def product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> Tensor:
    """Write scale a b to `out` [H,m,d]: not right into part of a tensor, which PyTorch does by a call for every head."""
    whole = out.is_contiguous()
    found = out if whole else area(a, 2, *out.shape)
    found.baddbmm_(a, b, beta=0, alpha=scale)
    return out if whole else out.copy_(found)


def of_sample(x: Tensor | None, b: int) -> Tensor | None:
    """Return what [B,..] says of sample b; None for None."""
    return None if x is None else x[b]


def few_columns(q: Tensor, k: Tensor, ids: Tensor | None = None) -> bool:
    """Return whether tiles are the faster form, with a bias on the columns `ids` as well."""
    few = q.device.type == "cpu" and k.shape[2] <= FEW_COLUMNS and q.shape[2] >= LEAST_ROWS
    return few and (ids is None or few_of(ids, k))


def few_of(ids: Tensor, k: Tensor) -> bool:
    """Return whether these columns are so few that they are better taken one by one than all gone through."""
    return 8 * ids.shape[-1] <= k.shape[2]


def attend_to_each(
    q: Tensor,
    ks: Sequence[Tensor],
    vs: Sequence[Tensor],
    key_biases: Sequence[Tensor],
    shares: Sequence[float],
    scale: float,
) -> Tensor:
    """Return sum_i shares_i softmax(scale q k_i^T + key_bias_i) v_i; `key_biases` of all contexts, or none."""
    out, keys = torch.empty_like(q), [aligned(q, k) for k in ks]
    for b, rows in tiles(q, max(keys, key=lambda k: k.shape[2])):
        queries = q[b, :, rows]
        total = area(q, 2, *queries.shape)
        for i, (k, v, share) in enumerate(zip(keys, vs, shares, strict=True)):
            tokens, key_bias = v.shape[2], key_biases[i][b] if key_biases else None
            probabilities = tile_softmax(tile_logits(queries, k[b], tokens, key_bias, scale), key_bias)
            total.baddbmm_(probabilities[..., :tokens], v[b], beta=min(i, 1), alpha=share)
        out[b, :, rows] = total
    return out


def attend_to_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the output alone of `attention.attend`."""
    out, tokens, keys = torch.empty_like(q), k.shape[2], aligned(q, k)
    for b, rows in tiles(q, keys):
        logits = tile_logits(q[b, :, rows], keys[b], tokens, of_sample(key_bias, b), scale)
        if bias is not None and ids is not None:
            added, columns = bias[b, ..., rows], ids
            if ids.ndim == 2:
                real = ids[b] >= 0
                added, columns = added[:, real], ids[b, real]
            logits.index_add_(2, columns, added.mT)
        probabilities = tile_softmax(logits, of_sample(key_bias, b))
        product(probabilities[..., :tokens], v[b], out[b, :, rows])
    return out
