"""What a comparison is, and what the registered operations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl_fast import _impl, ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.layers import Inputs, Layer

# Of the norm. Rounding the attention's weights to half precision makes about a third of an epsilon.
TOLERANCES = {x: 2 * torch.finfo(x).eps for x in (torch.float16, torch.bfloat16)} | {torch.float32: 1e-5}


class Contender(NamedTuple):
    """`build` makes what is timed. `checked`: its result must be the comparison's truth; others are there for scale.
    `compiles`: torch.compile takes many seconds for it."""

    build: Callable[[], Run]
    checked: bool = True
    compiles: bool = False


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape. `seen` takes from a result what must equal `truth`, which is of float64. `check`
    raises ValueError where what `truth` cannot say of a result is wrong.

    `moved`: the bytes of inputs and outputs, each once. `flops`: what the algebra needs, whichever form does it: 2 for
    every multiplication and addition of its matrix products and convolutions, forward and, where gradients are asked
    for, backward. A product that a form repeats to save memory counts once; exponentials, sums and other work by
    element do not count, so that an operation of nothing else has 0.
    """

    op: str
    layer: Layer
    dtype: torch.dtype
    contenders: dict[str, Contender]
    truth: tuple[Tensor, ...]
    tolerance: float
    moved: int
    flops: int
    seen: Callable[[Any], tuple[Tensor, ...]]
    check: Callable[[Any], None] | None = None

    def errors(self, result: Any) -> tuple[float, float]:
        """The largest error and the largest relative error of a norm against `truth`; NaN where there is one.

        Raises:
            ValueError: `check` says that the result is wrong.
        """
        if self.check is not None:
            self.check(result)
        pairs = list(zip(self.seen(result), self.truth, strict=True))
        largest = torch.stack([(x.double() - y).abs().amax() for x, y in pairs]).amax()
        relative = torch.stack([(x.double() - y).norm() / y.norm() for x, y in pairs]).amax()
        return float(largest), float(relative)

    def judge(self, relative: float) -> None:
        """Raise ValueError unless a relative error is within the tolerance."""
        if not relative <= self.tolerance:
            raise ValueError(f"off by {relative:.2g} of the norm, allowed {self.tolerance:.2g}")


Build = Callable[[Inputs, Layer, torch.dtype, rivals.Compile], Comparison]


def ours(device: torch.device) -> str:
    """The implementation that competes there: the kernels on a GPU or in Triton's interpreter, else `eager`."""
    return "triton" if device.type == "cuda" or _impl.INTERPRETED else "eager"


def impls(device: torch.device) -> tuple[str, ...]:
    """Ours, and `eager` where that is another one."""
    return tuple(dict.fromkeys((ours(device), "eager")))


def ready(run: Run) -> Contender:
    return Contender(lambda: run)


def implementations(function: Callable[..., Any], device: torch.device) -> dict[str, Contender]:
    return {name: ready(partial(function, impl=name)) for name in impls(device)}


def plain(x: Inputs) -> Contender:
    """Attention without control, for scale."""
    return Contender(lambda: partial(ops.attention, *x[:3], impl=ours(x.q.device)), checked=False)


def first(result: Any) -> tuple[Tensor, ...]:
    return (result[0] if isinstance(result, tuple) else result,)


def size(*tensors: Tensor | None) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def products(layer: Layer, count: int = 1, columns: int | None = None) -> int:
    """FLOPs of `count` products of [M,d] and [d,N], or those of so many `columns` of N, per sample and head."""
    width = layer.tokens if columns is None else columns
    return count * 2 * layer.batch * layer.heads * layer.image_tokens * width * layer.width


def spanning(layer: Layer) -> int:
    """FLOPs of the bias S [B,H,T,M] from its weights theta [B,H,T,r_y,r_x], as two products."""
    along_y, along_x = ops.basis_shape(layer.grid)
    each = 2 * layer.grid[1] * along_y * (along_x + layer.grid[0])
    return layer.batch * layer.heads * layer.targets * each


def wide(x: Inputs) -> Inputs:
    return Inputs(*(t.double() if t.is_floating_point() else t for t in x))


def upstream(x: Inputs) -> Tensor:
    """The output's gradient: normal numbers in its dtype."""
    generator = torch.Generator(x.q.device).manual_seed(1)
    return torch.randn(x.q.shape, generator=generator, device=x.q.device).to(x.q.dtype)


def trained(leaves: Iterable[Tensor], function: Callable[..., Any], grad: Any) -> Run:
    """Forward and backward: the gradients of `function(*leaves)` by all of them."""
    leaves = [x.detach().requires_grad_() for x in leaves]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    return run
