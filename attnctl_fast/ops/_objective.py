"""The objective of attention regulation in closed form (MATH.md section 1), shared by `regulation_loss` and `regulate`.

It is written once for numpy arrays and torch tensors: on a CPU these small operations cost what their calls cost, and a
numpy call costs a third of a torch call; elsewhere torch runs them on the device, without synchronisation.

Everything works on `n = B*H` rows. `probabilities` [n,T+1,M] is the softmax over the targets' logits and, last, the
logsumexp of all other columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .._validate import KERNEL_COLUMNS, check_kernel_dtype
from ..reference import NO_COLUMNS

Array: TypeAlias = Any

OBJECTIVES = ("official", "paper")
DEFAULT_PENALTY = {"official": 0.09, "paper": 0.1}
DEFAULT_MASS_WEIGHT = 80.0


# Of the Triton kernels, which hold a map in one program.
KERNEL_TOKENS = 4096


def check_kernel_maps(logits: Tensor) -> None:
    """Raise ValueError unless the Triton kernels take maps [B,H,T,M] like these."""
    check_kernel_dtype(logits)
    targets, tokens = logits.shape[2:]
    for number, limit, name, remedy in (
        (tokens, KERNEL_TOKENS, "image tokens", "choose a smaller layer"),
        (targets, KERNEL_COLUMNS, "targets", "name fewer"),
    ):
        if number > limit:
            raise ValueError(
                f"the Triton kernels regulate at most {limit} {name}, not {number}; {remedy}, or use impl='eager'"
            )


def namespace(x: Array) -> ModuleType:
    return np if isinstance(x, np.ndarray) else torch


def arrays(*tensors: Tensor | None) -> list[Array]:
    """Return the tensors themselves, or where they lie on a CPU, numpy views of them."""
    return [x if x is None or x.device.type != "cpu" else x.detach().numpy() for x in tensors]


def tensor(x: Array) -> Tensor:
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


@dataclass(frozen=True)
class Objective:
    """Checked hyper-parameters of the objective."""

    name: str
    quantile: float
    level: float
    mass: float | None
    mass_weight: float
    penalty: float

    @classmethod
    def checked(
        cls,
        name: str,
        quantile: float,
        level: float,
        mass: float | None,
        mass_weight: float | None,
        penalty: float | None,
        rest_square: Tensor | None,
    ) -> Objective:
        if name not in OBJECTIVES:
            raise ValueError(f"objective is {name!r}; it must be one of {', '.join(map(repr, OBJECTIVES))}")
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; it must be in [0, 1]")
        if name == "paper" and rest_square is None:
            raise ValueError("objective 'paper' needs stats.rest_square; call target_statistics(..., with_square=True)")
        mass_weight = DEFAULT_MASS_WEIGHT if mass_weight is None else mass_weight
        penalty = DEFAULT_PENALTY[name] if penalty is None else penalty
        mass = None if mass is None else float(mass)
        return cls(name, float(quantile), float(level), mass, float(mass_weight), float(penalty))

    @property
    def terms(self) -> tuple[float, float, float | None, float, float]:
        return self.quantile, self.level, self.mass, self.mass_weight, self.penalty


def joined(logits: Array, rest_lse: Array) -> Array:
    """Return the targets' logits [n,T,M] and, last, the rest's logsumexp [n,M]: [n,T+1,M].

    A logsumexp of no columns is finite there, for where no target is real either, -inf would be subtracted from itself.
    """
    xp = namespace(logits)
    return xp.concatenate([logits, xp.clip(rest_lse, NO_COLUMNS, None)[:, None]], 1)


def softmax(logits: Array, out: Array) -> Array:
    """Compute the softmax over the targets and the rest, dimension 1, into `out`."""
    xp = namespace(logits)
    xp.subtract(logits, xp.amax(logits, 1, keepdims=True), out=out)
    xp.exp(out, out=out)
    out /= out.sum(1, keepdims=True)
    return out


def softmax_backward_(gradient: Array, probabilities: Array) -> Array:
    """Turn the loss's gradient by the probabilities into that by the logits, in place."""
    gradient *= probabilities
    gradient -= gradient.sum(1, keepdims=True) * probabilities
    return gradient


class Measure(NamedTuple):
    """Quantile and mean of the targets' maps [n,T], and the flat places of the quantile's two order statistics."""

    high: Array
    mean: Array
    places: tuple[Array, Array]


class Terms:
    """The quantile and mass terms for one set of statistics, `logits` [n,T,M].

    A target whose logits are all -inf is padded and takes no part in the means.
    """

    def __init__(self, logits: Array, objective: Objective) -> None:
        xp = namespace(logits)
        rows, targets, size = logits.shape
        self.real = xp.amax(logits, 2) != -xp.inf
        real = xp.asarray(self.real, dtype=logits.dtype)
        count = xp.clip(real.sum(1, keepdims=True), 1, None)
        position = objective.quantile * (size - 1)
        self.objective = objective
        self.share = real / count
        self.mass = xp.clip(0.2 * count, None, 1) / count if objective.mass is None else objective.mass
        self._rank = int(position)
        self._fraction = position - self._rank
        self._size = size
        slope = 2 * self.share
        self._slopes = slope * (1 - self._fraction), slope * self._fraction
        self._dense_slope = (2 * objective.mass_weight / size) * self.share
        all_rows = rows * (targets + 1)
        row = np.arange(all_rows) if xp is np else torch.arange(all_rows, device=logits.device)
        self._first = row.reshape(rows, targets + 1)[:, :-1] * size

    def only_real(self, x: Array) -> Array:
        """Return `x` [n,T,..] with zeros for padded targets."""
        xp = namespace(x)
        return xp.where(self.real.reshape(*self.real.shape, *[1] * (x.ndim - 2)), x, xp.zeros_like(x))

    def measure(self, maps: Array) -> Measure:
        """Return the linearly interpolated quantile (as torch.quantile) and the mean of every map [n,T,M]."""
        (lower, lower_at), (upper, upper_at) = self._order_statistics(maps)
        high = lower + self._fraction * (upper - lower)
        return Measure(high, maps.sum(2) / self._size, (self._first + lower_at, self._first + upper_at))

    def _order_statistics(self, maps: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return value and place of the elements of rank `rank` and `rank + 1`, counted upwards from 0."""
        size, rank = self._size, self._rank
        following = min(rank + 1, size - 1)
        if namespace(maps) is torch:
            values, index = maps.topk(size - rank, sorted=True)
            after = -1 - (following - rank)
            return (values[..., -1], index[..., -1]), (values[..., after], index[..., after])
        # Both are vectorised, 3 to 5 times faster than torch.topk; up to 256 elements numpy sorts by a network.
        if size <= 256:
            parts = np.sort(maps, axis=2)
            upper = parts[..., following]
        else:
            parts = np.partition(maps, rank, axis=2)
            upper = parts[..., following:].min(2)
        lower = parts[..., rank]
        return tuple((value, (maps == value[..., None]).argmax(2)) for value in (lower, upper))  # type: ignore[return-value]

    def loss(self, high: Array, mean: Array) -> Array:
        """Return the two terms [.., n] from quantiles and means [.., n, T]."""
        quantile_term = (self.share * (high - self.objective.level) ** 2).sum(-1)
        return quantile_term + self.objective.mass_weight * (self.share * (mean - self.mass) ** 2).sum(-1)

    def gradient(self, measured: Measure, out: Array) -> Array:
        """Write the terms' gradient by the probabilities into `out` [n,T+1,M]; it is zero for the rest."""
        out[:, -1] = 0
        out[:, :-1] = (self._dense_slope * (measured.mean - self.mass))[..., None]
        flat = out.reshape(-1)
        above = measured.high - self.objective.level
        for place, slope in zip(measured.places, self._slopes, strict=True):
            flat[place] += slope * above
        return out


class Distance(NamedTuple):
    """The paper's ||A' - A|| over all columns, [n], from the rows that change: the targets, and the rest as a whole.

    Off the targets A' = rho A, so the rest adds (P' - P)^2 kappa with P the rest's probability and kappa the sum of
    squares of the softmax within the rest.
    """

    plain: Array
    kappa: Array

    @classmethod
    def of(cls, plain: Array, rest_square: Array) -> Distance:
        xp = namespace(plain)
        rest = plain[:, -1]
        return cls(plain, xp.where(rest > 0, rest_square / xp.where(rest > 0, rest, xp.ones_like(rest)) ** 2, 0.0))

    def value(self, probabilities: Array) -> Array:
        change = (probabilities - self.plain) ** 2
        change[:, -1] *= self.kappa
        return change.sum((1, 2)) ** 0.5

    def gradient(self, probabilities: Array, value: Array) -> Array:
        """Return d value / d probabilities [n,T+1,M]; zero where the distance is zero."""
        change = probabilities - self.plain
        change[:, -1] *= self.kappa
        return change * reciprocal(value)[:, None, None]


def reciprocal(x: Array) -> Array:
    """Return 1/x, and 0 where x is 0."""
    xp = namespace(x)
    return xp.where(x > 0, 1 / xp.where(x > 0, x, xp.ones_like(x)), xp.zeros_like(x))
