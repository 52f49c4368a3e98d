"""Attention by softmax and by 1.5-entmax, which gives weight to few columns, mixed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import reference
from .._impl import resolve
from .._validate import check_device, check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import differentiated, launcher, once_differentiable, opaque

# Of Newton's method: for up to 512 columns, five left 1e-6 and six a rounding of float32 in all that was tried.
STEPS = 7
# Logits that are in memory at once: on a CPU what its caches hold.
LOGITS = {"cpu": 1 << 18}
LOGITS_ELSEWHERE = 1 << 25

_triton = opaque(
    "entmax_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? weight_now, float weight, "
    "float scale, int steps) -> Tensor",
    launcher("entmax_attention", "entmax_attention"),
    lambda q, *_: q.new_empty(q.shape),
)


def _entmax(logits: Tensor) -> Tensor:
    """Return the 1.5-entmax of logits whose largest is 0; zeros for a row of -inf alone."""
    half = logits / 2
    threshold = half.new_full((*half.shape[:-1], 1), -1.0)
    above = torch.empty_like(half)
    for _ in range(STEPS):
        torch.sub(half, threshold, out=above).relu_()
        norm = torch.linalg.vector_norm(above, dim=-1, keepdim=True)
        total = above.sum(-1, keepdim=True)
        threshold += (norm - 1) * norm / torch.where(total == 0, 1, total)
    return torch.sub(half, threshold, out=above).relu_().square_()


class _Differentiated(Function):
    """`_entmax` with its gradient: that of the threshold follows from the sum."""

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return _entmax(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        slope = ctx.saved_tensors[0].sqrt()
        total = slope.sum(-1, keepdim=True)
        mean = (slope * grad).sum(-1, keepdim=True) / torch.where(total == 0, 1, total)
        return (slope * (grad - mean),)


def mixed(logits: Tensor, weight: float | Tensor) -> Tensor:
    """Return the probabilities of logits `[..,N]`, -inf for a masked column: softmax, moved towards entmax."""
    highest = logits.detach().amax(-1, keepdim=True)
    logits = logits - torch.where(highest.isneginf(), 0.0, highest)
    dense = torch.ops.aten._safe_softmax(logits, -1)
    sparse = _Differentiated.apply(logits) if differentiated(logits) else _entmax(logits)
    return torch.lerp(dense, sparse, weight.to(dense.dtype) if isinstance(weight, Tensor) else weight)


def _eager(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, weight: float | Tensor, scale: float) -> Tensor:
    """Attend by blocks of rows."""
    batch, heads, image_tokens, _ = q.shape
    most = LOGITS.get(q.device.type, LOGITS_ELSEWHERE)
    rows = max(1, min(image_tokens, most // (batch * heads * k.shape[2])))
    keys, blocks = k.mT, []
    for first in range(0, image_tokens, rows):
        logits = (scale * q[:, :, first : first + rows]) @ keys
        if key_bias is not None:
            logits = logits + key_bias[:, None, None, :]
        blocks.append(mixed(logits, weight) @ v)
    return torch.cat(blocks, 2)


def entmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weight: float | Tensor = 1.0,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention by 1.5-entmax instead of softmax, or beyond it.

    With logits l and P = softmax(l), S = entmax_1.5(l), that is (P + weight (S - P)) v (arXiv 2503.07677, "PLADIS").
    The 1.5-entmax is max(l / 2 - t, 0)^2, with the t for which a row adds up to one: columns far below a row's
    largest logit have no weight at all.

    Differentiable in q, k and v by `"eager"` and `"reference"`. Logits of size M*N are never in memory as a whole,
    except for the gradients.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: keys `[B,H,N,d]`.
        v: values `[B,H,N,d]`.
        weight: 0 is softmax, 1 is entmax, more goes beyond; or a 0-d tensor, which is trusted, and under torch.compile
            may change without a new graph.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; with `"triton"`, inputs that require a gradient, or more
            than 512 columns.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    if not isinstance(weight, Tensor) and not math.isfinite(weight):
        raise ValueError(f"weight is {weight}; it must be finite")
    if isinstance(weight, Tensor) and weight.ndim:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be one number, a 0-d tensor")
    check_device("weight", weight, "q", q.device)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        how: dict[str, Any] = {"weight": weight, "scale": scale, "key_bias": heads.samples(key_bias), "impl": impl}
        return heads.whole(entmax_attention(heads.queries(q), heads.keys(k), heads.keys(v), **how))
    if impl == "triton":
        check_kernel_limits(q)
        if differentiated(q, k, v):
            raise ValueError(
                "entmax_attention has no gradient by the Triton kernels; use impl='eager', or torch.no_grad()"
            )
        now = weight if isinstance(weight, Tensor) else None
        return _triton(q, k, v, key_bias, now, 0.0 if isinstance(weight, Tensor) else weight, scale, STEPS)
    if impl == "reference":
        return reference.entmax_attention(q, k, v, weight, scale, key_bias).to(q.dtype)
    wide = wide_dtype(q.dtype)
    return _eager(q.to(wide), k.to(wide), v.to(wide), key_bias, weight, scale).to(q.dtype)
