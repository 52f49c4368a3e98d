"""Merging the target columns, biased or not, into attention over all other columns."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import TokenIds, check_dtype, check_kernel_dtype, check_kernel_limits, check_targets
from ..reference import NO_COLUMNS
from ._heads import Grouped
from ._library import composite, differentiable, launcher
from .attention import gather_columns
from .target_statistics import TargetStatistics, joint_lse

_SCHEMA = (
    "(Tensor rest_out, Tensor rest_lse, Tensor logits, Tensor pinned_logits, Tensor v, Tensor bias, "
    "Tensor target_ids, Tensor pinned_ids) -> Tensor"
)
merge_targets_reference = composite("merge_targets_reference" + _SCHEMA, reference.merge_targets)


def _merge_targets(
    rest_out: Tensor,
    rest_lse: Tensor,
    logits: Tensor,
    pinned_logits: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
) -> Tensor:
    wide = logits.dtype
    z = logits + bias
    if target_ids.ndim == 2:
        z = z.masked_fill((target_ids < 0)[:, None, :, None], -torch.inf)
    rest_lse = rest_lse.clamp(min=NO_COLUMNS)
    weights = torch.cat([z, rest_lse.unsqueeze(2)], 2).softmax(2)
    rest_weight, columns, values = weights[:, :, -1], weights[:, :, :-1], gather_columns(v, target_ids)
    if pinned_ids.shape[-1]:
        plain_lse, lse = (joint_lse(rest_lse, x).unsqueeze(2) for x in (logits, z))
        restored = torch.exp(pinned_logits - plain_lse) - torch.exp(pinned_logits - lse)
        columns = torch.cat([columns, restored], 2)
        values = torch.cat([values, gather_columns(v, pinned_ids)], 2)
    rest = rest_out.to(wide) * rest_weight.unsqueeze(-1)
    # In place, for memory that is new costs as much as the product.
    out = rest.flatten(0, 1).baddbmm_(columns.mT.flatten(0, 1), values.to(wide).flatten(0, 1))
    return out.unflatten(0, rest.shape[:2]).to(v.dtype)


merge_targets_op = composite("merge_targets" + _SCHEMA, _merge_targets)
_triton = differentiable(
    "merge_targets_triton" + _SCHEMA.replace("Tensor bias", "Tensor? bias"),
    launcher("merge_targets", "merge_targets"),
    lambda rest_out, rest_lse, logits, pinned_logits, v, *_: v.new_empty(rest_out.shape),
    launcher("merge_targets", "merge_targets_backward"),
    leaves=6,
)


def check_bias(bias: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `bias` in `dtype`.

    ValueError unless it is a float tensor of `shape` [B,H,T,M] on `device`, no wider.
    """
    if not bias.dtype.is_floating_point or bias.shape != shape:
        raise ValueError(
            f"bias is {bias.dtype} of shape {tuple(bias.shape)}; it must be a float tensor [B,H,T,M] = {list(shape)}"
        )
    if bias.device != device:
        raise ValueError(f"bias is on {bias.device} but the attention is on {device}; move it there")
    return check_dtype("bias", bias, dtype)


def merge_targets(
    stats: TargetStatistics,
    v: Tensor,
    target_ids: TokenIds,
    bias: Tensor | None = None,
    *,
    pinned_ids: TokenIds = (),
    impl: str | None = None,
) -> Tensor:
    """Compute attention whose target columns carry `bias`, from the statistics.

    That is (e^R O_rest + sum_t e^(l_t + bias_t) V_t) / Z.

    Exact and stable at any bias: the targets were left out, and are merged in. Differentiable in the
    statistics, v and bias.

    Args:
        stats: from `target_statistics` with the same ids.
        v: the values `[B,H,N,d]`, or with fewer heads as for `attention`.
        target_ids: as given to `target_statistics`.
        bias: what is added to the scaled logits of the targets, `[B,H,T,M]`; None for the unedited output.
        pinned_ids: as given to `target_statistics`. A pinned column is put back to its unedited probability, and the
            row is not renormalised, as in the released code of attention regulation.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in v's dtype.

    Raises:
        ValueError: a bias, ids or values that do not fit the statistics.
    """
    of_v, of_rest = v.shape, stats.rest_out.shape
    if len(of_v) != 4 or of_v[0] != of_rest[0] or of_rest[1] % of_v[1] or of_v[3] != of_rest[3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, which does not fit rest_out {tuple(stats.rest_out.shape)}")
    if not v.dtype.is_floating_point or v.device != stats.rest_out.device:
        raise ValueError(f"v is {v.dtype} on {v.device}; it must be a float tensor on {stats.rest_out.device}")
    targets, pinned = check_targets(target_ids, pinned_ids, v)
    if targets.shape[-1] != stats.logits.shape[2]:
        raise ValueError(
            f"target_ids names {targets.shape[-1]} tokens, but the statistics hold {stats.logits.shape[2]}; "
            "pass the ids that target_statistics got"
        )
    held = 0 if stats.pinned_logits is None else stats.pinned_logits.shape[2]
    if pinned.shape[-1] != held:
        raise ValueError(
            f"pinned_ids names {pinned.shape[-1]} tokens, but the statistics hold {held} pinned columns; "
            "pass the ids that target_statistics got"
        )
    if bias is not None:
        bias = check_bias(bias, stats.logits.shape, stats.logits.device, stats.logits.dtype)
    if of_v[1] != of_rest[1]:
        heads = Grouped(stats.rest_out, v)
        given = TargetStatistics(*(heads.queries(x) for x in stats)), heads.keys(v), heads.samples(targets)
        found = merge_targets(*given, heads.queries(bias), pinned_ids=heads.samples(pinned), impl=impl)
        return heads.whole(found)
    pinned_logits = stats.logits[:, :, :0] if stats.pinned_logits is None else stats.pinned_logits
    arguments = (stats.rest_out, stats.rest_lse, stats.logits, pinned_logits, v)
    impl = resolve(impl, v.device)
    if impl == "triton":
        check_kernel_limits(v, targets.shape[-1] + pinned.shape[-1])
        check_kernel_dtype(stats.logits)
        return _triton(*arguments, bias, targets, pinned)
    if bias is None:
        bias = torch.zeros_like(stats.logits)
    merge = merge_targets_reference if impl == "reference" else merge_targets_op
    return merge(*arguments, bias, targets, pinned)
