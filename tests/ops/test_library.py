"""Registration: opcheck, gradcheck, torch.compile(fullgraph=True), fake tensors, for every declared operation."""

from __future__ import annotations

import functools
import itertools
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl_fast import ops
from attnctl_fast._validate import check_columns
from bench.ops.base import upstream, wide
from bench.ops.inputs import Case
from bench.ops.registry import DECLARED
from tests.support.marks import full
from tests.support.numerics import FAST, IMPLS, widest

PADDED = Case(24, 9, 8, ids=((3, 5), (4, -1)), pinned=((0, 8),), batch=2, map_tokens=4, sigma=1.0, steps=1)
# The logits of padding, -inf, have no finite differences.
REAL = replace(PADDED, ids=((3, 5), (4, 1)))
FORMS = [
    (name, keyed)
    for name, operation in DECLARED.items()
    for keyed in ((False, True) if "key_bias" in operation.inputs else (False,))
]
DIFFERENTIABLE = [form for form in FORMS if DECLARED[form[0]].leaves_of("eager")]


def made(name, impl, case, dtype=torch.float32):
    """What computes the results of an operation from its leaves, and those."""
    operation = DECLARED[name]
    t = case.tensors(operation.inputs)
    t = wide(t) if dtype == torch.float64 else t
    leaves = [x for x in operation.leaves_of(impl) if x in t]

    def function(*given):
        return tuple(operation.run(case, impl, {**t, **dict(zip(leaves, given, strict=True))}).values())

    return function, [t[x].detach().contiguous().requires_grad_() for x in leaves]


def test_ids_are_moved_to_their_device_once():
    """But never those of a trace, of fake tensors or of inference mode."""
    k = torch.zeros(1, 1, 9, 8)
    with FakeTensorMode():
        assert type(check_columns([3, 5], torch.zeros(1, 1, 9, 8))) is FakeTensor
    with torch.inference_mode():
        kept = check_columns([3, 5], k)
    assert type(kept) is torch.Tensor and not kept.is_inference() and kept.tolist() == [3, 5]
    assert check_columns((3, 5), k) is kept
    assert check_columns([[3, 5]], k).tolist() == [[3, 5]]
    elsewhere, ids = k.to("meta"), torch.tensor([3, 5])
    assert check_columns(ids, elsewhere) is check_columns([3, 5], elsewhere)


def test_an_operation_is_seen_by_all_who_look():
    """Elsewhere its function runs without PyTorch's dispatcher."""
    q = torch.ones(1, 1, 4, 8)
    with torch.profiler.profile() as profile:
        ops.attention(q, q, q)
    assert "attnctl_fast::attention" in {event.name for event in profile.events()}
    calls = []
    with Dispatched(calls):
        ops.attention(q, q, q)
    assert [name for name, _ in calls] == ["attention"]


class Functions(TorchFunctionMode):
    """Collects the registered operations that are called, composites as well, but not those of a backward pass."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if (name := getattr(function, "_qualified_op_name", "")).startswith("attnctl_fast::"):
            self.calls.append((name.partition("::")[2], args))
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Collects the registered operations of a backward pass."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "attnctl_fast":
            self.calls.append((function.name().partition("::")[2], args))
        return function(*args, **(kwargs or {}))


def kind(x):
    """What of an argument makes another case of an operation."""
    if isinstance(x, torch.Tensor):
        return x.ndim, x.numel() == 0
    return tuple(map(kind, x)) if isinstance(x, (list, tuple)) else x if isinstance(x, (str, bool)) else type(x)


def settled(x):
    """A number for every NaN: memory is that here where a kernel that is not run writes nothing."""
    if isinstance(x, torch.Tensor):
        return x.detach().masked_fill(x.isnan(), 8.0)  # a logsumexp that makes no weight large
    return type(x)(map(settled, x)) if isinstance(x, (list, tuple)) else x


@functools.cache
def calls(impl, strided):
    """By name, what the declared operations call with an implementation, forward and backward: one call of every kind.
    No kernel is run."""
    found = []
    if impl == "triton":
        from attnctl_fast.kernels._launch import recording
    for name, keyed in FORMS:
        operation = DECLARED[name]
        # As many rows and columns as all forms need.
        case = replace(PADDED, m=144, n=17, strided=strided, keyed=keyed)
        case = replace(case, dtype=torch.float16 if keyed else torch.float32)
        t = case.tensors(operation.inputs)
        leaves = [x for x in operation.leaves_of(impl) if x in t]
        with recording() if impl == "triton" else nullcontext():
            with Functions(found):
                operation.run(case, impl, t)
                results = operation.run(case, impl, {x: y.requires_grad_(x in leaves) for x, y in t.items()})
            given = upstream({x: y for x, y in results.items() if y.requires_grad})
            for wanted in dict.fromkeys((tuple(leaves), tuple(leaves[:1]))) if leaves else ():
                with Dispatched(found):
                    torch.autograd.grad(
                        [results[x] for x in given], [t[x] for x in wanted], list(given.values()), retain_graph=True
                    )
    kinds = {}
    for name, arguments in found:
        kinds.setdefault(name, {}).setdefault(kind(arguments), settled(arguments))
    return {name: list(each.values()) for name, each in kinds.items()}


def registered():
    schemas = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    return sorted(name for namespace, _, name in schemas if namespace == "attnctl_fast")


def of(name):
    """The implementation that an operation is of."""
    return next((impl for impl in ("reference", "triton") if f"_{impl}" in name), "eager")


def is_composite(name):
    """PyTorch itself makes the fake and the derivative of such a one."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"attnctl_fast::{name}", "CompositeImplicitAutograd")


# What a composite can be wrong in by itself, and any operation for other arguments than the first.
DECLARED_PARTS = ("test_schema", "test_faketensor")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", registered())
def test_opcheck(name, strided):
    found = calls(of(name), strided)[name]
    assert found, "no declared operation calls it"
    # Other kinds of calls lie otherwise in the tests of fake tensors.
    for place, given in enumerate(found[:1] if strided else found):
        whole = place == 0 and not strided and not is_composite(name)
        opcheck(getattr(torch.ops.attnctl_fast, name), given, **({} if whole else {"test_utils": DECLARED_PARTS}))


@pytest.mark.full
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", registered())
def test_everything_that_opcheck_knows(name):
    for given in calls(of(name), False)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), given)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize(("name", "keyed"), DIFFERENTIABLE)
def test_gradcheck(name, keyed, impl):
    assert gradcheck(*made(name, impl, replace(REAL, keyed=keyed), torch.float64), fast_mode=True)


def _grads(function, arguments):
    out = function(*arguments)
    total = sum(x.square().sum() for x in out if x.requires_grad)
    return out, torch.autograd.grad(total, arguments, allow_unused=True) if torch.is_tensor(total) else ()


def compiled(name, keyed, impl):
    """The kernels' graph with a key_bias has all that is in the one without."""
    less = impl == "reference" or (impl == "triton" and not keyed and "key_bias" in DECLARED[name].inputs)
    return full(name, keyed, impl) if less else (name, keyed, impl)


@pytest.mark.parametrize(
    ("name", "keyed", "impl"), [compiled(*form, impl) for form, impl in itertools.product(FORMS, IMPLS)]
)
def test_one_graph_under_compile(name, keyed, impl):
    function, arguments = made(name, impl, replace(REAL, keyed=keyed), widest(impl))
    torch.compiler.reset()
    graph = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(_grads(graph, arguments), _grads(function, arguments), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("name", "keyed"), DIFFERENTIABLE)
def test_second_derivatives_are_right_or_an_error(name, keyed, impl):
    """Never those of a gradient that is taken for a constant."""

    def second(function, arguments):
        total = sum(x.square().sum() for x in function(*arguments))
        first = torch.autograd.grad(total, arguments, create_graph=True, allow_unused=True)
        total = total + sum(x.square().sum() for x in first if x is not None)
        return torch.autograd.grad(total, arguments, allow_unused=True)

    case = replace(REAL, keyed=keyed)
    if not DECLARED[name].leaves_of(impl):
        pytest.skip("has no gradient")
    expected = second(*made(name, "reference", case, widest(impl)))
    try:
        ours = second(*made(name, impl, case, widest(impl)))
    except RuntimeError as error:
        assert "derivative of their own" in str(error) or "no autograd formula" in str(error), error
    else:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("strided", [False, True])
def test_compiled_with_inductor(impl, strided):
    t = replace(PADDED, strided=strided).tensors()
    q, k, v, bias = (t[x] for x in ("q", "k", "v", "bias"))

    def function(q, k, v, bias):
        edited = ops.biased_attention(q, k, v, bias, t["target_ids"], pinned_ids=t["pinned_ids"], impl=impl)
        return edited + 2 * ops.attention(q, k, v, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, bias), function(q, k, v, bias))


@pytest.mark.parametrize("impl", FAST)
def test_compile_takes_ids_as_a_sequence(impl):
    def function(*x):
        return ops.biased_attention(*x, [3, 5], pinned_ids=[0], impl=impl)

    t = PADDED.tensors()
    arguments = [t[x].nan_to_num() for x in ("q", "k", "v", "bias")]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize(("impl", "strided"), [full("reference", True), *itertools.product(FAST, [False, True])])
@pytest.mark.parametrize(("name", "keyed"), FORMS)
def test_fake_tensors_have_the_real_shapes(name, keyed, impl, strided):
    operation, case = DECLARED[name], replace(PADDED, keyed=keyed, strided=strided)
    t = case.tensors(operation.inputs)
    real = operation.run(case, impl, t)
    with FakeTensorMode() as mode:
        fake = operation.run(case, impl, {x: mode.from_tensor(y) for x, y in t.items()})
    assert list(fake) == list(real)
    for a, b in zip(fake.values(), real.values(), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
