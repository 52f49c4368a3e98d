"""The objective of attention regulation in closed form (MATH.md section 1), shared by `regulation_loss` and `regulate`.

Everything here works on `n = B*H` rows: `probabilities` [n,T+1,M] is the softmax over the targets' logits and, last,
the logsumexp of all other columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OBJECTIVES = ("official", "paper")
DEFAULT_PENALTY = {"official": 0.09, "paper": 0.1}
DEFAULT_MASS_WEIGHT = 80.0


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
        return cls(name, float(quantile), float(level), mass, float(mass_weight), float(penalty))

    @property
    def terms(self) -> tuple[float, float, float | None, float, float]:
        return self.quantile, self.level, self.mass, self.mass_weight, self.penalty


class Weights(NamedTuple):
    """Per row and target: its share of the means (zero where padded) [n,T], and the aim of its mean attention [n,1]."""

    share: Tensor
    mass: Tensor

    @classmethod
    def of(cls, logits: Tensor, objective: Objective) -> Weights:
        real = (logits.amax(-1) > -torch.inf).to(logits.dtype)
        count = real.sum(-1, keepdim=True).clamp(min=1)
        mass = (0.2 * count).clamp(max=1) / count if objective.mass is None else torch.full_like(count, objective.mass)
        return cls(real / count, mass)


class Measure(NamedTuple):
    """Quantile and mean of the targets' maps [n,T]; where the quantile's two order statistics sit [n,T,2], and their
    weights [2]."""

    high: Tensor
    mean: Tensor
    index: Tensor
    fraction: Tensor


def _order_statistics(maps: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Values and indices [n,T,2] of the elements of rank `rank` and `rank + 1` (counted upwards from 0)."""
    size = maps.shape[-1]
    last = min(rank + 1, size - 1)
    if maps.device.type != "cpu":
        values, index = maps.topk(size - rank, sorted=True)
        keep = [-1, -1 - (last - rank)]
        return values[..., keep], index[..., keep]
    # numpy's partition is vectorised: 3 to 5 times faster than torch.topk here.
    array = maps.numpy()
    parts = np.partition(array, rank, axis=-1)
    lower = parts[..., rank : rank + 1]
    upper = parts[..., rank + 1 :].min(-1, keepdims=True) if last > rank else lower
    index = np.stack([(array == lower).argmax(-1), (array == upper).argmax(-1)], -1)
    return torch.from_numpy(np.concatenate([lower, upper], -1)), torch.from_numpy(index)


def measure(probabilities: Tensor, quantile: float) -> Measure:
    """The linearly interpolated quantile (as torch.quantile) and the mean of every target's map."""
    maps = probabilities[:, :-1]
    position = quantile * (maps.shape[-1] - 1)
    rank = int(position)
    values, index = _order_statistics(maps, rank)
    fraction = values.new_tensor([1 - (position - rank), position - rank])
    return Measure(values @ fraction, maps.mean(-1), index, fraction)


def loss_of(high: Tensor, mean: Tensor, weights: Weights, objective: Objective) -> Tensor:
    """The quantile and mass terms [.., n] from quantiles and means [.., n, T]."""
    quantile_term = (weights.share * (high - objective.level) ** 2).sum(-1)
    return quantile_term + objective.mass_weight * (weights.share * (mean - weights.mass) ** 2).sum(-1)


def attention_gradient_(out: Tensor, measured: Measure, weights: Weights, objective: Objective) -> Tensor:
    """Write d loss_of / d probabilities into `out` [n,T+1,M], whose last row (the rest) stays as it is."""
    maps = out[:, :-1]
    dense = (2 * objective.mass_weight / maps.shape[-1]) * weights.share * (measured.mean - weights.mass)
    maps.copy_(dense.unsqueeze(-1).expand_as(maps))
    sparse = (2 * weights.share * (measured.high - objective.level)).unsqueeze(-1) * measured.fraction
    maps.scatter_add_(-1, measured.index, sparse)
    return out


class Distance(NamedTuple):
    """The paper's ||A' - A|| over all columns, [n], from the rows that change: the targets, and the rest as a whole.

    Off the targets A' = rho A, so the rest adds (P' - P)^2 kappa with P the rest's probability and kappa the sum of
    squares of the softmax within the rest.
    """

    plain: Tensor
    kappa: Tensor

    @classmethod
    def of(cls, plain: Tensor, rest_square: Tensor) -> Distance:
        rest = plain[:, -1]
        positive = rest > 0
        return cls(plain, torch.where(positive, rest_square / torch.where(positive, rest, 1.0).square(), 0.0))

    def value(self, probabilities: Tensor) -> Tensor:
        change = (probabilities - self.plain).square()
        return (change[:, :-1].sum((-1, -2)) + (change[:, -1] * self.kappa).sum(-1)).sqrt()

    def gradient(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """d value / d probabilities [n,T+1,M]; zero where the distance is zero."""
        change = probabilities - self.plain
        change[:, -1] *= self.kappa
        return change / torch.where(value > 0, value, torch.inf)[:, None, None]


def softmax_backward(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """d loss / d logits of the softmax over the targets and the rest, [n,T+1,M]."""
    return torch._softmax_backward_data(gradient, probabilities, 1, probabilities.dtype)
