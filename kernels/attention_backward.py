"""Gradients of attention in the four forms of attention.py; what is not needed is None and costs nothing.

One launch gives the gradients of q and of the bias. Those of k and v take another; of plain attention to a prompt, the
same one. Where the rows are split to fill the device, a sum over the parts follows: in a fixed order, so that results
repeat bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._attention_gradients import _attention_bwd_columns_kernel, _attention_bwd_rows_kernel
from ._launch import ceil_div, config, dot_dtype, launch, pieces, power_of_2, unit_stride
from ._short_gradients import _attention_bwd_short_kernel
from .attention import BIASED, NO_BASIS, PLAIN, REGULATED, STATISTICS, Basis, align_of, basis_of


class _Pass(NamedTuple):
    """What a backward pass starts from. `lse` is that of the softmax of the weights, `plain_lse` that of all columns
    without bias: given for pinned columns, room for it with `grad_square`."""

    form: Any
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    lse: Tensor
    grad_out: Tensor | None
    grad_lse: Tensor | None = None
    target_ids: Tensor | None = None
    pinned_ids: Tensor | None = None
    plain_lse: Tensor | None = None
    logits: Tensor | None = None
    grad_logits: Tensor | None = None
    grad_pinned: Tensor | None = None
    square: Tensor | None = None
    grad_square: Tensor | None = None
    grad_maps: Tensor | None = None
    slots: Tensor | None = None
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    bias_scale: float = 1.0
    basis: Basis = NO_BASIS

    def config(self, kernel: str, columns: int, **sizes: int) -> dict[str, int]:
        d, itemsize = self.q.shape[3], self.q.element_size()
        return dict(config(kernel, self.q.device, d=d, n=columns, m=self.q.shape[2], itemsize=itemsize, **sizes))

    @property
    def special(self) -> int:
        """The number of targets and pinned columns."""
        return sum(x.shape[-1] for x in (self.target_ids, self.pinned_ids) if x is not None)

    def layout(self) -> list[int]:
        """The strides of grad_out, q, k, v, the ids, the slots and the maps, then H, M, N, T and P."""
        grad_out = self.q if self.grad_out is None else self.grad_out
        strides = [stride for x in (grad_out, self.q, self.k, self.v) for stride in x.stride()[:3]]
        ids = self.target_ids, self.pinned_ids
        strides += [0 if x is None or x.ndim == 1 else x.stride(0) for x in ids]
        strides.append(0 if self.slots is None or self.slots.shape[0] == 1 else self.slots.stride(0))
        strides += self._map_strides()
        return [*strides, *self.q.shape[1:3], self.k.shape[2], *(0 if x is None else x.shape[-1] for x in ids)]

    def _map_strides(self) -> tuple[int, int]:
        """Of sample and head; the heads of a mean share its gradient."""
        if self.grad_maps is None:
            return 0, 0
        return self.grad_maps.stride(0), self.grad_maps.stride(1) if self.grad_maps.ndim == 4 else 0

    @property
    def map_weight(self) -> float:
        """A head's share of the maps."""
        return 1.0 if self.grad_maps is None or self.grad_maps.ndim == 4 else 1.0 / self.q.shape[1]

    def constants(self) -> dict[str, Any]:
        d1, d2 = pieces(self.q.shape[3])
        read = [x for x in (self.grad_out, self.q, self.k, self.v) if x is not None]
        return {
            "FORM": self.form.value,
            "D": self.q.shape[3],
            "D1": d1,
            "D2": d2,
            "COLUMNS": max(power_of_2(self.special), 16) if self.special else 0,
            "PINNED": self.plain_lse is not None and self.grad_square is None,
            "ALIGN": align_of(*read),
            "DOT": dot_dtype(self.q.dtype),
        }


def _backward(x: _Pass, needed: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv and the gradient of the bias, as `needed` says of each."""
    dq = torch.empty_like(x.q, memory_format=torch.contiguous_format) if needed[0] else None
    if x.form.value == PLAIN.value and x.q.dtype != torch.float32:
        # Where dk or dv is wanted, registers hold its sum.
        use = x.config("attention_bwd_short", x.k.shape[2], sums=needed[1] + needed[2])
        if x.k.shape[2] <= use.pop("ON_CHIP_N"):
            return dq, *_short(x, use, dq, needed[1], needed[2]), None
    grad_bias = None
    delta = pinned_delta = None
    if needed[1]:
        delta, pinned_delta = torch.empty_like(x.lse), torch.empty_like(x.lse)
    if needed[0] or needed[1] or needed[3]:
        grad_bias = _rows(x, dq, delta, pinned_delta, needed[3])
    dk, dv = _columns(x, delta, pinned_delta, needed[1], needed[2])
    return dq, dk, dv, grad_bias


def _short(
    x: _Pass, use: dict[str, int], dq: Tensor | None, with_k: bool, with_v: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dq, if it is there, and return dk and dv, as far as wanted, in one pass over the queries."""
    if with_v and x.grad_out is None:
        return _short(x, use, dq, with_k, False)[0], x.v.new_zeros(x.v.shape)
    batch, heads, image_tokens, _ = x.q.shape
    blocks = ceil_div(image_tokens, use["BLOCK_M"])
    tiles = ceil_div(blocks, min(blocks, ceil_div(use.pop("PROGRAMS"), batch * heads)))
    parts = ceil_div(blocks, tiles)
    # Together, so that one sum over the parts serves both.
    sums = x.lse.new_empty(with_k + with_v, parts, *x.k.shape)
    dk, dv = (sums[0] if with_k else None), (sums[-1] if with_v else None)
    *strides, _, _, of_slots, of_sample, of_head, _, _, _, _, _ = x.layout()
    constants = x.constants()
    launch(
        _attention_bwd_short_kernel,
        (parts, batch * heads),
        x.q.device,
        use,
        x.grad_out,
        x.grad_lse,
        x.grad_maps,
        x.slots,
        x.q,
        x.k,
        x.v,
        x.key_bias,
        x.lse,
        dq,
        dk,
        dv,
        *strides,
        of_slots,
        of_sample,
        of_head,
        heads,
        image_tokens,
        x.k.shape[2],
        tiles,
        x.scale,
        x.map_weight,
        # At least as many as a group of four warps shares on sm_90 and later.
        N1=max(power_of_2(x.k.shape[2]), 64),
        **{name: constants[name] for name in ("D", "D1", "D2", "ALIGN", "DOT")},
    )
    if not (with_k or with_v):
        return None, None
    total = sums[:, 0] if parts == 1 else sums.sum(1)
    return (total[0].to(x.k.dtype) if with_k else None), (total[-1].to(x.v.dtype) if with_v else None)


def _rows(
    x: _Pass, dq: Tensor | None, delta: Tensor | None, pinned_delta: Tensor | None, with_bias: bool
) -> Tensor | None:
    """Fill dq and the row terms, as far as they are there, and return the gradient of the bias."""
    batch, heads, image_tokens, _ = x.q.shape
    # Without dq there is no loop over the columns, which is another choice of blocks.
    use = x.config("attention_bwd_rows", 0 if dq is None else x.k.shape[2])
    blocks = ceil_div(image_tokens, use["BLOCK_M"])
    grad_bias = None
    if with_bias and x.bias is not None:
        shape = x.bias.shape if x.form.value == BIASED.value else (blocks, *x.bias.shape)
        grad_bias = x.bias.new_empty(shape)
    launch(
        _attention_bwd_rows_kernel,
        (blocks, batch * heads),
        x.q.device,
        use,
        x.grad_out,
        x.grad_lse,
        x.grad_logits,
        x.grad_pinned,
        x.grad_square,
        x.grad_maps,
        x.slots,
        x.q,
        x.k,
        x.v,
        x.target_ids,
        x.pinned_ids,
        x.bias,
        x.key_bias,
        x.lse,
        x.plain_lse,
        x.logits,
        x.square,
        delta,
        pinned_delta,
        dq,
        grad_bias,
        *x.layout(),
        x.scale,
        x.bias_scale,
        x.map_weight,
        *x.basis,
        **x.constants(),
    )
    return grad_bias if grad_bias is None or x.form.value == BIASED.value else _summed(grad_bias, grad_bias.dtype)


def _columns(
    x: _Pass, delta: Tensor | None, pinned_delta: Tensor | None, with_k: bool, with_v: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dk and dv, as far as wanted; dk needs the row terms."""
    if with_v and x.grad_out is None:
        return _columns(x, delta, pinned_delta, with_k, False)[0], x.v.new_zeros(x.v.shape)
    if not (with_k or with_v):
        return None, None
    batch, heads, tokens, _ = x.k.shape
    # Targets and pinned columns, few and with more to compute, are a launch of their own; the only one where nothing
    # but their logits has a gradient.
    free = any(grad is not None for grad in (x.grad_out, x.grad_lse, x.grad_square, x.grad_maps))
    ordinary, special = x.config("attention_bwd_columns", tokens), x.config("attention_bwd_special", tokens)
    programs = ordinary.pop("PROGRAMS")
    # Rows are split evenly, into whole blocks of both.
    block = max(ordinary["BLOCK_M"], special["BLOCK_M"]) if x.special else ordinary["BLOCK_M"]
    blocks = ceil_div(x.q.shape[2], block)
    parts = ceil_div(programs, ceil_div(tokens, ordinary["BLOCK_N"]) * batch * heads)
    rows_each = ceil_div(blocks, min(blocks, parts)) * block
    splits = ceil_div(x.q.shape[2], rows_each)
    dtype = x.q.dtype if splits == 1 else torch.float32
    allocate = x.q.new_empty if free else x.q.new_zeros
    dk, dv = (allocate(splits, *x.k.shape, dtype=dtype) if wanted else None for wanted in (with_k, with_v))
    tiles = [(False, tokens, ordinary)] if free else []
    if x.special:
        tiles.append((True, x.special, special))
    for is_special, columns, use in tiles:
        launch(
            _attention_bwd_columns_kernel,
            (ceil_div(columns, use["BLOCK_N"]) * splits, batch * heads),
            x.q.device,
            use,
            x.grad_out,
            x.grad_logits,
            x.grad_pinned,
            x.grad_square,
            x.grad_maps,
            x.slots,
            x.q,
            x.k,
            x.v,
            x.target_ids,
            x.pinned_ids,
            x.bias,
            x.key_bias,
            x.lse,
            x.plain_lse,
            x.square,
            delta,
            pinned_delta,
            dk,
            dv,
            *x.layout(),
            splits,
            rows_each // use["BLOCK_M"],
            x.scale,
            x.bias_scale,
            x.map_weight,
            *x.basis,
            SPECIAL=is_special,
            **x.constants(),
        )
    return None if dk is None else _summed(dk, x.k.dtype), None if dv is None else _summed(dv, x.v.dtype)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0).to(dtype)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def attention_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    scale: float,
    lse: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv in the dtype of q, contiguous; None for each that is not `needed`."""
    given = _Pass(
        PLAIN,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        scale,
        lse.contiguous(),
        torch.zeros_like(q) if grad_out is None else unit_stride(grad_out),
        _flat(grad_lse),
        key_bias=_flat(key_bias),
    )
    return _backward(given, [*needed, False])[:3]


def attention_with_maps_backward(
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
    lse: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv in the dtype of q, contiguous; None for each that is not `needed`. `slots` as in
    attention_with_maps.py."""
    given = _Pass(
        PLAIN,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        scale,
        lse.contiguous(),
        None if grad_out is None else unit_stride(grad_out),
        grad_maps=_flat(grad_maps),
        slots=slots,
        key_bias=_flat(key_bias),
    )
    return _backward(given, [*needed, False])[:3]


def target_statistics_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_logits: Tensor | None,
    grad_square: Tensor | None,
    grad_pinned: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    with_square: bool,
    rest_lse: Tensor,
    logits: Tensor,
    square: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv in the dtype of q, contiguous; None for each that is not `needed`. The gradients of a square that
    was not asked for, and of logits of no pinned tokens, may be empty."""
    lse = rest_lse.contiguous()
    with_square = with_square and grad_square is not None
    grad_pinned = grad_pinned if pinned_ids.shape[-1] else None
    given = _Pass(
        STATISTICS,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        scale,
        lse,
        None if grad_out is None else unit_stride(grad_out.to(q.dtype)),
        _flat(grad_lse),
        target_ids,
        # Pinned columns are ordinary ones but for the gradient by their logits.
        pinned_ids if grad_pinned is not None else pinned_ids[..., :0],
        plain_lse=torch.empty_like(lse) if with_square else None,
        logits=logits.contiguous() if with_square else None,
        grad_logits=_flat(grad_logits),
        grad_pinned=_flat(grad_pinned),
        square=_flat(square) if with_square else None,
        grad_square=_flat(grad_square) if with_square else None,
        key_bias=_flat(key_bias),
    )
    return _backward(given, [*needed, False])[:3]


def biased_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    bias_scale: float,
    width: int,
    axes: Sequence[float],
    lse: Tensor,
    plain_lse: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv in the dtype of q, and the float32 gradient of `bias`, which is as for `biased_attention`; contiguous,
    None for each that is not `needed`. `plain_lse` counts only where there are pinned columns."""
    basis = basis_of(bias, width, axes)
    given = _Pass(
        BIASED if basis is None else REGULATED,
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        scale,
        lse.contiguous(),
        unit_stride(grad_out),
        target_ids=target_ids,
        pinned_ids=pinned_ids,
        plain_lse=_flat(plain_lse) if pinned_ids.shape[-1] else None,
        bias=bias.contiguous(),
        key_bias=_flat(key_bias),
        bias_scale=bias_scale,
        basis=basis or NO_BASIS,
    )
    return _backward(given, needed)
