"""Attention a tile of rows at a time, whose logits a CPU's caches hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of the map that are held at a time: about what the caches of two cores hold in float32.
TILE = 1 << 19
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


def is_tile(x: Tensor) -> bool:
    """Return whether the caches hold x."""
    return x.numel() <= TILE


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
    """Return the logits of one sample's queries [H,m,d] in new memory, -inf in all but the first `tokens` columns.

    Keys are [H,N,d], `aligned` or not, key_bias [tokens].
    """
    spare = k.shape[1] - tokens
    if key_bias is None:
        logits = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=scale)
    else:
        logits = torch.baddbmm(F.pad(key_bias, (0, spare)), q, k.mT, alpha=scale)
    if spare:
        logits[..., tokens:] = -torch.inf
    return logits


def tile_softmax(logits: Tensor, key_bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the probabilities of a tile, in `out` where it is given: zeros where every column is masked."""
    # Not in place, which takes a third longer.
    found = torch._softmax(logits, -1, False) if out is None else torch._softmax(logits, -1, False, out=out)
    return found if key_bias is None else found.masked_fill_(key_bias.isneginf().all(), 0.0)


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
        torch.bmm(probabilities[..., :tokens], v[b], out=out[b, :, rows])
    return out
