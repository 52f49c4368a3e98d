"""Registration with torch.library."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.autograd import Function

from .._observed import observed
from .._validate import wide_dtype

NAMESPACE = "attnctl_fast"
# A map [B,H,M,N] of so many numbers (64 MiB in float32) the eager forms may hold on a CPU, where that is faster.
LARGEST_MAP = 1 << 24
_library = torch.library.Library(NAMESPACE, "DEF")

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """Run the function without autocast, which would round the logits and statistics to half precision.

    The operations choose their own precision.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run  # type: ignore[return-value]


def composite(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, made of differentiable torch operations, as an operation.

    Autograd, fake tensors and torch.compile see through it.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast(function), "CompositeImplicitAutograd")
    return _unless_observed(getattr(getattr(torch.ops, NAMESPACE), name), function)


def opaque(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function`, which launches kernels, as one operation without a derivative, with the shapes `fake` gives.

    Its derivative is an autograd.Function around it: a formula registered with the operation would cost every call
    some 20 microseconds of host time, with or without gradients. Where nobody would see the operation, the function
    that is returned calls `function` itself: PyTorch's dispatcher takes 4 to 12 microseconds.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, without_autocast(function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return _unless_observed(getattr(getattr(torch.ops, NAMESPACE), name), function)


def _unless_observed(operation: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls the operation where somebody would see it, and elsewhere the function that it runs.

    The operation turns autocast off as well.
    """
    autocast = torch._C._is_any_autocast_enabled

    def run(*values: Any) -> Any:
        return operation(*values) if autocast() or observed(values) else function(*values)

    return run


class _Once(Function):
    """Gradients passed on, which raise where they are differentiated.

    Its inputs: how many gradients, these, and what they depend on.
    """

    @staticmethod
    def forward(count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "the gradients of this operation have no derivative of their own; use impl='reference' where one is needed"
        )


def once_differentiable(
    backward: Callable[..., tuple[Any, ...]], linear: bool = False
) -> Callable[..., tuple[Any, ...]]:
    """Make the second derivative of an autograd.Function's backward raise.

    The function must save the tensors that its gradients depend on, none of them where it is `linear`. PyTorch's
    decorator of this name lets the second derivative be wrong unless the gradients given depend on inputs.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        depends_on = grads if linear else (*ctx.saved_tensors, *grads)
        causes = [x for x in depends_on if x is not None and x.requires_grad]
        made = [x for x in found if x is not None]
        if not causes or not made:
            return found
        passed = iter(_Once.apply(len(made), *made, *causes))
        return tuple(x if x is None else next(passed) for x in found)

    return run


def differentiable(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[torch.Tensor | None]],
    *,
    leaves: int,
    results: int = 1,
    saves: Sequence[int] = (),
    reach: Sequence[Sequence[int]] | None = None,
    keeps: bool = False,
    linear: bool = False,
) -> Callable[..., Any]:
    """Register `forward` and `backward` as opaque operations, `<name>` and `<name>_backward`.

    Returns a function that runs the first, records the second for autograd where any leaf requires a gradient, and
    gives the results.

    Args:
        schema: of `<name>`, its tensors first. That of `<name>_backward` follows from it: the gradients of the results,
            None where there is none; all arguments; the outputs that are saved; and which leaves need a gradient.
        forward: makes the outputs.
        fake: their shapes.
        backward: takes what `<name>_backward` does and makes the gradients of the leaves, contiguous and in their
            dtype; None for one that is not needed.
        leaves: how many of the first arguments have a gradient.
        results: how many of the first outputs are returned, and have one.
        saves: which outputs `backward` reads.
        reach: for each leaf, the results that depend on it; None: all on all.
        keeps: whether the operation takes one more argument, `bool keep`: to make what only `saves` is for.
        linear: whether the gradients do not depend on the inputs, which are then read for their shapes and dtypes only.
    """
    name, _, rest = schema.partition("(")
    arguments, _, returned = rest.rpartition(") -> ")
    tensors = sum(argument.strip().startswith("Tensor") for argument in arguments.split(","))
    single = returned == "Tensor"
    whole = single or returned.count("Tensor") == results
    reached = [tuple(range(results))] * leaves if reach is None else reach
    on, off = ((True,), (False,)) if keeps else ((), ())
    given = [f"Tensor? grad_{i}" for i in range(results)]
    kept = [f"Tensor saved_{i}" for i in saves]

    def gradients(*values: Any) -> list[torch.Tensor]:
        some = values[results]
        return [some.new_empty(0) if x is None else x for x in backward(*values)]

    def fake_gradients(*values: Any) -> list[torch.Tensor]:
        some, inputs = values[results], values[results : results + leaves]
        return [
            x.new_empty(x.shape) if wanted and any(values[i] is not None for i in of_results) else some.new_empty(0)
            for x, wanted, of_results in zip(inputs, values[-1], reached, strict=True)
        ]

    forward_op = opaque(f"{name}({arguments}{', bool keep' if keeps else ''}) -> {returned}", forward, fake)
    operation, autocast = getattr(getattr(torch.ops, NAMESPACE), name), torch._C._is_any_autocast_enabled
    backward_op = opaque(
        f"{name}_backward({', '.join([*given, arguments, *kept])}, bool[] needed) -> Tensor[]",
        gradients,
        fake_gradients,
    )

    def run_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        nothing = (None,) * (tensors + len(ctx.settings))
        if all(x is None for x in grads[:results]):
            return nothing
        saved = ctx.saved_tensors
        needed = [
            wanted and any(grads[i] is not None for i in of_results)
            for wanted, of_results in zip(ctx.needs_input_grad, reached, strict=False)
        ]
        found = backward_op(*grads[:results], *saved[:tensors], *ctx.settings, *saved[tensors:], needed)
        return *(x if wanted else None for x, wanted in zip(found, needed, strict=True)), *nothing[leaves:]

    class Differentiated(Function):
        @staticmethod
        def forward(*values: Any) -> Any:
            return forward_op(*values, *on)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[:tensors], *(output[i] for i in saves))
            ctx.settings = inputs[tensors:]
            if not whole:
                ctx.mark_non_differentiable(*output[results:])
            ctx.set_materialize_grads(False)

        backward = staticmethod(once_differentiable(run_backward, linear))

    # Function.apply asks for the signature of `forward` every time, 40 microseconds of it, for the sake of transforms.
    bare = super(Function, Differentiated).apply

    def run(*values: Any) -> Any:
        if not differentiated(*values[:leaves]):
            # As `forward_op`, without another call.
            output = (operation if autocast() or observed(values) else forward)(*values, *off)
        else:
            output = (Differentiated.apply if observed(values) else bare)(*values)
        return output if whole else output[0] if results == 1 else output[:results]

    return run


def launcher(file: str, name: str) -> Callable[..., Any]:
    """Return the launcher `name` of kernels/`file`.py, imported when it is first called: Triton may be missing."""

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"...kernels.{file}", __name__), name)

    return lambda *arguments: found()(*arguments)


def made(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return `x` as an operation can: empty, and of the dtype of `like`, for None."""
    return like.new_empty(0) if x is None else x


def widened(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return tensors of one dtype in float32, or as they are where that is as wide."""
    wide = wide_dtype(tensors[0].dtype)
    return tensors if tensors[0].dtype == wide else [x.to(wide) for x in tensors]


def may_hold_map(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return whether the eager forms may hold the map of these queries and keys."""
    return may_hold_columns(q, k.shape[2])


def may_hold_columns(q: torch.Tensor, columns: int) -> bool:
    """Return whether the eager forms may hold so many columns of the map of these queries."""
    return q.is_cpu and q.numel() // q.shape[3] * columns <= LARGEST_MAP


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd records what is done with any of `tensors`."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False
