"""Attention together with the gradient of its energy by the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import composite, differentiable, differentiated, launcher, opaque, widened
from ._tiled import aligned, product, tile_logits, tile_softmax, tiles
from .attention import attend

# What float32 loses to underflow is beneath the last digit of a sum of exponentials above LEAST_SUM, and their products
# with values of a norm below LARGEST_VALUE do not overflow while the sum is below 1 / LEAST_SUM.
LEAST_SUM, LARGEST_VALUE = 1e-20, 1e15
# Numbers of the map up to which two softmaxes take less than one exponential and its sums: fewer calls.
SMALL_MAP = 1 << 17

attention_with_context_gradient_reference = composite(
    "attention_with_context_gradient_reference(Tensor q, Tensor k, Tensor v, Tensor? query_weight, float scale, "
    "Tensor? key_bias) -> (Tensor, Tensor)",
    reference.attention_with_context_gradient,
)


def weighted(q: Tensor, query_weight: Tensor | None) -> Tensor:
    """Return w Q: `q` [B,H,M,d] times `query_weight` [B,M]."""
    return q if query_weight is None else q * query_weight[:, None, :, None].to(q.dtype)


def without_masked(update: Tensor, key_bias: Tensor | None) -> Tensor:
    """Return `update` [B,H,N,..] with zeros for masked columns."""
    return update if key_bias is None else update.masked_fill(key_bias.isneginf()[:, None, :, None], 0.0)


def _two_attentions(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    out, _ = attend(q, k, v, None, None, scale, key_bias)
    # softmax_m(l^T) (w Q) is attention as well, of the keys to the queries.
    update, _ = attend(k, q, weighted(q, query_weight), None, None, scale)
    return out, without_masked(update, key_bias)


def _small_map(q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Compute both results from one map in memory, all samples at once where their heads lie one behind the other."""
    out, update = torch.empty_like(q), k.new_empty(k.shape)
    samples = q, k, v, weighted(q, query_weight), out, update
    together = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    parts = [[x.flatten(0, 1) for x in samples]] if together else zip(*samples, strict=True)
    for queries, keys, values, pulls, of_rows, of_keys in parts:
        logits = tile_logits(queries, keys, None, scale)
        product(tile_softmax(logits, None), values, of_rows)
        # Over the last dimension, for over another PyTorch takes an exponential of 20 units in the last place.
        torch.bmm(torch._softmax(logits.mT.contiguous(), -1, False), pulls, out=of_keys)
    return out, update


def _shared_map(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Compute both results from one exp(l), a tile of image tokens at a time; None where that is not exact.

    With no maximum subtracted, one exponential is the numerator of both softmaxes; their sums tell whether float32 held
    it. What a column's bias multiplies its numerators by multiplies its values instead.
    """
    (batch, heads, tokens, width), text = q.shape, k.shape[2]
    values = weighted(q, query_weight)
    factors = None if key_bias is None else key_bias.exp().unsqueeze(-1)  # [B,N,1]
    if factors is not None:
        v = v * factors.unsqueeze(1)
    out, update = torch.empty_like(q), k.new_empty(k.shape)
    sums = q.new_empty(batch, heads, tokens + text)
    of_rows, of_columns = sums[..., :tokens].unsqueeze(3), sums[..., tokens:].unsqueeze(2)
    keys = aligned(q, k)
    blocks, columns = list(tiles(q, keys)), keys.shape[2]
    largest = heads * blocks[0][1].stop
    numerators, products = q.new_empty(largest * columns), q.new_empty(largest * width)
    for b, rows in blocks:
        queries, total = q[b, :, rows], of_rows[b, :, rows]
        e, weighed = (x[: total.numel() * n].view(heads, -1, n) for x, n in ((numerators, columns), (products, width)))
        e = e.baddbmm_(queries, keys[b].mT, beta=0, alpha=scale).exp_()[..., :text]
        if factors is None:
            torch.sum(e, -1, keepdim=True, out=total)
        else:
            total.copy_(e @ factors[b])
        torch.div(torch.bmm(e, v[b], out=weighed), total, out=out[b, :, rows])
        first = rows.start == 0
        if first:
            torch.sum(e, 1, keepdim=True, out=of_columns[b])
        else:
            of_columns[b].add_(e.sum(1, keepdim=True))
        pulls = queries if query_weight is None else values[b, :, rows]
        update[b].baddbmm_(e.mT, pulls, beta=0 if first else 1)
    update /= of_columns.mT
    least, most = (x.item() for x in sums.aminmax())
    held = least > LEAST_SUM and most < 1 / LEAST_SUM and torch.linalg.vector_norm(v).item() < LARGEST_VALUE
    return (out, without_masked(update, key_bias)) if held and math.isfinite(update.sum().item()) else None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if key_bias is None and q.shape[:3].numel() * k.shape[2] <= SMALL_MAP:
        return _small_map(q, k, v, query_weight, scale)
    found = _shared_map(q, k, v, query_weight, scale, key_bias)
    if found is not None:
        return found
    out, update = _two_attentions(q, k, v, query_weight, scale, key_bias)
    return out, update.contiguous()


def _fake(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape)


_forward_op = opaque(
    "attention_with_context_gradient(Tensor q, Tensor k, Tensor v, Tensor? query_weight, Tensor? key_bias, "
    "float scale) -> (Tensor, Tensor)",
    _forward,
    _fake,
)


_attention_backward = launcher("attention_backward", "attention_backward")


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _triton_backward(
    grad_out: Tensor | None,
    grad_update: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    lse: Tensor,
    column_lse: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients: each result is an attention, and so are their gradients."""
    dq = dk = dv = dweight = None
    if grad_out is not None and any(needed[:3]):
        dq, dk, dv = _attention_backward(grad_out, None, q, k, v, key_bias, scale, lse, needed[:3])
    if grad_update is not None and (needed[0] or needed[1] or needed[3]):
        wanted = [needed[1], needed[0], needed[0] or needed[3]]
        # The logsumexp of a masked column is +inf: nothing of its row has a weight.
        of_keys, of_queries, of_values = _attention_backward(
            grad_update.to(q.dtype), None, k, q, weighted(q, weight), None, scale, column_lse, wanted
        )
        dk = _sum(dk, of_keys)
        if needed[3]:
            dweight = (q.float() * of_values.float()).sum((1, 3))
        if needed[0]:
            dq = _sum(_sum(dq, of_queries), weighted(of_values, weight))
    return [dq, dk, dv, dweight]


def _triton_fake(q: Tensor, k: Tensor, *_: object) -> tuple[Tensor, ...]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), lse.new_empty(k.shape), lse, lse.new_empty(k.shape[:3])


_triton = differentiable(
    "attention_with_context_gradient_triton(Tensor q, Tensor k, Tensor v, Tensor? query_weight, Tensor? key_bias, "
    "float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    launcher("attention_with_context_gradient", "attention_with_context_gradient"),
    _triton_fake,
    _triton_backward,
    leaves=4,
    results=2,
    saves=(2, 3),
    reach=((0, 1), (0, 1), (0,), (1,)),
)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = widened(q, k, v)
    fused = q.is_cpu and not differentiated(q, k, v, query_weight)
    if fused:
        return _forward_op(q, k, v, query_weight, key_bias, scale)
    return _two_attentions(q, k, v, query_weight, scale, key_bias)


def check_query_weight(query_weight: Tensor | None, q: Tensor) -> Tensor | None:
    """Return `query_weight` as [B,M] in float32, or float64 for float64 q.

    ValueError unless it is [M] or [B,M] of floats.
    """
    if query_weight is None:
        return None
    batch, tokens = q.shape[0], q.shape[2]
    if query_weight.shape not in ((tokens,), (batch, tokens)) or not query_weight.dtype.is_floating_point:
        raise ValueError(
            f"query_weight is {query_weight.dtype} of shape {tuple(query_weight.shape)}; it must be a float tensor "
            f"with one weight per image token: [{tokens}] or [{batch}, {tokens}]"
        )
    if query_weight.device != q.device:
        raise ValueError(f"query_weight is on {query_weight.device} but q is on {q.device}; move it there")
    return query_weight.to(wide_dtype(q.dtype)).expand(batch, tokens)


def attention_with_context_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_weight: Tensor | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and the pull of its energy on the keys.

    The two are softmax(l) v and softmax_m(l^T) (w q) for l = scale q k^T.

    The first softmax runs over the text tokens, the second over the image tokens (arXiv 2306.09869, "Bayesian context
    update"): `update` is minus the gradient of -sum_n logsumexp_m(l_mn) by the keys, over the scale.
    `context_update` makes the increment of the context from it. `key_bias` changes the output; of the update it only
    makes masked columns zero, for a softmax over image tokens does not see what a column adds. Differentiable in q, k,
    v and query_weight, through both results. NaN and inf propagate.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B,H,N,d]`, of the dtype and device of q.
        v: values `[B,H,N,d]`, likewise.
        query_weight: w, a weight per image token in the update, `[M]` or `[B,M]`, float: for inpainting the mask at the
            layer's grid. The output does not know of it.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, and update `[B,H,N,d]` in float32 (float64 for float64 inputs), of keys with fewer
        heads than q the sum over the heads that share one.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty dimension, or (Triton) float64 or a head width
            outside 8..256.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    query_weight = check_query_weight(query_weight, q)
    if grouped:
        heads = Grouped(q, k)
        how: dict[str, Any] = {"query_weight": heads.samples(query_weight), "key_bias": heads.samples(key_bias)}
        given = heads.queries(q), heads.keys(k), heads.keys(v)
        out, update = attention_with_context_gradient(*given, **how, scale=scale, impl=impl)
        return heads.whole(out), heads.of_keys(update)
    if impl == "triton":
        check_kernel_limits(q)
        return _triton(q, k, v, query_weight, key_bias, scale)
    run = attention_with_context_gradient_reference if impl == "reference" else _eager
    out, update = run(q, k, v, query_weight, scale, key_bias)
    return out if out.dtype == q.dtype else out.to(q.dtype), update
