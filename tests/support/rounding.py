"""What the roundings of a computation may add up to, drawn at random and so the same on every machine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
# How many times a computation is repeated, and how seldom a row of a correct form may be refused.
DRAWS = 64
REFUSED = 1e-6
# Root mean square of one stochastic rounding to float32, relative to the number: the error of a number between two
# others has a variance of a sixth of their distance squared, and mantissas are spread evenly by their logarithm.
ONE_ROUNDING = 0.30 * torch.finfo(torch.float32).eps
# Sums are made in chains of so many terms, whose results are summed: tiles on a GPU, blocks in a BLAS.
CHAIN = 256
# These round several times; each time is drawn.
STEPWISE = {
    op: decomposition_table[op]
    for op in (
        aten._softmax.default,
        aten._softmax_backward_data.default,
        aten.logsumexp.default,
        aten.linalg_vector_norm.default,
        aten.addmm.default,
        aten.baddbmm.default,
    )
}
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
MEANS = (aten.mean.default, aten.mean.dim)
SUMS = (aten.sum.default, aten.sum.dim_IntList, *MEANS)


class RandomRounding(TorchDispatchMode):
    """Rounds every operation as a machine might: up or down at random, with the exact result as the mean.

    An operation is done in float64 and rounded to its own dtype (stochastic rounding: Connolly, Higham and Mary, SIAM
    J. Sci. Comput. 43, 2021), so what is exact in that dtype stays exact. A sum is first moved by what float32
    additions of its terms in random order, in chains of `CHAIN`, would make of it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in STEPWISE:
            with self:
                return STEPWISE[function](*args, **kwargs)
        if function.namespace not in ("aten", "prim", "prims"):
            raise TypeError(f"{function}: roundings are drawn for PyTorch's own operations only")
        if function.is_view:
            return function(*args, **kwargs)
        wide = tree_map(_widened, args)
        if function._schema.is_mutable:
            function(*wide, **kwargs)
            args[0].copy_(self._rounded(wide[0], args[0].dtype))
            return args[0]
        narrow = function(*args, **kwargs)
        exact = function(*wide, **{**kwargs, **({"dtype": torch.float64} if _is_float(kwargs.get("dtype")) else {})})
        if function in PRODUCTS or function in SUMS:
            exact = exact + self._summing(function, exact, wide, kwargs)
        return tree_map(lambda a, b: self._rounded(b, a.dtype) if isinstance(a, Tensor) else a, narrow, exact)

    def _summing(self, function: Any, total: Tensor, wide: Any, kwargs: Any) -> Tensor:
        """The error of sums, drawn."""
        if function in PRODUCTS:
            terms, share = wide[0].shape[-1], 1.0
            squares = function(*(x.square() for x in wide))
        else:
            terms = wide[0].numel() // max(total.numel(), 1)
            share = 1 / terms if function in MEANS else 1.0
            squares = function(wide[0].square(), *wide[1:], **kwargs) / share
        if terms < 2:
            return torch.zeros_like(total)
        square, chain = (total / share).square(), min(terms, CHAIN)
        # The sum of the squared sums of the chains, as it is on average when terms meet at random.
        chains = square * chain / terms + (1 - chain / terms) * (squares - square / terms)
        variance = _adding(chain, chains, squares)
        if terms > chain:
            variance = variance + _adding(terms / chain, square, chains)
        drawn = torch.randn(total.shape, generator=self._generator, dtype=torch.float64).to(total.device)
        return torch.where(total.isfinite(), share * ONE_ROUNDING * variance.sqrt() * drawn, 0.0)

    def _rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if not dtype.is_floating_point or dtype == torch.float64:
            return x.to(dtype)
        info = torch.finfo(dtype)
        exponent = torch.frexp(x).exponent - 1
        unit = torch.ldexp(torch.ones_like(x), exponent).clamp(min=info.tiny) * info.eps
        dither = torch.rand(x.shape, generator=self._generator, dtype=torch.float64).to(x.device) - 0.5
        return torch.where(x.isfinite(), x + unit * dither, x).to(dtype)


def _adding(terms: float, square: Tensor, squares: Tensor) -> Tensor:
    """The sum of the squares of all partial sums of n terms in random order, on average, from the square of their sum
    and the sum of their squares: the variance of the sum's error, in units of one rounding's."""
    return terms / 3 * square + terms / 6 * (squares - square / terms).clamp(min=0)


def _is_float(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


class Shared:
    """A computation of several results, each of which `floor` may ask for: drawn once for all of them.

    The n-th call of what `of` returns gives the n-th draw, for `floor` draws in one order.
    """

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute
        self._drawn: list[Any] = []

    def of(self, key: Any) -> Callable[[], Tensor]:
        places = itertools.count()

        def result() -> Tensor:
            place = next(places)
            if place == len(self._drawn):
                self._drawn.append(self._compute())
            return self._drawn[place][key]

        return result


def floor(
    compute: Callable[[], Tensor], truth: Tensor, enough: Callable[[Tensor], bool] = lambda found: False
) -> Tensor:
    """Return the error [..] that the roundings to nearest of `compute` [.., d] may add up to in a row by chance.

    Every draw adds to it. Where it is asked only whether it is `enough`, the draws end as soon as it is.

    By at most one row in a million (`REFUSED`) it is exceeded: a sum of independent errors passes x times its standard
    deviation with a probability below 2 exp(-x^2 / 2) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). Rounding to
    nearest has half the variance of the stochastic rounding that is drawn here.
    """
    square = torch.zeros_like(truth, dtype=torch.float64)
    times = math.sqrt(2 * math.log(2 * truth.shape[-1] / REFUSED))
    for seed in range(DRAWS):
        with RandomRounding(seed), sdpa_kernel(SDPBackend.MATH):
            drawn = compute()
        square += (drawn.double() - truth).square()
        found = times * (square / (2 * DRAWS)).sqrt().amax(-1)
        if enough(found):
            break
    return found
