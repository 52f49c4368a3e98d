"""`attention_with_maps` by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .._library import differentiated, once_differentiable, opaque
from .attention import fake_gradients, gradients, only


def slot_table(token_ids: Tensor, tokens: int) -> Tensor:
    """Which of `token_ids` [n] or [B,n] each of the context's tokens is, -1 for none: int32 [1 or B, tokens + 1], the
    last column for padded ids."""
    ids = token_ids if token_ids.ndim == 2 else token_ids.unsqueeze(0)
    table = torch.full((ids.shape[0], tokens + 1), -1, dtype=torch.int32, device=ids.device)
    slots = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device).expand_as(ids)
    return table.scatter_(1, torch.where(ids < 0, tokens, ids), slots)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from ...kernels import attention_maps as kernels

    return kernels.attention_with_maps(q, k, v, token_ids, slots, key_bias, per_head, scale)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    slots: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, image_tokens, _ = q.shape
    count = k.shape[2] if token_ids is None else token_ids.shape[-1]
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty(q.shape), lse.new_empty(batch, *([heads] if per_head else []), count, image_tokens), lse


def _backward(grad_out: Tensor | None, grad_maps: Tensor | None, *arguments: Any) -> list[Tensor]:
    from ...kernels import attention_backward as kernels

    return gradients(kernels.attention_with_maps_backward(grad_out, grad_maps, *arguments), arguments[:3])


_forward_op = opaque(
    "attention_with_maps_triton(Tensor q, Tensor k, Tensor v, Tensor? token_ids, Tensor? slots, Tensor? key_bias, "
    "bool per_head, float scale) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
_backward_op = opaque(
    "attention_with_maps_triton_backward(Tensor? grad_out, Tensor? grad_maps, Tensor q, Tensor k, Tensor v, "
    "Tensor? slots, Tensor? key_bias, Tensor lse, float scale, bool[] needed) -> Tensor[]",
    _backward,
    lambda grad_out, grad_maps, q, k, v, slots, key_bias, lse, scale, needed: fake_gradients([q, k, v], needed),
)


class _Function(Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, _, slots, key_bias, _, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, slots, key_bias, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_maps: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None and grad_maps is None:
            return (None,) * 8
        needed = list(ctx.needs_input_grad[:3])
        needed[2] = needed[2] and grad_out is not None  # no map depends on v
        found = _backward_op(grad_out, grad_maps, *ctx.saved_tensors, ctx.scale, needed)
        return *only(needed, found), *[None] * 5


def attention_with_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_ids: Tensor | None,
    key_bias: Tensor | None,
    per_head: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B,H,M,d] in q's dtype, and the maps, float32."""
    slots = None
    if token_ids is not None:
        slots = slot_table(token_ids, k.shape[2])
    run = _Function.apply if differentiated(q, k, v) else _forward_op
    return run(q, k, v, token_ids, slots, key_bias, per_head, scale)[:2]
