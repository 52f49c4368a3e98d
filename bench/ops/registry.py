"""What competes with what, registered once: per operation the implementations and their rivals, what all must give, and
the bytes and FLOPs that it takes. The shapes are in shapes.py, the operations in registry_*.py by their family."""

from __future__ import annotations

import torch

from bench.harness.timing import Run
from bench.ops import attention, biased, context, maps, regulation, rivals
from bench.ops.base import Build, Comparison, Contender, ours
from bench.ops.layers import Layer, inputs

__all__ = ["OPERATIONS", "Comparison", "Contender", "Run", "comparison", "ours"]

# An operation's name is its public function's, with what is differentiated behind it.
OPERATIONS: dict[str, Build] = {
    **attention.OPERATIONS,
    **regulation.OPERATIONS,
    **biased.OPERATIONS,
    **maps.OPERATIONS,
    **context.OPERATIONS,
}


def comparison(
    operation: str, layer: Layer, dtype: torch.dtype, device: torch.device, compile: rivals.Compile
) -> Comparison:
    """The comparison of an operation of `OPERATIONS` on random inputs. `compile`: torch.compile, or what stands for
    it."""
    return OPERATIONS[operation](inputs(layer, dtype, device), layer, dtype, compile)
