"""Attention a tile of rows at a time, whose logits a CPU's caches hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of the map that are held at a time, 4 MiB in float32, and their probabilities: what caches hold. With fewer,
# cores that share no cache would wait for each other more often.
TILE = 1 << 20
# Up to so many columns, and from so many rows on, three calls for a tile are faster than PyTorch's fused attention: by
# a fifth at 77 columns and 256 rows, even at 110 columns or 64 rows, slower by 20 % at 333 columns.
FEW_COLUMNS, LEAST_ROWS = 96, 128
# A product with a multiple of so many columns is up to a fifth faster.
ALIGNED = 8


def tiles(q: Tensor, k: Tensor, most: int | None = None) -> Iterator[tuple[int, slice]]:
    """Yield samples of q [B,H,M,d], and blocks of their rows whose maps are at most `most` numbers, or one row."""
    batch, heads, rows, _ = q.shape
    step = max(1, (TILE if most is None else most) // (heads * k.shape[2]))
    # Of about one size.
    step = -(-rows // -(-rows // step))
    for b in range(batch):
        for start in range(0, rows, step):
            yield b, slice(start, min(start + step, rows))


def aligned_columns(q: Tensor, k: Tensor) -> int:
    """Return how many columns `aligned` makes of the N of k."""
    tokens = k.shape[2]
    spare = -tokens % ALIGNED
    return tokens + spare if q.is_cpu and 8 * spare <= tokens <= q.shape[2] else tokens


def aligned(q: Tensor, x: Tensor) -> Tensor:
    """Return keys or values [B,H,N,d] for q [B,H,M,d] with columns of zeros, where products are faster with these."""
    tokens, columns = x.shape[2], aligned_columns(q, x)
    if columns == tokens:
        return x
    found = x.new_empty(*x.shape[:2], columns, x.shape[3])
    found[:, :, :tokens] = x
    found[:, :, tokens:] = 0.0
    return found


def added(keys: Tensor, tokens: int, key_bias: Tensor | None) -> Tensor | None:
    """Return what is added to the logits of every `aligned` key [B,N], -inf beside the `tokens`; None for nothing."""
    spare = keys.shape[2] - tokens
    if key_bias is None:
        return _spare(tokens, spare, keys.dtype).expand(len(keys), -1) if spare else None
    return F.pad(key_bias, (0, spare), value=-torch.inf)


@functools.lru_cache(maxsize=256)
def _spare(tokens: int, spare: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0.0] * tokens + [-torch.inf] * spare, dtype=dtype)


def tile_logits(q: Tensor, k: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Return the logits of one sample's queries [H,m,d] and keys [H,N,d], with `added` [N], in new memory."""
    # Not written into the columns afterwards: a core would wait for what another has just made.
    return torch.baddbmm(q.new_empty(1) if added is None else added, q, k.mT, beta=int(added is not None), alpha=scale)


def tile_softmax(logits: Tensor, key_bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the probabilities of a tile, in `out` where it is given: zeros where every column is masked."""
    # Not in place, which takes a third longer.
    found = torch._softmax(logits, -1, False) if out is None else torch._softmax(logits, -1, False, out=out)
    return found if key_bias is None else found.masked_fill_(key_bias.isneginf().all(), 0.0)


def product(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0) -> None:
    """Write scale a b to `out` [H,m,d], part of a tensor: right into it, PyTorch would make a call for every head."""
    whole = out.is_contiguous() and out.dtype == a.dtype
    found = torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale, out=out if whole else None)
    if not whole:
        out.copy_(found)


def of_sample(x: Tensor | None, b: int) -> Tensor | None:
    """Return what [B,..] says of sample b; None for None."""
    return None if x is None else x[b]


def one_tile(q: Tensor, k: Tensor) -> bool:
    """Return whether the map of all samples is no more than a tile."""
    return q.numel() // q.shape[3] * k.shape[2] <= TILE


def few_columns(q: Tensor, k: Tensor, ids: Tensor | None = None) -> bool:
    """Return whether tiles are the faster form, with a bias on the columns `ids` as well."""
    few = q.is_cpu and k.shape[2] <= FEW_COLUMNS and q.shape[2] >= LEAST_ROWS
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
    biases: Sequence[Tensor | None] = key_biases or [None] * len(ks)
    of_columns = [added(x, k.shape[2], own) for x, k, own in zip(keys, ks, biases, strict=True)]
    for b, rows in tiles(q, max(keys, key=lambda k: k.shape[2])):
        queries = q[b, :, rows]
        total = queries.new_empty(queries.shape)
        for i, (k, v, share) in enumerate(zip(keys, vs, shares, strict=True)):
            logits = tile_logits(queries, k[b], of_sample(of_columns[i], b), scale)
            probabilities = tile_softmax(logits, of_sample(biases[i], b))[..., : v.shape[2]]
            total.baddbmm_(probabilities, v[b], beta=min(i, 1), alpha=share)
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
    of_columns = added(keys, tokens, key_bias)
    for b, rows in tiles(q, keys):
        logits = tile_logits(q[b, :, rows], keys[b], of_sample(of_columns, b), scale)
        if bias is not None and ids is not None:
            more, columns = bias[b, ..., rows], ids
            if ids.ndim == 2:
                real = ids[b] >= 0
                more, columns = more[:, real], ids[b, real]
            logits.index_add_(2, columns, more.mT)
        probabilities = tile_softmax(logits, of_sample(key_bias, b))
        product(probabilities[..., :tokens], v[b], out[b, :, rows])
    return out
