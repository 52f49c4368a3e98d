"""Registration with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import Function

NAMESPACE = "attnctl_fast"
# A map [B,H,M,N] of so many numbers (64 MiB in float32) the eager forms may hold on a CPU, where that is faster.
LARGEST_MAP = 1 << 24
_library = torch.library.Library(NAMESPACE, "DEF")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """The operations choose their own precision: autocast would round the logits and statistics to half."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run  # type: ignore[return-value]


def composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, made of differentiable torch operations, as an operation that autograd, fake tensors and
    torch.compile see through."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast(function), "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name)


def opaque(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, which launches kernels, as one operation without a derivative, with the shapes `fake` gives.

    Its derivative is an autograd.Function around it: a formula registered with the operation would cost every call
    some 20 microseconds of host time, with or without gradients.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name)


class _Once(Function):
    """Passes gradients on, and raises where they are differentiated. Its inputs: how many gradients, these, and what
    they depend on."""

    @staticmethod
    def forward(count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "the gradients of this operation have no derivative of their own; use impl='reference' where one is needed"
        )


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """For the backward of an autograd.Function, which must save the tensors that its gradients depend on: a second
    derivative raises. PyTorch's decorator of this name lets it be wrong unless the gradients given depend on inputs."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        causes = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        made = [x for x in found if x is not None]
        if not causes or not made:
            return found
        passed = iter(_Once.apply(len(made), *made, *causes))
        return tuple(x if x is None else next(passed) for x in found)

    return run


def may_hold_map(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the eager forms may hold the map of these queries and keys."""
    return q.device.type == "cpu" and q.shape[:3].numel() * k.shape[2] <= LARGEST_MAP


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is done with any of `tensors`."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
