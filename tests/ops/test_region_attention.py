"""region_attention against the equations with full maps, in float64."""

from __future__ import annotations

import pytest
import torch

from attnctl_fast import ops
from attnctl_fast.ops import _tiled
from bench.ops.inputs import attention_inputs, fenced, rand
from tests.support.marks import full_pairs, pairs
from tests.support.numerics import DEVICE, IMPLS, assert_right, widest
from tests.support.regions import full_maps, regions

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, d): text and image columns; one block and several; one piece and two of the head.
SHAPES = [(1, 1, 8), (63, 77, 40), (130, 130, 16), (64, 154, 80), (48, 20, 160)]
SIZES = ((1, 63, 256, 1024), (1, 77, 120, 333, 1024), (8, 40, 64, 80, 128, 160, 250))


def check(impl, dtype, m, n, d, weight, sharp=2.0):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, sharp, strided=True)
    rows, columns, shared = regions(m, n)
    out = ops.region_attention(q, k, v, fenced(rows), fenced(columns), fenced(weight), impl=impl)
    assert out.dtype == dtype
    share = weight[:, None, :, None]
    assert_right(out, full_maps, q, k, v, shared, share, what=f"{impl} {dtype} {m} {n} {d}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d"), pairs(IMPLS, DTYPES, SHAPES))
def test_equals_full_maps(impl, dtype, m, n, d):
    check(impl, dtype, m, n, d, rand(2, m))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("impl", "dtype", "m", "n", "d"),
    full_pairs(IMPLS, DTYPES, *SIZES),
)
def test_equals_full_maps_at_every_size(impl, dtype, m, n, d):
    check(impl, dtype, m, n, d, rand(2, m))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [64, 77])
def test_a_negative_scale_is_negative_queries(impl, n):
    """With whole tiles of columns, and with a last one that is not."""
    q, k, v = attention_inputs(1, 2, 20, n, 16, torch.float16)
    rows, columns, _ = regions(20, n, batch=1)
    given = (k, v, rows, columns, rand(1, 20))
    found = ops.region_attention(q, *given, scale=-0.5, impl=impl)
    torch.testing.assert_close(found, ops.region_attention(-q, *given, scale=0.5, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("weight", "sharp"), [(1.0, 2.0), (1.7, 1.0), (-0.5, 1.0), (0.2, 8.0)])
def test_any_weight_and_sharp_logits(impl, weight, sharp):
    """One leaves nothing of the logits but their extremes, more turns their order around."""
    check(impl, torch.float32, 63, 77, 40, torch.full((2, 63), weight, device=DEVICE), sharp)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_zero_is_attention(impl):
    q, k, v = attention_inputs(2, 2, 33, 20, 16, widest(impl))
    rows, columns, _ = regions(33, 20)
    out = ops.region_attention(q, k, v, rows, columns, rand(2, 33, dtype=q.dtype).mul(0), impl=impl)
    torch.testing.assert_close(out, ops.attention(q, k, v, impl=impl), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_one_attends_evenly_to_the_extremes(impl):
    """A row whose columns are all in its region, or all outside, sees them all alike."""
    q, k, v = attention_inputs(1, 2, 4, 20, 16, widest(impl))
    rows = torch.tensor([[1, 2, 0, 3]], dtype=torch.int32, device=DEVICE)
    columns = torch.ones(1, 20, dtype=torch.int32, device=DEVICE)
    out = ops.region_attention(q, k, v, rows, columns, torch.ones(1, 4, dtype=q.dtype, device=DEVICE), impl=impl)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=1e-5, rtol=1e-5)


def test_eager_does_not_depend_on_its_blocks(monkeypatch):
    q, k, v = attention_inputs(2, 2, 37, 20, 16, torch.float64)
    rows, columns, _ = regions(37, 20)
    given = (q, k, v, rows, columns, rand(2, 37, dtype=torch.float64))
    expected = ops.region_attention(*given, impl="reference")
    for logits in (1, 400, 1 << 20):
        monkeypatch.setattr(_tiled, "TILE", logits)
        torch.testing.assert_close(ops.region_attention(*given, impl="eager"), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    q, k, v = attention_inputs(2, 2, 32, 9, 8, torch.float16)
    q[0, 0, 3], k[1, 1, 4] = torch.nan, torch.nan
    rows, columns, _ = regions(32, 9)
    out = ops.region_attention(q, k, v, rows, columns, rand(2, 32), impl=impl)
    assert out[0, 0, 3].isnan().all() and out[1, 1].isnan().all()
    assert not out[0, 1].isnan().any() and not out[1, 0].isnan().any() and not out[0, 0, 4:].isnan().any()


def test_kernels_refuse_gradients():
    pytest.importorskip("triton")
    q, k, v = attention_inputs(1, 1, 4, 3, 8, torch.float32)
    rows, columns, _ = regions(4, 3, 1)
    given = (q.requires_grad_(), k, v, rows, columns, rand(1, 4))
    with pytest.raises(ValueError, match="no gradient by the Triton kernels; use impl='eager', or torch.no_grad"):
        ops.region_attention(*given, impl="triton")
    with torch.no_grad():
        ops.region_attention(*given, impl="triton")


def test_bad_arguments():
    q, k, v = attention_inputs(2, 1, 4, 3, 8, torch.float32)
    rows, columns, _ = regions(4, 3)
    weight = rand(2, 4)
    for changed, message in (
        ({"row_regions": rows[:, :3]}, r"row_regions has shape \(2, 3\); .* \(2, 4\)"),
        ({"column_regions": columns[:1]}, r"column_regions has shape \(1, 3\); .* \(2, 3\)"),
        ({"row_regions": rows.long()}, "row_regions has dtype torch.int64; it must be torch.int32"),
        ({"weight": weight[0]}, r"weight is \(4,\) on .*; it must be .* \(2, 4\)"),
        ({"weight": weight.double()}, "weight is torch.float64 but the computation is torch.float32"),
        ({"q": q[0]}, "q has shape"),
    ):
        given = {"q": q, "k": k, "v": v, "row_regions": rows, "column_regions": columns, "weight": weight} | changed
        with pytest.raises(ValueError, match=message):
            ops.region_attention(**given)
