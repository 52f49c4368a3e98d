"""Attention whose logits are pulled to their row's extremes by regions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._observed import observed
from .._validate import check_dtype, check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import composite, differentiated, launcher, opaque
from ._tiled import aligned, product, tile_logits, tile_softmax, tiles

# Logits that are in memory at once on an accelerator.
LOGITS_ELSEWHERE = 1 << 25


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    scale: float,
    key_bias: Tensor | None,
) -> Tensor:
    """Attend to a sample's columns, a tile of its rows at a time."""
    # What nobody else sees or differentiates is written over.
    alone = not differentiated(q, k, v, weight) and not observed((q, k, v, weight))
    tokens, masked = k.shape[2], None if key_bias is None else key_bias.isneginf()
    keys = aligned(q, k) if alone else k
    columns = F.pad(column_regions, (0, keys.shape[2] - tokens))
    out = torch.empty_like(q)
    for b, rows in tiles(q, keys, None if q.is_cpu else LOGITS_ELSEWHERE):
        queries, left_out = q[b, :, rows], None
        logits = tile_logits(queries, keys[b], None, scale) if alone else scale * (queries @ keys[b].mT)
        if masked is not None and key_bias is not None:
            # A sample without a column to attend to is computed without a mask, and nobody sees it.
            left_out = masked[b] & ~masked[b].all()
            logits[..., :tokens] += key_bias[b].masked_fill(masked[b], 0.0)
        shared = ((row_regions[b, rows].unsqueeze(-1) & columns[b]) != 0).to(logits.dtype)
        pulled = _pulled(logits, shared, weight[b, rows].unsqueeze(-1), tokens, left_out, alone)
        if alone:
            product(tile_softmax(pulled, None)[..., :tokens], v[b], out[b, :, rows])
        else:
            out[b, :, rows] = pulled.softmax(-1) @ v[b]
    return out if masked is None else out.masked_fill(masked.all(-1)[:, None, None, None], 0.0)


def _pulled(
    logits: Tensor, shared: Tensor, share: Tensor, tokens: int, left_out: Tensor | None, in_place: bool
) -> Tensor:
    """Return logits [H,m,N] that are pulled by `share` [m,1] to their row's extremes, but for one number for the row.

    `shared` [m,N] is one where to the largest, else zero; the columns `left_out` [tokens], and those beyond, take no
    part.
    """
    seen = logits[..., :tokens]
    if left_out is None:
        low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
    else:
        low = seen.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)
        high = seen.masked_fill(left_out, -torch.inf).amax(-1, keepdim=True)
    multiply, add = (Tensor.mul_, Tensor.addcmul_) if in_place else (torch.mul, torch.addcmul)
    # The softmax does not see that all of a row is higher by the lowest one's share.
    moved = add(multiply(logits, 1 - share), shared, share * (high - low))
    if moved.shape[-1] > tokens:
        moved[..., tokens:] = -torch.inf
    if left_out is not None:
        moved[..., :tokens] = moved[..., :tokens].masked_fill(left_out, -torch.inf)
    return moved


_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor row_regions, Tensor column_regions, Tensor weight, float scale, "
    "Tensor? key_bias) -> Tensor"
)
region_attention_reference = composite(f"region_attention_reference{_SCHEMA}", reference.region_attention)
region_attention_eager = composite(f"region_attention{_SCHEMA}", _eager)


_triton = opaque(
    "region_attention_triton(Tensor q, Tensor k, Tensor v, Tensor row_regions, Tensor column_regions, Tensor weight, "
    "Tensor? key_bias, float scale) -> Tensor",
    launcher("region_attention", "region_attention"),
    lambda q, *_: q.new_empty(q.shape),
)


def _check_regions(name: str, regions: Tensor, q: Tensor, tokens: int) -> None:
    if regions.shape != (q.shape[0], tokens):
        raise ValueError(f"{name} has shape {tuple(regions.shape)}; it must be [batch, tokens] {(q.shape[0], tokens)}")
    if regions.dtype != torch.int32:
        raise ValueError(f"{name} has dtype {regions.dtype}; it must be torch.int32, one bit per region")
    if regions.device != q.device:
        raise ValueError(f"{name} is on {regions.device} but q is on {q.device}; move them to one device")


def region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_regions: Tensor,
    column_regions: Tensor,
    weight: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention whose logits are pulled to their row's extremes by regions.

    That is softmax(l') v, with logits l = scale q k^T that regions modulate (arXiv 2308.12964, "DenseDiffusion").

    With w the row's weight, l' = l + w (max - l) where row and column share a region, and l' = l - w (l - min)
    everywhere else; max and min are those of the row of l. A key_bias is part of l, but a column that it masks is no
    extreme and stays masked. Neither logits nor masks of size M*N are ever in memory as a whole, except for the
    gradients.

    Differentiable in q, k, v and weight by `"eager"` and `"reference"`.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: keys `[B,H,N,d]`.
        v: values `[B,H,N,d]`.
        row_regions: the regions of every row, `[B,M]`, int32 sets of up to 32 bits, one per region. Zero belongs to
            none.
        column_regions: those of every column, `[B,N]`, likewise.
        weight: w, `[B,M]`, float32 or that of the computation. Zero leaves a row as it is; one moves all its logits
            to the extremes.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; with `"triton"`, inputs that require a gradient.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    _check_regions("row_regions", row_regions, q, q.shape[2])
    _check_regions("column_regions", column_regions, q, k.shape[2])
    if weight.shape != row_regions.shape or weight.device != q.device:
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}; it must be [batch, image tokens] "
            f"{tuple(row_regions.shape)} on {q.device}"
        )
    wide = wide_dtype(q.dtype)
    weight = check_dtype("weight", weight, wide)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        every = heads.queries(q), heads.keys(k), heads.keys(v)
        of_samples = (heads.samples(x) for x in (row_regions, column_regions, weight))
        found = region_attention(*every, *of_samples, scale=scale, key_bias=heads.samples(key_bias), impl=impl)
        return heads.whole(found)
    if impl == "triton":
        check_kernel_limits(q)
        if differentiated(q, k, v, weight):
            raise ValueError(
                "region_attention has no gradient by the Triton kernels; use impl='eager', or torch.no_grad()"
            )
        return _triton(q, k, v, row_regions, column_regions, weight, key_bias, scale)
    run = region_attention_reference if impl == "reference" else region_attention_eager
    out = run(q.to(wide), k.to(wide), v.to(wide), row_regions, column_regions, weight, scale, key_bias)
    return out.to(q.dtype)
