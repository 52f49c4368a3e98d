"""`target_statistics` by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import fake_gradients, gradients, only

_Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    with_square: bool,
) -> _Statistics:
    from ...kernels import attention as kernels

    rest_out, rest_lse, logits, square, pinned_logits = kernels.target_statistics(
        q, k, v, target_ids, pinned_ids, key_bias, scale, with_square
    )
    return rest_out, rest_lse, logits, rest_lse.new_empty(0) if square is None else square, pinned_logits


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    with_square: bool,
) -> _Statistics:
    batch, heads, image_tokens, _ = q.shape
    rows = q.new_empty(batch, heads, image_tokens, dtype=torch.float32)
    columns = (
        rows.new_empty(batch, heads, target_ids.shape[-1], image_tokens),
        rows.new_empty(batch, heads, pinned_ids.shape[-1], image_tokens),
    )
    square = torch.empty_like(rows) if with_square else rows.new_empty(0)
    return rows.new_empty(q.shape), rows, columns[0], square, columns[1]


def _given(x: Tensor | None) -> Tensor | None:
    """None for what is empty: a square that was not asked for, logits of no pinned tokens; and for their gradients, of
    which torch.compile makes zeros."""
    return x if x is not None and x.numel() else None


def _backward(*arguments: Any) -> list[Tensor]:
    from ...kernels import attention_backward as kernels

    *grads, q, k, v, target_ids, pinned_ids, key_bias, rest_lse, logits, square, scale, needed = arguments
    found = kernels.target_statistics_backward(
        *map(_given, grads), q, k, v, target_ids, pinned_ids, key_bias, rest_lse, logits, _given(square), scale, needed
    )
    return gradients(found, (q, k, v))


_forward_op = opaque(
    "target_statistics_triton(Tensor q, Tensor k, Tensor v, Tensor target_ids, Tensor pinned_ids, "
    "Tensor? key_bias, float scale, bool with_square) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
_backward_op = opaque(
    "target_statistics_triton_backward(Tensor? grad_out, Tensor? grad_lse, Tensor? grad_logits, Tensor? grad_square, "
    "Tensor? grad_pinned, Tensor q, Tensor k, Tensor v, Tensor target_ids, Tensor pinned_ids, "
    "Tensor? key_bias, Tensor rest_lse, Tensor logits, Tensor square, float scale, bool[] needed) -> Tensor[]",
    _backward,
    lambda *arguments: fake_gradients(list(arguments[5:8]), arguments[-1]),
)


class _TargetStatistics(Function):
    @staticmethod
    def forward(*arguments: Any) -> _Statistics:
        return _forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Statistics) -> None:
        *tensors, ctx.scale, _ = inputs
        ctx.save_for_backward(*tensors, *output[1:4])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(x is None for x in grads):
            return (None,) * 8
        needed = list(ctx.needs_input_grad[:3])
        return *only(needed, _backward_op(*grads, *ctx.saved_tensors, ctx.scale, needed)), *[None] * 5


def target_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    target_ids: Tensor,
    pinned_ids: Tensor,
    key_bias: Tensor | None,
    scale: float,
    with_square: bool,
) -> _Statistics:
    """rest_out, rest_lse, logits, rest_square (empty unless asked for) and pinned_logits, all float32."""
    run = _TargetStatistics.apply if differentiated(q, k, v) else _forward_op
    return run(q, k, v, target_ids, pinned_ids, key_bias, scale, with_square)
