"""Registration: opcheck, gradcheck, torch.compile(fullgraph=True), fake tensors, inference mode."""

from __future__ import annotations

import shutil

import pytest
import torch
from numerics import attention_inputs, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck

from attnctl_fast import ops

GRID = (4, 6)
IMPLS = ["reference", "eager"]
FLOAT64 = torch.float64


def inputs(dtype=torch.float32, grad=False, strided=True):
    q, k, v = attention_inputs(2, 2, 24, 9, 8, dtype, strided=strided)
    bias = randn(2, 2, 2, 24, dtype=dtype, seed=5)
    theta = randn(2, 2, 2, 2, dtype=dtype, seed=6).reshape(2, 2, 2, 1, 2)
    return [x.requires_grad_(grad) for x in (q, k, v, bias, theta)]


ids = torch.tensor([[3, 5], [4, -1]])
pins = torch.tensor([0, 8])
none = torch.empty(0, dtype=torch.int64)

LOSS = ("official", 0.9, 0.9, None, 80.0, 0.09)
SOLVER = (list(GRID), [1.0, 1.0], "official", 1.0, 3, 100.0, "sample")


def registered(grad: bool, strided: bool = True):
    """(operation, arguments) for everything in torch.ops.attnctl_fast."""
    q, k, v, bias, theta = inputs(grad=grad, strided=strided)
    with torch.no_grad():
        stats = ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=True)
    rest_out, rest_lse, logits, square, pinned = (x.requires_grad_(grad) for x in stats)
    merge = (rest_out, rest_lse, logits, pinned, v, bias, ids, pins)
    y = torch.rand(4, 1)
    x = torch.rand(6, 2)
    paper = ("paper", *LOSS[1:])
    solver = (logits.detach(), rest_lse.detach())
    return {
        "attention": [(q, k, v, none, 0.3), (q, k, v, ids, 0.3)],
        "attention_reference": [(q, k, v, ids, 0.3)],
        "attention_backward": [
            (torch.ones_like(q), g, *(t.detach() for t in (q, k, v, rest_out, rest_lse)), ids, 0.3, needed)
            for g, needed in ((None, [True, True, True]), (torch.ones(2, 2, 24), [True, False, True]))
        ],
        "target_logits": [(q, k, ids, 0.3), (q, k, pins, 0.3)],
        "target_logits_reference": [(q, k, ids, 0.3)],
        "rest_square_reference": [(q, k, ids, 0.3)],
        "merge_targets": [merge],
        "merge_targets_reference": [merge],
        "biased_attention": [(q, k, v, bias, ids, pins, 0.3)],
        "biased_attention_reference": [(q, k, v, bias, ids, pins, 0.3)],
        "gaussian_bias": [(theta, y, x)],
        "gaussian_bias_reference": [(theta, torch.rand(1, 2, 4, 6))],
        "regulation_loss": [
            (logits, rest_lse, None, bias, theta, *LOSS),
            (logits, rest_lse, square, bias, None, *paper),
        ],
        "regulation_loss_reference": [(logits, rest_lse, square, bias, theta, *paper)],
        "regulation_loss_backward": [
            (torch.ones(2, 2), *(t if t is None else t.detach() for t in arguments), *terms, of_statistics)
            for arguments, terms, of_statistics in (
                ((logits, rest_lse, None, bias, theta), LOSS, False),
                ((logits, rest_lse, square, bias, None), paper, False),
                ((logits, rest_lse, square, bias, None), paper, True),
            )
        ],
        "regulate": [
            (*solver, None, theta.detach(), *SOLVER, *LOSS),
            (*solver, square.detach(), theta.detach(), *SOLVER, *paper),
        ],
        "regulate_reference": [(*solver, None, theta.detach(), *SOLVER, *LOSS)],
    }


NAMES = sorted(registered(False))


def test_every_registered_operation_is_checked():
    names = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("attnctl_fast::")
    }
    assert names == set(NAMES)


@pytest.mark.parametrize(("grad", "strided"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, grad, strided):
    for arguments in registered(grad, strided)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), arguments)


def public(impl, ids=ids, pins=pins):
    """name -> function of (q, k, v, bias, theta), all differentiable but regulate."""

    def statistics(q, k, v, square=False):
        return ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=square, impl=impl)

    def merged(q, k, v, bias, theta):
        return ops.merge_targets(statistics(q, k, v), v, ids, bias, pinned_ids=pins, impl=impl)

    def rest_square(q, k, v, bias, theta):
        return statistics(q, k, v, True).rest_square

    def loss(objective):
        def run(q, k, v, bias, theta):
            stats = statistics(q, k, v, True)
            return ops.regulation_loss(stats, bias, objective=objective, theta=theta, impl=impl)

        return run

    def regulated(q, k, v, bias, theta):
        return ops.regulated_attention(q, k, v, theta, ids, GRID, pinned_ids=pins, bias_inside_scale=True, impl=impl)

    def solve(q, k, v, bias, theta):
        return ops.regulate(statistics(q, k, v, True), GRID, theta=theta, objective="paper", steps=3, impl=impl)

    return {
        "attention": lambda q, k, v, bias, theta: ops.attention(q, k, v, return_lse=True, impl=impl),
        "biased_attention": lambda q, k, v, bias, theta: ops.biased_attention(
            q, k, v, bias, ids, pinned_ids=pins, impl=impl
        ),
        "gaussian_bias": lambda q, k, v, bias, theta: ops.gaussian_bias(theta, GRID, impl=impl),
        "merge_targets": merged,
        "regulate": solve,
        "regulated_attention": regulated,
        "regulation_loss": loss("official"),
        "regulation_loss_paper": loss("paper"),
        "rest_square": rest_square,
        "target_statistics": lambda q, k, v, bias, theta: tuple(x for x in statistics(q, k, v) if x is not None),
    }


PUBLIC = sorted(public("eager"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "regulate"])
def test_gradcheck(name, impl):
    # One sample has no padding here: -inf logits have no finite differences.
    function = public(impl, torch.tensor([[3, 5], [4, 1]]))[name]
    arguments = [x.detach().contiguous().requires_grad_() for x in inputs(FLOAT64)]
    assert gradcheck(function, arguments, fast_mode=True)


def _grads(function, arguments):
    out = function(*arguments)
    total = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad)
    return out, torch.autograd.grad(total, arguments, allow_unused=True) if torch.is_tensor(total) else ()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PUBLIC)
def test_one_graph_under_compile(name, impl):
    function = public(impl, torch.tensor([[3, 5], [4, 1]]))[name]
    arguments = inputs(FLOAT64, grad=name != "regulate")
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(_grads(compiled, arguments), _grads(function, arguments), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("strided", [False, True])
def test_compiled_with_inductor(strided):
    q, k, v, bias, _ = inputs(strided=strided)

    def function(q, k, v, bias):
        return ops.biased_attention(q, k, v, bias, ids, pinned_ids=pins) + 2 * ops.attention(q, k, v)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, bias), function(q, k, v, bias))


def test_compile_takes_ids_as_a_sequence():
    q, k, v, bias, _ = inputs()
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *x: ops.biased_attention(*x, [3, 5], pinned_ids=[0]), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v, bias), ops.biased_attention(q, k, v, bias, [3, 5], pinned_ids=[0]))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", PUBLIC)
def test_fake_tensors_have_the_real_shapes(name, impl, strided):
    arguments = inputs(strided=strided)
    real = public(impl)[name](*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in arguments]
        function = public(impl, mode.from_tensor(ids), mode.from_tensor(pins))[name]
        fake = function(*fakes)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (fake, real)), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
