"""What the declaration of an operation holds, and what is made of it: its results, its gradients, its comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl_fast import _impl, ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.inputs import Case, Tensors, qkv
from bench.ops.layers import Layer

# Of the norm. Rounding the attention's weights to half precision makes about a third of an epsilon.
TOLERANCES = {x: 2 * torch.finfo(x).eps for x in (torch.float16, torch.bfloat16)} | {torch.float32: 1e-5}
EDIT = ("target_ids", "pinned_ids")


class Contender(NamedTuple):
    """`build` makes what is timed. `checked`: its result must be the comparison's truth; others are there for scale.
    `compiles`: torch.compile takes many seconds for it."""

    build: Callable[[], Run]
    checked: bool = True
    compiles: bool = False


class Rival(NamedTuple):
    """What else computes an operation's results. bind: from inputs, what computes them; the rest as for `Contender`."""

    bind: Callable[[Tensors], Run]
    checked: bool = True
    compiles: bool = False


class Judge(NamedTuple):
    """How results are judged: what is taken from one, what that must be in float64, to which share of the norm, and
    what raises ValueError where the rest, which no truth can be compared with, is wrong."""

    seen: Callable[[Any], tuple[Tensor, ...]]
    truth: tuple[Tensor, ...]
    tolerance: float
    check: Callable[[Any], None] = lambda result: None

    def errors(self, result: Any) -> tuple[float, float]:
        """The largest error and the largest relative error of a norm against `truth`; NaN where there is one.

        Raises:
            ValueError: `check` says that the result is wrong.
        """
        self.check(result)
        pairs = list(zip(self.seen(result), self.truth, strict=True))
        largest = torch.stack([(x.double() - y).abs().amax() for x, y in pairs]).amax()
        relative = torch.stack([(x.double() - y).norm() / y.norm() for x, y in pairs]).amax()
        return float(largest), float(relative)

    def require(self, relative: float) -> None:
        """Raise ValueError unless a relative error is within the tolerance."""
        if not relative <= self.tolerance:
            raise ValueError(f"off by {relative:.2g} of the norm, allowed {self.tolerance:.2g}")


def no_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {}


@dataclass(frozen=True)
class Timing:
    """What is timed of an operation.

    flops: what the algebra needs, whichever form does it: 2 for every multiplication and addition of its matrix
        products and convolutions, forward and, where gradients are asked for, backward. A product that a form repeats
        to save memory counts once; exponentials, sums and other work by element do not count.
    leaves: the inputs to whose gradients it is timed; none for the forward pass.
    outputs: those that the gradients come from, or that are compared; None is all.
    also: inputs that only rivals need.
    options: of the case.
    unread: the bytes of its inputs that need not be read.
    judge: instead of a comparison with the textbook's results in float64.
    kernels: those that are tuned by it.
    """

    flops: Callable[[Case], int] = lambda case: 0
    rivals: Callable[[Case, Tensors, rivals.Compile], dict[str, Rival]] = no_rivals
    leaves: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: Callable[[Case], int] = lambda case: 0
    judge: Callable[[Case, Tensors], Judge] | None = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """One operation, declared once: for its timing, its checks against the textbook, its kernels' machine code.

    bind: makes of a case, its tensors and an implementation what computes the outputs.
    inputs: the names of the tensors that it reads.
    outputs: the names of its results.
    leaves: the inputs that all implementations have gradients by; more_leaves: those that all but the kernels have.
    timings: by the names that results are kept under.
    """

    bind: Callable[[Case, Tensors, str], Run]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    more_leaves: tuple[str, ...] = ()
    timings: Mapping[str, Timing] = field(default_factory=dict)

    def run(self, case: Case, impl: str, t: Tensors) -> Tensors:
        """Return the outputs by name, without those that there are none of."""
        return self.named(self.bind(case, t, impl)())

    def leaves_of(self, impl: str) -> tuple[str, ...]:
        return self.leaves if impl == "triton" else (*self.leaves, *self.more_leaves)

    def named(self, results: Any) -> Tensors:
        found = results if isinstance(results, (tuple, list)) else (results,)
        return {name: x for name, x in zip(self.outputs, found, strict=False) if x is not None}


def upstream(outputs: Tensors) -> Tensors:
    """Gradients of the outputs: normal numbers, none where an output is -inf and has no slope."""
    made = {}
    for seed, (name, x) in enumerate(outputs.items()):
        normal = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(20 + seed))
        made[name] = normal.to(x.device, x.dtype).masked_fill(x.isneginf(), 0.0)
    return made


def trained(operation: Operation, t: Tensors, leaves: Sequence[str], grads: Tensors, bind: Callable[..., Run]) -> Run:
    """Forward and backward: what gives the gradients of `leaves`, given those of the outputs of `bind(t)`."""
    inputs = {name: x.detach().requires_grad_(name in leaves) for name, x in t.items()}
    run, wanted = bind(inputs), [inputs[leaf] for leaf in leaves]

    def both() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            outputs = operation.named(run())
            given = [name for name in grads if outputs[name].requires_grad]
            return torch.autograd.grad([outputs[name] for name in given], wanted, [grads[name] for name in given])

    return both


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape. `moved`: the bytes of inputs and outputs, each once; `flops`: as of its `Timing`."""

    contenders: dict[str, Contender]
    judge: Judge
    moved: int
    flops: int

    def right(self, name: str, row: dict[str, Any]) -> Run:
        """Build a contender and run it once. Its errors are in `row`, also where they are too large.

        Raises:
            ValueError: its result is wrong.
            Exception: whatever it raises.
        """
        contender = self.contenders[name]
        run = contender.build()
        result = run()
        if contender.checked:
            row["max_error"], row["relative_error"] = self.judge.errors(result)
            self.judge.require(row["relative_error"])
        return run


class Timed(NamedTuple):
    """A timing of an operation on one layer."""

    operation: Operation
    timing: Timing
    case: Case
    tensors: Tensors
    compile: rivals.Compile

    def _wanted(self, outputs: Tensors) -> Tensors:
        names = self.timing.outputs
        return outputs if names is None else {name: x for name, x in outputs.items() if name in names}

    def form(self, bind: Callable[[Tensors], Run], t: Tensors | None = None, grads: Tensors | None = None) -> Run:
        """Return what is timed of `bind`: its results, or the gradients that the timing asks for."""
        t = self.tensors if t is None else t
        if not self.timing.leaves:
            return bind(t)
        if grads is None:
            grads = upstream(self._wanted(self.operation.run(self.case, "eager", t)))
        return trained(self.operation, t, self.timing.leaves, grads, bind)

    def ours(self, impl: str) -> Run:
        return self.form(self._bind(impl))

    def _bind(self, impl: str) -> Callable[[Tensors], Run]:
        return lambda t: self.operation.bind(self.case, t, impl)

    def comparison(self) -> Comparison:
        case, t, timing = self.case, self.tensors, self.timing
        outputs = self._wanted(self.operation.run(case, "eager", t))
        grads = upstream(outputs) if timing.leaves else {}
        contenders = {impl: Contender(partial(self.form, self._bind(impl), t, grads)) for impl in impls(case.device)}
        for rival, (bind, checked, compiles) in timing.rivals(case, t, self.compile).items():
            contenders[rival] = Contender(partial(self.form, bind, t, grads), checked, compiles)
        moved = size(*(t[x] for x in self.operation.inputs if x in t and x not in EDIT), *outputs.values())
        moved += size(*grads.values(), *(t[x] for x in timing.leaves)) - timing.unread(case)
        if timing.judge is not None:
            judge = timing.judge(case, t)
        else:
            exact = {x: y.double() for x, y in grads.items()}
            found = self.form(self._bind("reference"), wide(t), exact)()
            seen = tuple if timing.leaves else self._seen
            judge = Judge(seen, seen(found), TOLERANCES[case.dtype])
        return Comparison(contenders, judge, moved, timing.flops(case))

    def _seen(self, results: Any) -> tuple[Tensor, ...]:
        return tuple(self._wanted(self.operation.named(results)).values())


def row_of(op: str, layer: Layer, dtype: torch.dtype | str) -> dict[str, Any]:
    """What a row of an operation on a layer starts with."""
    short = str(dtype).removeprefix("torch.")
    return {"op": op, "model": layer.model, "shape": layer.sizes, "dtype": short}


def case_of(layer: Layer, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the inputs of a layer as its projections give them, with logits of about unit size and a bias of about the
    size that regulation finds."""
    case = Case(
        m=layer.image_tokens,
        n=layer.tokens,
        d=layer.width,
        dtype=dtype,
        ids=(layer.target_ids,),
        pinned=(layer.pinned_ids,),
        batch=layer.batch,
        heads=layer.heads,
        raised=1.0,
        strided=True,
        map_tokens=layer.map_tokens,
        steps=layer.steps,
        more=False,
        ragged=False,
        on=device,
    )
    if case.grid != layer.grid:
        raise ValueError(f"{layer.sizes} has a grid of {layer.grid}; add it to inputs.GRIDS")
    return case


def ours(device: torch.device) -> str:
    """The implementation that competes there: the kernels on a GPU or in Triton's interpreter, else `eager`."""
    return "triton" if device.type == "cuda" or _impl.INTERPRETED else "eager"


def impls(device: torch.device) -> tuple[str, ...]:
    """Ours, and `eager` where that is another one."""
    return tuple(dict.fromkeys((ours(device), "eager")))


def plain(case: Case) -> Rival:
    """Attention without control, for scale."""
    return Rival(lambda t: partial(ops.attention, *qkv(t), impl=ours(case.device)), checked=False)


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def products(case: Case, count: int = 1, columns: int | None = None) -> int:
    """FLOPs of `count` products of [M,d] and [d,N], or those of so many `columns` of N, per sample and head."""
    width = case.n if columns is None else columns
    return count * 2 * case.batch * case.heads * case.m * width * case.d


def spanning(case: Case) -> int:
    """FLOPs of the bias S [B,H,T,M] from its weights theta [B,H,T,r_y,r_x], as two products."""
    along_y, along_x = ops.basis_shape(case.grid)
    each = 2 * case.grid[1] * along_y * (along_x + case.grid[0])
    return case.batch * case.heads * len(case.ids[0]) * each


def wide(t: Tensors) -> Tensors:
    return {name: x.double() if x.is_floating_point() else x for name, x in t.items()}
