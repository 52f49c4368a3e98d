"""entmax_attention against its definition, and against full maps in float64."""

from __future__ import annotations

import pytest
import torch

from attnctl_fast import ops, reference
from bench.ops.inputs import attention_inputs, fenced
from tests.support.marks import pairs
from tests.support.numerics import DEVICE, IMPLS, assert_right, widest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, d): one block and several, whole tiles of columns and not.
SHAPES = [(1, 1, 8), (63, 77, 40), (130, 16, 64), (20, 300, 72), (16, 512, 160)]


def plain(q, k, v, weight):
    """As published: the entmax by sorting."""
    logits = q.shape[-1] ** -0.5 * (q @ k.mT)
    dense = logits.softmax(-1)
    return (dense + weight * (reference.entmax(logits) - dense)) @ v


@pytest.mark.parametrize("sharp", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("columns", [1, 2, 77, 512])
def test_the_entmax_is_the_threshold_at_which_a_row_adds_up_to_one(sharp, columns):
    """p = max(l / 2 - t, 0)^2 with one t for a row, where p is largest as where the logits are."""
    logits = sharp * torch.randn(50, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = reference.entmax(logits)
    torch.testing.assert_close(found.sum(-1), torch.ones(50, dtype=torch.float64))
    threshold = torch.where(found > 0, logits / 2 - found.sqrt(), -torch.inf).amax(-1, keepdim=True)
    torch.testing.assert_close(found, (logits / 2 - threshold).clamp(min=0).square(), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d"), pairs(IMPLS, DTYPES, SHAPES))
def test_equals_sorted_rows(impl, dtype, m, n, d):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, 2.0, strided=True)
    out = ops.entmax_attention(q, fenced(k), fenced(v), weight=2.0, impl=impl)
    assert out.dtype == dtype
    assert_right(out, plain, q, k, v, 2.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_weight_is_attention_and_one_is_sparse(impl):
    q, k, v = attention_inputs(1, 2, 40, 77, 16, widest(impl), 6.0)
    dense = ops.attention(q, k, v, impl=impl)
    for weight in (0.0, q.new_zeros(())):
        torch.testing.assert_close(ops.entmax_attention(q, k, v, weight=weight, impl=impl), dense)
    only = torch.eye(77, 16, dtype=q.dtype, device=DEVICE).expand(1, 2, -1, -1).contiguous()
    shares = ops.entmax_attention(q, k, only, impl=impl)
    assert (shares >= 0).all() and (shares == 0).float().mean() > 0.5


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradients_are_those_of_the_definition(impl):
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 2, 6, 9, 8, torch.float64, 2.0))
    assert torch.autograd.gradcheck(lambda *x: ops.entmax_attention(*x, weight=2.0, impl=impl), (q, k, v))


def test_eager_does_not_depend_on_its_blocks(monkeypatch):
    import importlib

    given = attention_inputs(2, 2, 37, 20, 16, torch.float64)
    expected = ops.entmax_attention(*given, impl="reference")
    module = importlib.import_module("attnctl_fast.ops.entmax_attention")
    monkeypatch.setattr(module, "LOGITS", {})
    for logits in (1, 400, 1 << 20):
        monkeypatch.setattr(module, "LOGITS_ELSEWHERE", logits)
        torch.testing.assert_close(ops.entmax_attention(*given, impl="eager"), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    q, k, v = attention_inputs(2, 2, 32, 9, 8, torch.float16)
    q[0, 0, 3] = torch.nan
    out = ops.entmax_attention(q, k, v, impl=impl)
    assert out[0, 0, 3].isnan().all() and out.isnan().sum() == 8


def test_bad_arguments():
    q, k, v = attention_inputs(1, 1, 4, 3, 8, torch.float32)
    for weight, message in (
        (torch.inf, "weight is inf; it must be finite"),
        (torch.ones(2), r"weight has shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.entmax_attention(q, k, v, weight=weight)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="no gradient by the Triton kernels; use impl='eager', or torch.no_grad"):
        ops.entmax_attention(q.requires_grad_(), k, v, impl="triton")
    long = torch.zeros(1, 1, 513, 8, device=DEVICE)
    with pytest.raises(ValueError, match="at most 512 text tokens of a row, not 513; use impl='eager'"):
        ops.entmax_attention(q.detach(), long, long, impl="triton")
