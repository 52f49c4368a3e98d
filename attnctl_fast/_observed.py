"""Whether anybody but the caller sees what runs, so that no way around it, and nothing kept, may be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple))
# A compiler, a mode (fake tensors among them), a transform, a tracer, a profiler.
_WATCHERS = (
    torch.compiler.is_compiling,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
)


def observed(values: Iterable[Any] = ()) -> bool:
    """Return whether anybody sees what runs on `values`, or one of them is of a class of tensors with its own ways."""
    for watching in _WATCHERS:
        if watching():
            return True
    for x in values:  # noqa: SIM110 - any() takes twice the time
        if type(x) not in _PLAIN and isinstance(x, torch.Tensor):
            return True
    return False
