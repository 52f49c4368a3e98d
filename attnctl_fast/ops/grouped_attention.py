"""Attention between groups of tokens that may see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import reference
from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._heads import Grouped
from ._library import composite, differentiable, launcher
from .attention import masked_backward, masked_forward, masked_result

# Logits, and columns, up to which a CPU takes a mask and one call, and the logits of the blocks of rows elsewhere.
SMALL, FEW = 1 << 19, 128
LOGITS_ELSEWHERE = 1 << 25
ALL = slice(None)
KERNEL_GROUPS = 32

_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor row_groups, Tensor column_groups, Tensor allowed, "
grouped_attention_reference = composite(
    f"grouped_attention_reference{_ARGUMENTS}float scale, Tensor? key_bias) -> (Tensor, Tensor)",
    reference.grouped_attention,
)


class _Part(NamedTuple):
    """Rows that are computed by one call: of some samples, over some columns; `mask` is added to the logits."""

    samples: slice
    rows: slice | Tensor
    columns: slice | Tensor
    mask: Tensor | None
    empty: Tensor | None

    @property
    def whole(self) -> bool:
        return self.rows is ALL

    def of_rows(self, x: Tensor) -> Tensor:
        return _taken(x[self.samples], self.rows)

    def of_columns(self, x: Tensor) -> Tensor:
        return _taken(x[self.samples], self.columns)

    def put(self, x: Tensor, made: Tensor) -> None:
        """Write the rows of `x`."""
        if isinstance(self.rows, slice):
            x[self.samples, :, self.rows] = made
        else:
            x[self.samples].index_copy_(2, self.rows, made)

    def add(self, x: Tensor, made: Tensor) -> None:
        """Add to the columns of `x`."""
        if isinstance(self.columns, slice):
            x[self.samples, :, self.columns] += made
        else:
            x[self.samples].index_add_(2, self.columns, made)


def _taken(x: Tensor, where: slice | Tensor) -> Tensor:
    return x[:, :, where] if isinstance(where, slice) else x.index_select(2, where)


def _where(named: Tensor) -> slice | Tensor:
    """Return the places of what is true in `named` [N], as a slice where they are neighbours."""
    places = named.nonzero().squeeze(1)
    first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1)
    return slice(first, last + 1) if last + 1 - first == len(places) else places


def _parts(
    q: Tensor, k: Tensor, row_groups: Tensor, column_groups: Tensor, allowed: Tensor, key_bias: Tensor | None
) -> Iterator[_Part]:
    """Yield what is computed one after another; rows that see nothing are in no part, or `empty` in one."""
    batch, heads, image_tokens, _ = q.shape
    logits = batch * heads * image_tokens * k.shape[2]
    if q.device.type == "cpu" and logits > SMALL and k.shape[2] > FEW:
        for b in range(batch):
            yield from _gathered(b, q, row_groups[b], column_groups[b], allowed, key_bias)
        return
    # What a group sees is that of all its rows.
    seen = allowed[:, column_groups].transpose(0, 1)
    of_groups = torch.where(seen, 0.0 if key_bias is None else key_bias[:, None, :], -torch.inf).to(q.dtype)  # [B,G,N]
    nothing = of_groups.isneginf().all(-1)
    first_group = len(allowed) * torch.arange(batch, device=q.device)[:, None]
    step = image_tokens if logits <= LOGITS_ELSEWHERE else max(1, LOGITS_ELSEWHERE * image_tokens // logits)
    for first in range(0, image_tokens, step):
        rows = ALL if step == image_tokens else slice(first, first + step)
        places = row_groups[:, rows]
        mask = of_groups.flatten(0, 1).index_select(0, (places + first_group).flatten()).unflatten(0, places.shape)
        yield _Part(ALL, rows, ALL, mask.unsqueeze(1), nothing.gather(1, places).unsqueeze(1))


def _gathered(
    b: int, q: Tensor, row_groups: Tensor, column_groups: Tensor, allowed: Tensor, key_bias: Tensor | None
) -> Iterator[_Part]:
    """Yield the rows of a sample that see the same columns, with no column that they do not see."""
    present, group_of_row = row_groups.unique(return_inverse=True)
    held, group_of_column = column_groups.unique(return_inverse=True)
    patterns, pattern_of_group = allowed[present][:, held].unique(dim=0, return_inverse=True)
    pattern_of_row = pattern_of_group[group_of_row]
    for i, pattern in enumerate(patterns):
        if not pattern.any():
            continue
        own, seen = pattern_of_row == i, pattern[group_of_column]
        mask = empty = None
        if key_bias is not None:
            mask = key_bias[b, seen].expand(1, 1, int(own.sum()), -1)
            empty = mask[:, :, 0].isneginf().all(-1, keepdim=True)
        yield _Part(slice(b, b + 1), _where(own), _where(seen), mask, empty)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    whole: tuple[Tensor, Tensor] | None = None
    for part in _parts(q, k, row_groups, column_groups, allowed, key_bias):
        made = masked_forward(part.of_rows(q), part.of_columns(k), part.of_columns(v), *part[3:], scale)
        if part.whole:
            return made
        whole = whole or _nothing(q)
        for x, of_rows in zip(whole, made, strict=True):
            part.put(x, of_rows)
    return whole or _nothing(q)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of rows that see no column."""
    out, lse = masked_result(q)
    return out.zero_(), lse.fill_(-torch.inf)


def _backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    key_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    lse = lse.masked_fill(lse.isneginf(), 0.0)
    dq, dk, dv = (x.new_zeros(x.shape) if wanted else None for x, wanted in zip((q, k, v), needed, strict=True))
    for part in _parts(q, k, row_groups, column_groups, allowed, key_bias):
        of_q, of_k, of_v = masked_backward(
            part.of_rows(grad_out),
            None if grad_lse is None else part.of_rows(grad_lse),
            part.of_rows(q),
            part.of_columns(k),
            part.of_columns(v),
            part.of_rows(out),
            part.of_rows(lse),
            part.mask,
            scale,
            needed,
        )
        if part.whole:
            found = zip((of_q, of_k, of_v), needed, strict=True)
            return [x.contiguous() if wanted else None for x, wanted in found]
        if dq is not None:
            part.put(dq, of_q)
        for total, more in ((dk, of_k), (dv, of_v)):
            if total is not None:
                part.add(total, more)
    return [dq, dk, dv]


_eager = differentiable(
    f"grouped_attention{_ARGUMENTS}Tensor? key_bias, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda q, *_: masked_result(q),
    _backward,
    leaves=3,
    results=2,
    saves=(0, 1),
)
_triton = differentiable(
    f"grouped_attention_triton{_ARGUMENTS}Tensor? key_bias, float scale) -> (Tensor, Tensor)",
    launcher("grouped_attention", "grouped_attention"),
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)),
    launcher("grouped_attention", "grouped_attention_backward"),
    leaves=3,
    results=2,
    saves=(1,),
)


def _check_groups(name: str, groups: Tensor, q: Tensor, tokens: int, count: int) -> None:
    if groups.shape != (q.shape[0], tokens):
        raise ValueError(f"{name} has shape {tuple(groups.shape)}; it must be [batch, tokens] {(q.shape[0], tokens)}")
    if groups.dtype != torch.int64:
        raise ValueError(f"{name} has dtype {groups.dtype}; it must be torch.int64, one group for every token")
    if groups.device != q.device:
        raise ValueError(f"{name} is on {groups.device} but q is on {q.device}; move them to one device")
    if groups.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(groups, FakeTensor):
        return
    lowest, highest = (int(x) for x in groups.aminmax())
    if lowest < 0 or highest >= count:
        off = lowest if lowest < 0 else highest
        raise ValueError(f"{name} holds {off}, but allowed is of the groups 0..{count - 1}")


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_groups: Tensor,
    column_groups: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention in which a row sees the columns of those groups only that its own group may see.

    That is softmax(scale q k^T + key_bias) v over these columns (MATH.md section 10). A token has one group; where
    regions overlap, each set of regions is a group of its own, and what is outside of all regions is one as well.

    No mask [M,N] is in memory as a whole, but for small maps on a CPU. The kernels skip the blocks that nothing
    connects, and a CPU computes no logit that nobody sees. Differentiable in q, k and v, through the output and through
    the logsumexp. Where a row sees no column, the output and all gradients are 0 and the logsumexp is -inf.

    Args:
        q: queries `[B,H,M,d]`, float16, bfloat16, float32 or float64, any strides.
        k: keys `[B,H,N,d]`, of the dtype and device of q.
        v: values `[B,H,N,d]`, likewise.
        row_groups: the group of every row, `[B,M]`, int64 in 0..G-1.
        column_groups: the group of every column, `[B,N]`, likewise.
        allowed: which groups (first dimension) see which (second), `[G,G]`, bool.
        scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: added to the scaled logits, `[B,N]`, -inf for a masked column: as for `attention`.
        return_lse: also return the logsumexp of each row's scaled logits.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default (see `attnctl_fast.use`).

    Returns:
        out `[B,H,M,d]` in q's dtype, or `(out, lse)` with lse `[B,H,M]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an empty dimension; a group that allowed does not know;
            or (Triton) float64, a head width outside 8..256 or more than 32 groups. Groups on an accelerator are
            trusted, for reading them would synchronise.
    """
    grouped = check_qkv(q, k, v)
    key_bias = check_key_bias(key_bias, k)
    if allowed.dtype != torch.bool or allowed.ndim != 2 or allowed.shape[0] != allowed.shape[1] or not allowed.numel():
        raise ValueError(
            f"allowed is {allowed.dtype} of shape {tuple(allowed.shape)}; it must be torch.bool [groups, groups]: "
            "which group (first dimension) sees which"
        )
    if allowed.device != q.device:
        raise ValueError(f"allowed is on {allowed.device} but q is on {q.device}; move them to one device")
    _check_groups("row_groups", row_groups, q, q.shape[2], allowed.shape[0])
    _check_groups("column_groups", column_groups, q, k.shape[2], allowed.shape[0])
    scale, impl = check_scale(scale, q.shape[3]), resolve(impl, q.device)
    if grouped:
        heads = Grouped(q, k)
        every = heads.queries(q), heads.keys(k), heads.keys(v), heads.samples(row_groups), heads.samples(column_groups)
        how: dict[str, Any] = {"scale": scale, "key_bias": heads.samples(key_bias), "impl": impl}
        out, lse = grouped_attention(*every, allowed, **how, return_lse=True)
        return (heads.whole(out), heads.whole(lse)) if return_lse else heads.whole(out)
    if impl == "triton":
        check_kernel_limits(q)
        if allowed.shape[0] > KERNEL_GROUPS:
            raise ValueError(
                f"the Triton kernels take at most {KERNEL_GROUPS} groups, not {allowed.shape[0]}; give tokens that see "
                "and are seen alike one group, or use impl='eager'"
            )
        out, lse = _triton(q, k, v, row_groups, column_groups, allowed, key_bias, scale)
        return (out, lse) if return_lse else out
    wide = wide_dtype(q.dtype)
    given = (*(x.to(wide) for x in (q, k, v)), row_groups, column_groups, allowed)
    if impl == "eager":
        out, lse = _eager(*given, key_bias, scale)
    else:
        out, lse = grouped_attention_reference(*given, scale, key_bias)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)
