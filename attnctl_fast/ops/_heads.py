"""Keys and values with fewer heads than the queries: each of theirs is that of a group of heads that stand together.

A group becomes a sample of its own, with its queries' heads and the one of its keys, so that every form of every
operation takes it as it is. Nothing is repeated in memory: the keys' head has a stride of zero. What autograd makes of
that is the sum of the heads' gradients, in a fixed order. All are views but for several samples whose heads lie within
their tokens, `[B,M,H,d]`: of these, queries, keys and values are copied, each as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Grouped:
    """The groups of one call: what queries `[B,H,..]` and keys `[B,K,..]` have as `[B*K,H/K,..]`; None stays None."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.batch, self.groups = k.shape[:2]
        self._each = q.shape[1] // self.groups

    def queries(self, x: Any) -> Any:
        """Return what every head of the queries has, `[B,H,..]`."""
        return None if x is None else x.unflatten(1, (self.groups, self._each)).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """Return keys or values `[B,K,N,d]`."""
        return x.flatten(0, 1).unsqueeze(1).expand(-1, self._each, -1, -1)

    def samples(self, x: Any) -> Any:
        """Return what every sample has, `[B,..]`; ids `[T]` are everyone's."""
        return x if x is None or x.ndim == 1 else x.repeat_interleave(self.groups, 0)

    def whole(self, x: Any) -> Any:
        """Undo `queries`."""
        return None if x is None else x.unflatten(0, (self.batch, self.groups)).flatten(1, 2)

    def of_keys(self, x: Tensor) -> Tensor:
        """Return the sum over every group of what its heads have, `[B,K,..]`."""
        return x.sum(1).unflatten(0, (self.batch, self.groups))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over the groups of what they have, `[B,..]`."""
        return x.unflatten(0, (self.batch, self.groups)).mean(1)
