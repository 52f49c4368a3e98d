"""Attention to few columns on a CPU: tiles of rows, columns of zeros beside the keys."""

from __future__ import annotations

import pytest
import torch

from attnctl_fast import ops
from attnctl_fast.ops import _tiled
from bench.ops.inputs import attention_inputs, rand, randn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is made on a CPU")
# Of targets: the same for all samples, and padded.
IDS = [torch.tensor([2, 5]), torch.tensor([[2, 5], [76, -1]])]


def masked(batch, tokens):
    """A key bias that masks some columns, and in the last sample all."""
    bias = randn(batch, tokens, dtype=torch.float64, seed=5)
    bias[0, 3:7], bias[-1] = -torch.inf, -torch.inf
    return bias


@pytest.mark.parametrize("tile", [1, 2 * 100 * 80, _tiled.TILE], ids=["rows", "tiles", "whole"])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("ids", [None, *IDS], ids=["plain", "biased", "padded"])
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_tiles_are_the_whole(ids, keyed, tile, monkeypatch):
    """The last tile is shorter."""
    monkeypatch.setattr(_tiled, "TILE", tile)
    q, k, v = attention_inputs(2, 2, 230, 77, 16, torch.float64)
    assert _tiled.few_columns(q, k, ids) and _tiled.aligned_columns(q, k) == 80
    how = {"key_bias": masked(2, 77) if keyed else None}
    if ids is None:
        found, expected = (ops.attention(q, k, v, **how, impl=impl) for impl in ("eager", "reference"))
    else:
        given = q, k, v, rand(2, 2, 2, 230, dtype=torch.float64), ids
        found, expected = (ops.biased_attention(*given, **how, impl=impl) for impl in ("eager", "reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tile", [1, 2 * 100 * 80, _tiled.TILE], ids=["rows", "tiles", "whole"])
@pytest.mark.parametrize("keyed", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_contexts_of_different_lengths_are_composed(keyed, tile, monkeypatch):
    """Some of them masked, in the last sample as a whole."""
    monkeypatch.setattr(_tiled, "TILE", tile)
    q, _, _ = attention_inputs(2, 2, 230, 77, 16, torch.float64)
    lengths = (77, 41, 80)
    ks, vs = ([randn(2, 2, n, 16, dtype=torch.float64, seed=first + n) for n in lengths] for first in (100, 200))
    assert all(_tiled.few_columns(q, k) for k in ks)
    biases = [masked(2, n) if i in keyed else None for i, n in enumerate(lengths)] if keyed else None
    found, expected = (
        ops.composed_attention(q, ks, vs, [1.0, 0.7, -0.4], key_bias=biases, impl=impl)
        for impl in ("eager", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_composed_contexts_are_mapped():
    """By torch.vmap, compiled or not."""
    q, ks, vs = torch.rand(3, 2, 2, 130, 16), *torch.rand(2, 3, 2, 2, 2, 20, 16)

    def composed(q, ks, vs):
        return ops.composed_attention(q, ks.unbind(), vs.unbind(), [1.0, 0.5], impl="eager")

    expected = torch.stack([composed(*one) for one in zip(q, ks, vs, strict=True)])
    mapped = torch.vmap(composed)
    for run in (mapped, torch.compile(mapped, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(run(q, ks, vs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_is_written_into_part_of_a_tensor(dtype):
    a, b = rand(3, 5, 4), rand(3, 4, 6)
    for out in (torch.zeros(3, 5, 6, dtype=dtype), torch.zeros(3, 9, 6, dtype=dtype)[:, 2:7]):
        _tiled.product(a, b, out, 0.5)
        torch.testing.assert_close(out, (0.5 * a @ b).to(dtype))


@torch.no_grad()
def test_what_is_not_finite_stays_in_its_row_or_sample():
    q, k, v = attention_inputs(2, 2, 130, 77, 16, torch.float32)
    q[0, 0, 3], q[0, 1, 4, 0], k[1, 1, 4] = torch.nan, torch.inf, torch.nan
    assert _tiled.few_columns(q, k)
    bad = torch.zeros(2, 2, 130, dtype=torch.bool)
    bad[0, 0, 3], bad[0, 1, 4], bad[1, 1] = True, True, True
    assert (ops.attention(q, k, v, impl="eager").isnan().all(-1) == bad).all()


@pytest.mark.parametrize(("rows", "columns", "few"), [(128, 96, True), (127, 96, False), (128, 97, False)])
def test_more_columns_or_fewer_rows_are_fused_attentions(rows, columns, few):
    q, k, _ = attention_inputs(1, 1, rows, columns, 8, torch.float32)
    assert _tiled.few_columns(q, k) == few


@pytest.mark.parametrize(
    ("rows", "tokens", "columns"), [(80, 77, 80), (76, 77, 77), (80, 80, 80), (80, 41, 41), (80, 1, 1), (64, 56, 56)]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_keys_get_few_columns_of_zeros_where_there_are_many_rows(rows, tokens, columns):
    q, k, _ = attention_inputs(2, 3, rows, tokens, 8, torch.float32)
    found = _tiled.aligned(q, k)
    assert found.shape == (2, 3, columns, 8) and (found[:, :, :tokens] == k).all() and (found[:, :, tokens:] == 0).all()
