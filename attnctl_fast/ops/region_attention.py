"""Attention whose logits are pulled to their row's extremes by regions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_dtype, check_kernel_limits, check_key_bias, check_qkv, check_scale
from ._heads import Grouped
from ._library import composite, differentiated, launcher, opaque

# Logits that are in memory at once: on a CPU what its caches hold.
LOGITS = {"cpu": 1 << 19}
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
    """Attend by blocks of rows, the heads of a sample in one product."""
    batch, heads, image_tokens, _ = q.shape
    most = LOGITS.get(q.device.type, LOGITS_ELSEWHERE)
    rows = max(1, min(image_tokens, most // (batch * heads * k.shape[2])))
    columns, keys = column_regions[:, None, None, :], k.mT
    if key_bias is not None:
        masked = key_bias.isneginf()[:, None, None, :]
        empty = masked.all(-1, keepdim=True)
        # A sample without a column to attend to is computed without a mask, and nobody sees it.
        left_out, added = masked & ~empty, key_bias[:, None, None, :].masked_fill(masked, 0.0)
    blocks = []
    for first in range(0, image_tokens, rows):
        block = slice(first, first + rows)
        logits = (scale * q[:, :, block]) @ keys  # [B,H,rows,N]
        if key_bias is None:
            low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
        else:
            logits = logits + added
            low = logits.masked_fill(left_out, torch.inf).amin(-1, keepdim=True)
            high = logits.masked_fill(left_out, -torch.inf).amax(-1, keepdim=True)
        share = weight[:, None, block, None]
        shared = ((row_regions[:, None, block, None] & columns) != 0).to(logits)
        lowered = torch.addcmul(share * low, logits, 1 - share)
        moved = torch.addcmul(lowered, shared, share * (high - low))
        if key_bias is not None:
            moved = moved.masked_fill(left_out, -torch.inf)
        blocks.append(moved.softmax(-1) @ v)
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
    return out if key_bias is None else out.masked_fill(empty, 0.0)


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
    wide = torch.promote_types(q.dtype, torch.float32)
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
