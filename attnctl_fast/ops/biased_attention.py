"""Attention with a bias on a few columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import TokenIds, check_kernel_limits, check_key_bias, check_qkv, check_scale, check_targets, wide_dtype
from ._heads import Grouped
from ._library import composite, differentiable, launcher, made, may_hold_map
from .attention import attend, attend_only
from .merge_targets import check_bias, merge_targets_op
from .target_statistics import target_logits_op

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor target_ids, Tensor pinned_ids, float scale, Tensor? key_bias) "
    "-> Tensor"
)
biased_attention_reference = composite("biased_attention_reference" + _SCHEMA, reference.biased_attention)


def _biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    scale: float,
    key_bias: Tensor | None,
) -> Tensor:
    if not pinned_ids.shape[-1] and may_hold_map(q, k):
        return attend_only(q, k, v, target_ids, bias, scale, key_bias)
    rest_out, rest_lse = attend(q, k, v, target_ids, None, scale, key_bias)
    logits, pinned_logits = (target_logits_op(q, k, ids, scale, key_bias) for ids in (target_ids, pinned_ids))
    return merge_targets_op(rest_out, rest_lse, logits, pinned_logits, v, bias, target_ids, pinned_ids)


biased_attention_op = composite("biased_attention" + _SCHEMA, _biased_attention)


def _triton_fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, targets: Tensor, pinned: Tensor, *rest: Any) -> Any:
    keep = rest[-1]
    shapes = (q.shape[:3] if given else (0,) for given in (keep, keep and pinned.shape[-1] > 0))
    return q.new_empty(q.shape), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    out, lse, plain_lse = _launch(*arguments)
    return out, made(lse, arguments[3]), made(plain_lse, arguments[3])


_launch = launcher("attention", "biased_attention")
# With a width of 0, bias is S [B,H,T,M]. Otherwise it is theta [B,H,T,r_y,r_x], width is that of the grid, and axes are
# what `gaussian_bias.kernel_axes` gives.
biased_attention_triton = differentiable(
    "biased_attention_triton(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor target_ids, Tensor pinned_ids, "
    "Tensor? key_bias, float scale, float bias_scale, int width, float[] axes) -> (Tensor, Tensor, Tensor)",
    _triton_forward,
    _triton_fake,
    launcher("attention_backward", "biased_attention_backward"),
    leaves=4,
    saves=(1, 2),
    keeps=True,
)


def with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    targets: Tensor,
    pinned: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    impl: str,
) -> Tensor:
    """Run `biased_attention` by `"eager"` or `"reference"`, of what is checked already."""
    run = biased_attention_reference if impl == "reference" else biased_attention_op
    return run(q, k, v, bias if bias_scale == 1.0 else bias * bias_scale, targets, pinned, scale, key_bias)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: TokenIds,
    *,
    pinned_ids: TokenIds = (),
    scale: float | None = None,
    key_bias: Tensor | None = None,
    bias_inside_scale: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Compute attention with `bias` added to the logits of the target columns.

    softmax(scale q k^T + S) v, or with `bias_inside_scale` softmax(scale (q k^T + S)) v (arXiv 2403.06381, Eq. 9).
    Differentiable in q, k, v and bias; no [B,H,M,N] map is made beyond what attention itself makes, except on a CPU one
    of up to 64 MiB.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: keys `[B,H,N,d]`.
        v: values `[B,H,N,d]`.
        bias: S `[B,H,T,M]`, one map per target; float.
        target_ids: `[T]` or `[B,T]` padded with -1 (a padded target's bias is ignored and gets gradient zero).
        pinned_ids: columns that keep their unbiased probability; the row is not renormalised.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        bias_inside_scale: False is the released code's convention, True the paper's.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: as `target_statistics`, or a bias that does not fit.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    targets, pinned = check_targets(target_ids, pinned_ids, k)
    scale = check_scale(scale, q.shape[3])
    wide = wide_dtype(q.dtype)
    bias = check_bias(bias, (*q.shape[:2], targets.shape[-1], q.shape[2]), q.device, wide)
    impl, inside = resolve(impl, q.device), scale if bias_inside_scale else 1.0
    if grouped:
        heads = Grouped(q, k)
        given = heads.queries(q), heads.keys(k), heads.keys(v), heads.queries(bias), heads.samples(targets)
        how: dict[str, Any] = {"scale": scale, "bias_inside_scale": bias_inside_scale, "impl": impl}
        found = biased_attention(*given, pinned_ids=heads.samples(pinned), key_bias=heads.samples(key_bias), **how)
        return heads.whole(found)
    if impl == "triton":
        check_kernel_limits(q, targets.shape[-1] + pinned.shape[-1])
        return biased_attention_triton(q, k, v, bias, targets, pinned, key_bias, scale, inside, 0, [])
    return with_bias(q, k, v, bias, targets, pinned, key_bias, scale, inside, impl)
