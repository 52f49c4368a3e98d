"""Attention that also returns its probabilities, of chosen tokens and averaged over the heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import reference
from .._impl import resolve
from .._observed import observed
from .._validate import (
    TokenIds,
    check_kernel_limits,
    check_key_bias,
    check_qkv,
    check_reduce,
    check_scale,
    check_tokens,
)
from ._heads import Grouped
from ._library import composite, differentiable, differentiated, launcher, may_hold_map, widened, without_autocast
from ._tiled import (
    added,
    aligned,
    aligned_columns,
    few_of,
    of_sample,
    one_tile,
    product,
    tile_logits,
    tile_softmax,
    tiles,
)

attention_with_maps_reference = composite(
    "attention_with_maps_reference(Tensor q, Tensor k, Tensor v, Tensor? token_ids, bool per_head, float scale, "
    "Tensor? key_bias) -> (Tensor, Tensor)",
    reference.attention_with_maps,
)


def _rows(token_ids: Tensor | None, b: int) -> Tensor | None:
    """Return the ids of sample b."""
    return token_ids if token_ids is None or token_ids.ndim == 1 else token_ids[b]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the maps, and to `keep` them where they may be held, all probabilities."""
    keep = keep and may_hold_map(q, k)
    out, maps, kept = _empty(q, k, token_ids, per_head, keep)
    tokens, keys = k.shape[2], aligned(q, k)
    of_columns = added(keys, tokens, key_bias)
    for b, rows in tiles(q, keys, kept.numel() or None):
        logits = tile_logits(q[b, :, rows], keys[b], of_sample(of_columns, b), scale)
        p = tile_softmax(logits, of_sample(key_bias, b), kept[b, :, rows] if keep else None)[..., :tokens]
        product(p, v[b], out[b, :, rows])
        ids = _rows(token_ids, b)
        if per_head or ids is None or few_of(ids, k):
            wanted = p if ids is None else p.index_select(-1, ids.clamp(min=0))
            if per_head:
                maps[b, ..., rows] = wanted.mT
            else:
                torch.mean(wanted, 0, out=maps[b, :, rows].mT)
        else:
            # Columns are gathered one number at a time: of the mean there are fewer.
            maps[b, :, rows] = p.mean(0).mT.index_select(0, ids.clamp(min=0))
    if token_ids is not None and token_ids.ndim == 2:
        padded = (token_ids < 0).unsqueeze(-1)
        maps.masked_fill_(padded.unsqueeze(1) if per_head else padded, 0.0)
    return out, maps, kept


def _empty(q: Tensor, k: Tensor, token_ids: Tensor | None, per_head: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, the maps, and the probabilities [B,H,M,N or more], or nothing where they are not kept."""
    count = k.shape[2] if token_ids is None else token_ids.shape[-1]
    heads = q.shape[1:2] if per_head else ()
    maps = q.new_empty(q.shape[0], *heads, count, q.shape[2])
    kept = q.new_empty(*q.shape[:3], aligned_columns(q, k)) if keep else q.new_empty(0)
    return q.new_empty(q.shape), maps, kept


def _all_columns(grad_maps: Tensor, ids: Tensor | None, padded: bool, columns: int) -> Tensor:
    """Spread the gradient [..,n,m] of one sample's maps over so many columns, zeros where there is no map."""
    *leading, count, rows = grad_maps.shape
    if ids is None:
        return F.pad(grad_maps.mT, (0, columns - count))
    spread = grad_maps.new_zeros(*leading, rows, columns + padded)
    places = torch.where(ids < 0, columns, ids) if padded else ids
    return spread.index_copy_(-1, places, grad_maps.mT)[..., :columns]


def _backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    kept: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients from probabilities that were kept or are made again."""
    tokens, held = k.shape[2], kept.numel() > 0
    keys = k if held else aligned(q, k)
    of_columns = added(keys, tokens, key_bias)
    values = v if grad_out is None else aligned(q, v)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (x.new_zeros(x.shape if wanted else 0) for x, wanted in zip((k, v), needed[1:], strict=True))
    if grad_maps is not None and not per_head:
        grad_maps = grad_maps / q.shape[1]
    for b, rows in tiles(q, keys, kept.numel() or None):
        queries = q[b, :, rows]
        if held:
            p = kept[b, :, rows]
        else:
            p = tile_softmax(tile_logits(queries, keys[b], of_sample(of_columns, b), scale), of_sample(key_bias, b))
        ids = _rows(token_ids, b)
        if grad_out is None and grad_maps is not None and ids is not None and few_of(ids, k):
            # dl = P (g - sum P g) is a multiple of P but for few columns: it is not made.
            columns = ids.clamp(min=0)
            share = (p.index_select(-1, columns) * grad_maps[b, ..., rows].mT).masked_fill_(ids < 0, 0.0)  # [H,m,n]
            total = -share.sum(-1, keepdim=True)
            p = p[..., :tokens]
            if needed[0]:
                of_queries = torch.bmm(p, k[b]).mul_(scale * total)
                dq[b, :, rows] = of_queries.baddbmm_(share, k[b].index_select(1, columns), alpha=scale)
            if needed[1]:
                dk[b].baddbmm_(p.mT, total * queries, alpha=scale)
                dk[b].index_add_(1, columns, share.mT @ queries, alpha=scale)
            continue
        if grad_out is not None and needed[2]:
            dv[b].baddbmm_(p[..., :tokens].mT, grad_out[b, :, rows])
        if not (needed[0] or needed[1]) or (grad_out is None and grad_maps is None):
            continue
        of_maps = None
        if grad_maps is not None:
            of_maps = _all_columns(grad_maps[b, ..., rows], ids, ids is not token_ids, p.shape[-1])
        if grad_out is None:
            assert of_maps is not None
            grad = of_maps.expand_as(p)
        else:
            grad = torch.bmm(grad_out[b, :, rows], values[b].mT)
            if of_maps is not None:
                grad += of_maps
        grad_logits = torch._softmax_backward_data(grad, p, -1, p.dtype)[..., :tokens]
        if needed[0]:
            product(grad_logits, k[b], dq[b, :, rows], scale)
        if needed[1]:
            dk[b].baddbmm_(grad_logits.mT, queries, alpha=scale)
    return [x if wanted else None for x, wanted in zip((dq, dk, dv), needed, strict=True)]


def slot_table(token_ids: Tensor, tokens: int) -> Tensor:
    """Return the place in `token_ids` [n] or [B,n] of each of the context's tokens, -1 for none.

    It is int32 [1 or B, tokens + 1], the last column for padded ids.
    """
    ids = token_ids if token_ids.ndim == 2 else token_ids.unsqueeze(0)
    table = torch.full((ids.shape[0], tokens + 1), -1, dtype=torch.int32, device=ids.device)
    slots = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device).expand_as(ids)
    return table.scatter_(1, torch.where(ids < 0, tokens, ids), slots)


# The table of ids, and for which version of them, how many tokens and which stream it was made.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _slots(token_ids: Tensor, tokens: int) -> Tensor:
    """Return `slot_table`, made once for the same tensor: it takes five kernels, which may cost what the maps do.

    A CUDA graph makes its own: the ids may change between its replays.
    """
    on_gpu = token_ids.is_cuda
    if observed((token_ids,)) or token_ids.is_inference() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return slot_table(token_ids, tokens)
    stream = torch.cuda.current_stream(token_ids.device) if on_gpu else None
    state = token_ids._version, tokens, stream
    kept = _tables.get(token_ids)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False):
            kept = _tables[token_ids] = state, slot_table(token_ids, tokens)
    return kept[1]


# No map depends on v.
_REACH = ((0, 1), (0, 1), (0,))
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? token_ids, {}Tensor? key_bias, bool per_head, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)
_eager_op = differentiable(
    "attention_with_maps" + _SCHEMA.format(""),
    _forward,
    lambda q, k, v, ids, key_bias, per_head, scale, keep: _empty(q, k, ids, per_head, keep and may_hold_map(q, k)),
    _backward,
    leaves=3,
    results=2,
    saves=(2,),
    reach=_REACH,
    keeps=True,
)


def _triton_fake(
    q: Tensor, k: Tensor, v: Tensor, token_ids: Tensor | None, slots: Any, key_bias: Any, per_head: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, maps, _ = _empty(q, k, token_ids, per_head, False)
    return out, maps.to(torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


_triton = differentiable(
    "attention_with_maps_triton" + _SCHEMA.format("Tensor? slots, "),
    launcher("attention_with_maps", "attention_with_maps"),
    _triton_fake,
    launcher("attention_backward", "attention_with_maps_backward"),
    leaves=3,
    results=2,
    saves=(2,),
    reach=_REACH,
)


@without_autocast
def _held(q: Tensor, k: Tensor, v: Tensor, token_ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute both results in differentiable operations, whose bookkeeping costs less than ours for a small map."""
    probabilities = (q @ (scale * k).mT).softmax(-1)
    return probabilities @ v, probabilities.index_select(3, token_ids).mean(1).mT


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    per_head: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = widened(q, k, v)
    plain = may_hold_map(q, k) and one_tile(q, k) and key_bias is None and not per_head and differentiated(q, k, v)
    if plain and token_ids is not None and token_ids.ndim == 1 and few_of(token_ids, k):
        return _held(q, k, v, token_ids, scale)
    return _eager_op(q, k, v, token_ids, key_bias, per_head, scale)


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: TokenIds | None = None,
    *,
    reduce: str = "mean",
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention, and the attention maps of chosen tokens.

    The output is softmax(scale q k^T + key_bias) v; the maps are columns of the softmax, one per token.

    Differentiable in q, k and v, through the output and through the maps. The softmax itself, of
    `B*H*M*N` numbers, is held nowhere, except for the backward pass on a CPU and up to 64 MiB. NaN and inf propagate.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B,H,N,d]`, of the dtype and device of q.
        v: values `[B,H,N,d]`, likewise.
        token_ids: ids of the n tokens whose maps are wanted, `[n]` for all samples or `[B,n]` padded with -1; distinct
            and in 0..N-1. None for all N.
        reduce: `"mean"` over the heads, or `"none"`.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, and maps `[B,n,M]` or, with `reduce="none"`, `[B,H,n,M]` in float32 (float64 for
        float64 inputs); zeros for a padded or masked token.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an empty dimension; no token; an id out of range or
            twice; another `reduce`; or (Triton) float64 or a head width outside 8..256. Ids on an accelerator are
            trusted, for reading them would synchronise.
    """
    grouped = check_qkv(q, k, v)
    check_reduce(reduce)
    ids, key_bias = check_tokens(token_ids, k), check_key_bias(key_bias, k)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        how: dict[str, Any] = {"reduce": reduce, "scale": scale, "key_bias": heads.samples(key_bias), "impl": impl}
        given = heads.queries(q), heads.keys(k), heads.keys(v), heads.samples(ids)
        out, maps = attention_with_maps(*given, **how)
        return heads.whole(out), heads.whole(maps) if reduce == "none" else heads.mean(maps)
    if impl == "triton":
        check_kernel_limits(q)
        slots = None if ids is None else _slots(ids, k.shape[2])
        return _triton(q, k, v, ids, slots, key_bias, reduce == "none", scale)
    run = attention_with_maps_reference if impl == "reference" else _eager
    out, maps = run(q, k, v, ids, reduce == "none", scale, key_bias)
    return out if out.dtype == q.dtype else out.to(q.dtype), maps
