"""Registration with torch.library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "attnctl_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, made of differentiable torch operations, as an operation that autograd, fake tensors and
    torch.compile see through."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeImplicitAutograd")
    return getattr(getattr(torch.ops, NAMESPACE), name)
