"""What competes with what, registered once: per operation the implementations and their rivals, what all must give, and
the bytes and FLOPs that it takes. The shapes are in shapes.py, the operations in registry_*.py by their family."""

from __future__ import annotations

import peers
import registry_attention
import registry_biased
import registry_context
import registry_maps
import registry_regulation
import torch
from registry_base import Build, Comparison, Contender, ours
from shapes import Layer, inputs
from timing import Run

__all__ = ["OPERATIONS", "Comparison", "Contender", "Run", "comparison", "ours"]

# An operation's name is its public function's, with what is differentiated behind it.
OPERATIONS: dict[str, Build] = {
    **registry_attention.OPERATIONS,
    **registry_regulation.OPERATIONS,
    **registry_biased.OPERATIONS,
    **registry_maps.OPERATIONS,
    **registry_context.OPERATIONS,
}


def comparison(
    operation: str, layer: Layer, dtype: torch.dtype, device: torch.device, compile: peers.Compile
) -> Comparison:
    """The comparison of an operation of `OPERATIONS` on random inputs. `compile`: torch.compile, or what stands for
    it."""
    return OPERATIONS[operation](inputs(layer, dtype, device), layer, dtype, compile)
