"""The rule that errors are judged by: what it lets pass, what it refuses, and that no processor's luck decides."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast import ops
from bench.ops.inputs import attention_inputs, randn
from tests.support.marks import full
from tests.support.numerics import (
    ULPS,
    Plain,
    assert_rows_close,
    carried_to_gradients,
    plain_gradients,
    plain_results,
)
from tests.support.rounding import RandomRounding, floor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
attend = F.scaled_dot_product_attention


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    return q.shape[-1] ** -0.5 * (q.float() @ k.float().mT)


def within(x: Tensor, bits: int) -> Tensor:
    """`x` with so many bits of mantissa, rounded to nearest."""
    unit = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - bits)
    return (x / unit).round() * unit


def one_by_one(weights: Tensor, v: Tensor) -> Tensor:
    """Summed in the inputs' own precision."""
    total = torch.zeros_like(weights[..., :1] * v[..., :1, :])
    for n in range(v.shape[-2]):
        total = total + weights[..., n : n + 1] * v[..., n : n + 1, :]
    return total


def without_least(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row loses the column that it attends to least."""
    weights = logits_of(q, k).softmax(-1)
    return (weights.where(weights > weights.amin(-1, keepdim=True), 0.0) @ v.float()).to(q.dtype)


# Attention that is a little wrong, in float32: the faults of a kernel that is right but for its precision.
FAULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits in tf32": lambda q, k, v: (q.shape[-1] ** -0.5 * (within(q, 11) @ within(k, 11).mT)).softmax(-1) @ v,
    "weights in tf32": lambda q, k, v: within(logits_of(q, k).softmax(-1), 11) @ within(v, 11),
    "logits in float16": lambda q, k, v: logits_of(q, k).half().float().softmax(-1) @ v,
    "weights in bfloat16": lambda q, k, v: logits_of(q, k).softmax(-1).bfloat16().float() @ v,
    "a logsumexp in float16": lambda q, k, v: (
        (logits_of(q, k) - logits_of(q, k).logsumexp(-1, keepdim=True).half().float()).exp() @ v
    ),
    "an exponential of 16 bits": lambda q, k, v: (
        F.normalize(within(logits_of(q, k).exp(), 16), p=1, dim=-1) @ within(v, 24)
    ),
    "a scale of 5 digits": lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5 * (1 + 2e-5)),
    "a result of 18 bits": lambda q, k, v: within(attend(q, k, v), 18),
    "weights that sum to 1 + 3e-6": lambda q, k, v: attend(q, k, v) * (1 + 3e-6),
    "the least column left out": without_least,
}
# And in half precision, where plain PyTorch rounds its weights and its result as well.
HALF_FAULTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "summed one by one": lambda q, k, v: one_by_one(logits_of(q, k).softmax(-1).to(q.dtype), v),
    "a scale of 1 digit": lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5 * 1.05),
    "a column raised": lambda q, k, v: (
        (logits_of(q, k) + logits_of(q, k).eq(logits_of(q, k).amax(-1, keepdim=True)) * 0.1).softmax(-1) @ v.float()
    ).to(q.dtype),
}


def refused(actual: Tensor, plain: Plain, dtype: torch.dtype) -> bool:
    try:
        assert_rows_close(actual, plain, dtype, "out")
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(("m", "n", "d"), [(64, 77, 40), (63, 154, 80)])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(fault, m, n, d):
    q, k, v = attention_inputs(1, 2, m, n, d, torch.float32, 2.0)
    plain = plain_results(attend, q, k, v)
    assert not refused(ops.attention(q, k, v, impl="eager"), plain, torch.float32)
    assert refused(FAULTS[fault](q, k, v), plain, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("fault", HALF_FAULTS)
def test_faults_are_refused_in_half_precision(fault, dtype):
    q, k, v = attention_inputs(1, 1, 64, 512, 40, dtype)
    plain = plain_results(attend, q, k, v)
    assert not refused(ops.attention(q, k, v, impl="eager"), plain, dtype)
    assert refused(HALF_FAULTS[fault](q, k, v), plain, dtype)


def plain_update(q: Tensor, k: Tensor, queries: Tensor) -> Tensor:
    return (q.shape[-1] ** -0.5 * (k @ q.mT)).softmax(-1) @ queries


def made_by(form: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Plain]:
    """What a correct form makes of q, k, v, and what it is judged by."""
    if form == "out":
        return ops.attention(q, k, v, impl="eager"), plain_results(attend, q, k, v)
    if form == "update":
        _, update = ops.attention_with_context_gradient(q, k, v, impl="eager")
        return update, plain_results(plain_update, q, k, q)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    index = ("dq", "dk").index(form)
    found = torch.autograd.grad(ops.attention(*leaves, impl="eager").square().sum(), leaves[index])[0]
    total = plain_gradients(lambda order, q, k, v: attend(q[..., order], k[..., order], v).square().sum(), leaves)
    return found, total[index]


FORMS = ["out", "update", "dq", "dk"]


@pytest.mark.parametrize(
    ("form", "dtype", "draws"),
    [
        full(form, dtype, draws) if draws == 300 or dtype == torch.bfloat16 else (form, dtype, draws)
        for form, dtype, draws in itertools.product(FORMS, DTYPES, (2, 300))
    ],
)
def test_a_correct_form_is_hardly_ever_refused(form, dtype, draws):
    """By the floor, the ulps and what a logsumexp carries, whatever luck plain PyTorch has: in fewer than one row in a
    million, so in none of these. Every sample of a batch is drawn by itself."""
    for seed, (m, n, d) in enumerate([(64, 20, 16), (40, 77, 24), (129, 9, 8)]):
        q, k, v = (randn(draws, 2, side, d, dtype=dtype, seed=10 * seed + i) for i, side in enumerate((m, n, n)))
        actual, plain = made_by(form, q, (1 + seed) * k, v)
        truth = plain.truth.double()
        allowed = floor(plain.compute, truth) + ULPS * torch.finfo(dtype).eps * truth.abs().amax(-1)
        if form in ("dq", "dk"):  # made from a logsumexp
            out = attend(*(x.double() for x in (q, (1 + seed) * k, v)))
            carried = carried_to_gradients(q, (1 + seed) * k, v, 2 * out, d**-0.5)
            allowed = allowed + carried[form.removeprefix("d")]
        error = (actual.double() - truth).abs().amax(-1)
        print(f"{error.numel()} rows, the worst at {(error / allowed).amax():.2f} of what is allowed")
        assert not (error > allowed).any()


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "a product": lambda x: x @ x.mT,
    "a mean": lambda x: x.mean(-1),
    "a softmax": lambda x: (4 * x).softmax(-1),
    "a logarithm of a sum": lambda x: x.logsumexp(-1),
}


@pytest.mark.parametrize("terms", [2, 30, 300, 2500])
@pytest.mark.parametrize("name", SUMS)
def test_what_is_drawn_is_no_less_than_the_error_of_float32(name, terms):
    """Nor beyond reason: sums that a processor makes in more and shorter chains are that much better.

    A sharp softmax over thousands of columns is left out: what is far below a chain's sum is lost there, always in one
    direction, which no independent errors describe. PyTorch's own error says it (with AVX2; with AVX-512 it is small).
    """
    if name == "a softmax" and terms > 1000:
        pytest.skip("its errors are not independent")
    x = randn(1, 1, 200, terms, dtype=torch.float32, seed=1)[0, 0]
    function = SUMS[name]
    truth = function(x.double())
    real = (function(x).double() - truth).square().mean().sqrt()
    with RandomRounding(0):
        drawn = (function(x).double() - truth).square().mean().sqrt()
    assert real < 1.2 * drawn < 20 * real + torch.finfo(torch.float32).eps * truth.abs().mean()


def test_what_is_exact_stays_exact():
    x = randn(1, 2, 5, 8, dtype=torch.float16, seed=1)
    eye = torch.eye(8, dtype=torch.float16)
    with RandomRounding(0):
        found = [x * 2, -x, x.mT.contiguous().mT, x.float().half(), x[..., [1, 0]][..., [1, 0]], x.clone().mul_(0.5)]
        infinite = x.masked_fill(x > 0, -torch.inf).softmax(-1)
        column = (x @ eye)[..., 0]
    for ours, expected in zip(found, [2 * x, -x, x, x, x[..., :2], x / 2], strict=True):
        assert torch.equal(ours, expected) and ours.dtype == torch.float16
    assert torch.equal(infinite == 0, x > 0)
    # A sum is off by float32 additions, then rounded.
    assert (column - x[..., 0]).abs().max() <= torch.finfo(torch.float16).eps * x.abs().max()


def test_draws_are_the_same_everywhere_and_go_either_way():
    x = torch.full((20000,), 1 + 2.0**-12)
    with RandomRounding(3):
        once = x.half()
    with RandomRounding(3):
        again = x.half()
    assert torch.equal(once, again)
    assert set(once.tolist()) == {1.0, 1 + 2.0**-10}
    # A quarter of the way up: up in a quarter of the cases.
    assert abs(once.eq(1 + 2.0**-10).double().mean() - 0.25) < 0.02


def test_only_what_can_be_drawn_is_drawn():
    q, k, v = attention_inputs(1, 1, 4, 3, 8, torch.float32)
    with RandomRounding(0), pytest.raises(TypeError, match="attnctl_fast.*PyTorch's own operations only"):
        ops.attention(q, k, v, impl="eager")


def test_a_row_of_one_number_is_judged_by_its_roundings_alone() -> None:
    """Whether plain PyTorch was lucky, in all orders of its sum, or went astray."""
    q, k = (randn(1, 1, 50, 64, dtype=torch.float32, seed=seed)[0, 0] for seed in (1, 2))

    def dots(q: Tensor, k: Tensor) -> Tensor:
        return (q.unsqueeze(1) @ k.unsqueeze(2)).squeeze(2)

    truth = dots(q.double(), k.double())
    chance = floor(lambda: dots(q, k), truth).unsqueeze(1)
    for run in (truth.float(), truth.float() + 1):
        plain = Plain(truth, [run], lambda: dots(q, k))
        assert not refused((truth + 0.9 * chance).float(), plain, torch.float32)
        ulps = ULPS * torch.finfo(torch.float32).eps * truth.abs()
        assert refused((truth + 1.5 * (chance + ulps)).float(), plain, torch.float32)


def test_the_floor_decides_only_where_plain_pytorch_had_luck(monkeypatch: Any) -> None:
    from tests.support import numerics

    monkeypatch.setattr(numerics, "floor", functools.partial(pytest.fail, "it was made"))
    q, k, v = attention_inputs(1, 2, 16, 9, 8, torch.float32)
    assert_rows_close(attend(q, k, v), plain_results(attend, q, k, v), torch.float32, "out")
