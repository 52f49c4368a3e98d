"""The statistics of a layer that attention control needs: target logits, and attention over all other columns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import (
    TokenIds,
    check_device,
    check_kernel_limits,
    check_key_bias,
    check_qkv,
    check_scale,
    check_targets,
    wide_dtype,
)
from ..reference import NO_COLUMNS
from ._heads import Grouped
from ._library import composite, differentiable, launcher, made
from .attention import attention_without, gather_columns, gather_key_bias


class TargetStatistics(NamedTuple):
    """All that an edit of the targets' columns needs to know of a layer.

    All are float32 (float64 for float64 inputs).

    Attributes:
        rest_out: attention over the columns that are not targets, `[B,H,M,d]`.
        rest_lse: the logsumexp of those columns' logits, `[B,H,M]`; -inf where every column is a target or masked.
        logits: the targets' scaled logits, `[B,H,T,M]`; -inf for padded and masked targets.
        rest_square: the sum of squared probabilities over the columns that are not targets, `[B,H,M]`, or None.
        pinned_logits: the pinned columns' scaled logits, `[B,H,P,M]`, -inf for padded and masked ones, or None without
            pinned columns.
    """

    rest_out: Tensor
    rest_lse: Tensor
    logits: Tensor
    rest_square: Tensor | None
    pinned_logits: Tensor | None


_COLUMNS = "(Tensor q, Tensor k, Tensor target_ids, float scale, Tensor? key_bias) -> Tensor"
target_logits_reference = composite(f"target_logits_reference{_COLUMNS}", reference.target_logits)
rest_square_reference = composite(f"rest_square_reference{_COLUMNS}", reference.rest_square)


def joint_lse(rest_lse: Tensor, logits: Tensor) -> Tensor:
    """Return the logsumexp over all columns, [B,H,M].

    In one call: that of padded targets alone has no gradient. Nor has one of nothing but -inf, so `rest_lse` must be at
    least NO_COLUMNS.
    """
    return torch.cat([logits, rest_lse.unsqueeze(2)], 2).logsumexp(2)


def check_statistics(stats: TargetStatistics) -> None:
    """Raise ValueError unless the statistics are float32 or float64, as `target_statistics` makes them."""
    if stats.logits.dtype not in (torch.float32, torch.float64) or stats.rest_lse.dtype != stats.logits.dtype:
        raise ValueError(
            f"the statistics hold logits in {stats.logits.dtype} and rest_lse in {stats.rest_lse.dtype}; both must be "
            "float32 or both float64, as target_statistics makes them"
        )
    for name, x in (("rest_lse", stats.rest_lse), ("rest_square", stats.rest_square)):
        check_device(name, x, "logits", stats.logits.device)


def _target_logits(q: Tensor, k: Tensor, target_ids: Tensor, scale: float, key_bias: Tensor | None) -> Tensor:
    wide = wide_dtype(q.dtype)
    logits = (gather_columns(k, target_ids).to(wide) * scale) @ q.to(wide).mT
    if key_bias is not None:
        logits = logits + gather_key_bias(key_bias, target_ids)[:, None, :, None]
    if target_ids.ndim == 1:
        return logits
    return logits.masked_fill((target_ids < 0)[:, None, :, None], -torch.inf)


target_logits_op = composite(f"target_logits{_COLUMNS}", _target_logits)


def _rest_square(
    q: Tensor, k: Tensor, target_ids: Tensor, lse: Tensor, scale: float, impl: str, key_bias: Tensor | None
) -> Tensor:
    if impl == "reference":
        return rest_square_reference(q, k, target_ids, scale, key_bias)
    # sum_n A_n^2 = exp(logsumexp(2 l) - 2 logsumexp(l)): attention at twice the scale already sums it.
    double_bias = None if key_bias is None else 2 * key_bias
    _, double_lse = attention_without(q, k, k, target_ids, 2 * scale, impl, double_bias)
    return torch.exp(double_lse - 2 * lse)


_launch = launcher("attention", "target_statistics")


def _triton_forward(*arguments: Any) -> tuple[Tensor, ...]:
    rest_out, rest_lse, logits, square, pinned_logits = _launch(*arguments)
    return rest_out, rest_lse, logits, made(square, rest_lse), pinned_logits


def _triton_fake(q: Tensor, k: Tensor, v: Tensor, targets: Tensor, pinned: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = q.new_empty(q.shape[:3], dtype=torch.float32)
    logits, pinned_logits = (rows.new_empty(*q.shape[:2], x.shape[-1], q.shape[2]) for x in (targets, pinned))
    return rows.new_empty(q.shape), rows, logits, rows.new_empty(rows.shape if rest[-1] else 0), pinned_logits


_triton = differentiable(
    "target_statistics_triton(Tensor q, Tensor k, Tensor v, Tensor target_ids, Tensor pinned_ids, Tensor? key_bias, "
    "float scale, bool with_square) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _triton_forward,
    _triton_fake,
    launcher("attention_backward", "target_statistics_backward"),
    leaves=3,
    results=5,
    saves=(1, 2, 3),
)


def target_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: TokenIds,
    *,
    pinned_ids: TokenIds = (),
    scale: float | None = None,
    key_bias: Tensor | None = None,
    with_square: bool = False,
    impl: str | None = None,
) -> TargetStatistics:
    """Compute attention over all columns but the targets, and the targets' logits.

    That is enough to edit the targets' columns later (`merge_targets`) or to optimise their bias (`regulate`) without
    touching q, k or v again.

    Differentiable in q, k and v.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: keys `[B,H,N,d]`.
        v: values `[B,H,N,d]`.
        target_ids: ids of the T target tokens, `[T]` or `[B,T]` padded with -1; distinct and in 0..N-1.
        pinned_ids: ids of P tokens that shall keep their unedited probabilities (they stay in the rest).
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`. All statistics
            contain it, so that what works on them needs none. A masked target is taken for a padded one.
        with_square: also compute `rest_square`, which only the paper's objective needs.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        `TargetStatistics`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; no target; an id out of range, twice, or both target and
            pinned; or (Triton) float64, a head width outside 8..256, or more than 64 target and pinned tokens. Ids on
            an accelerator are trusted, for reading them would synchronise.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    targets, pinned = check_targets(target_ids, pinned_ids, k)
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        found = target_statistics(
            heads.queries(q),
            heads.keys(k),
            heads.keys(v),
            heads.samples(targets),
            pinned_ids=heads.samples(pinned),
            scale=scale,
            key_bias=heads.samples(key_bias),
            with_square=with_square,
            impl=impl,
        )
        return TargetStatistics(*(heads.whole(x) for x in found))
    if impl == "triton":
        check_kernel_limits(q, targets.shape[-1] + pinned.shape[-1])
        rest_out, rest_lse, logits, square, of_pinned = _triton(q, k, v, targets, pinned, key_bias, scale, with_square)
        square, of_pinned = square if with_square else None, of_pinned if pinned.shape[-1] else None
        return TargetStatistics(rest_out, rest_lse, logits, square, of_pinned)
    columns = target_logits_reference if impl == "reference" else target_logits_op
    rest_out, rest_lse = attention_without(q, k, v, targets, scale, impl, key_bias)
    logits = columns(q, k, targets, scale, key_bias)
    square = None
    if with_square:
        square = _rest_square(q, k, targets, joint_lse(rest_lse.clamp(min=NO_COLUMNS), logits), scale, impl, key_bias)
    pinned_logits = columns(q, k, pinned, scale, key_bias) if pinned.shape[-1] else None
    return TargetStatistics(rest_out, rest_lse, logits, square, pinned_logits)
