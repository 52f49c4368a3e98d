"""attention, target_statistics, merge_targets, biased_attention and regulated_attention against float64 truth."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl_fast import ops, reference, use
from attnctl_fast.ops import _tiled
from bench.ops.inputs import attention_inputs, rand, randn
from tests.support.marks import full_pairs, pairs
from tests.support.numerics import (
    DEVICE,
    FAST,
    IMPLS,
    Plain,
    assert_right,
    assert_rows_close,
    carried_by_lse,
    carried_to_gradients,
    full_softmax_output,
    plain_gradients,
    plain_results,
    widest,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, d): one of each size that matters; and sizes that meet in pairs under `-m full`.
SHAPES = [(1, 1, 8), (63, 77, 40), (64, 120, 80), (256, 77, 160), (256, 154, 64), (64, 333, 128), (256, 512, 40)]
SIZES = ((1, 63, 64, 256, 1024, 4096), (1, 77, 120, 154, 333, 512), (40, 64, 80, 128, 160))
MEETING = full_pairs(FAST, DTYPES, *SIZES)


_plain_attention = F.scaled_dot_product_attention


@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d"), pairs(IMPLS, DTYPES, SHAPES))
def test_attention(impl, dtype, m, n, d):
    q, k, v = attention_inputs(2, 3, m, n, d, dtype, strided=True)
    out, lse = ops.attention(q, k, v, return_lse=True, impl=impl)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_right(out, _plain_attention, q, k, v)
    logits = q.double() @ k.double().mT * d**-0.5
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d"), MEETING)
def test_attention_at_every_size(impl, dtype, m, n, d):
    q, k, v = attention_inputs(1, 2, m, n, d, dtype, strided=True)
    assert_right(ops.attention(q, k, v, impl=impl), _plain_attention, q, k, v)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("keyed", [False, True])
def test_columns_are_left_out_in_one_graph(impl, keyed):
    inputs = [x.requires_grad_() for x in attention_inputs(2, 2, 128, 9, 8, torch.float32)]
    key_bias = rand(2, 9) if keyed else None

    def statistics(q, k, v, ids):
        found = ops.target_statistics(q, k, v, ids, key_bias=key_bias, impl=impl)
        return found.rest_out, found.rest_lse, found.logits

    def run(function):
        found = function(*inputs, torch.tensor([7, 2], device=DEVICE))
        return [*found, *torch.autograd.grad(sum(x.square().sum() for x in found), inputs)]

    torch.compiler.reset()
    for a, b in zip(run(torch.compile(statistics, fullgraph=True, backend="aot_eager")), run(statistics), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("impl", "dtype", "sharp"), pairs(FAST, DTYPES, [1.0, 6.0]))
def test_attention_gradients(impl, dtype, sharp):
    leaves = [x.requires_grad_() for x in attention_inputs(1, 2, 64, 77, 40, dtype, sharp)]
    weight, lse_weight = (
        randn(1, 2, 64, 40, dtype=dtype, seed=7),
        randn(1, 2, 64, 1, dtype=torch.float32, seed=8)[..., 0],
    )

    def total(out, lse):
        return (out * weight.to(out.dtype)).sum() + (lse * lse_weight.to(lse.dtype)).sum()

    def plain(order, q, k, v):
        q, k = q[..., order], k[..., order]
        return total(_plain_attention(q, k, v), (q @ k.mT * 40**-0.5).logsumexp(-1))

    ours = torch.autograd.grad(total(*ops.attention(*leaves, return_lse=True, impl=impl)), leaves)
    carried = carried_to_gradients(*leaves[:3], weight, 40**-0.5)
    for name, a, b in zip("qkv", ours, plain_gradients(plain, leaves), strict=True):
        assert_rows_close(a, b, dtype, f"d{name}", carried[name])


def test_only_wanted_gradients_are_made(monkeypatch):
    module = importlib.import_module("attnctl_fast.ops.attention")
    monkeypatch.setattr(importlib.import_module("attnctl_fast.ops._library"), "LARGEST_MAP", 0)
    q, k, v = attention_inputs(1, 2, 16, 9, 8, torch.float32)
    bias = torch.zeros(1, 2, 1, 16, device=DEVICE, requires_grad=True)
    with _Asked() as asked:
        ops.attention(q.requires_grad_(), k, v, impl="eager").sum().backward()
        assert asked.needed == [[True, False, False, False]]
        # The bias alone needs no backward pass of the attention, whichever form it takes.
        ops.biased_attention(q.detach(), k, v, bias, [3], impl="eager").sum().backward()
        assert len(asked.needed) == 1
    monkeypatch.undo()
    monkeypatch.setattr(module, "_cpu_backward", None)
    ops.biased_attention(q.detach(), k, v, bias, [3], impl="eager").sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["transposed", "stepped", "expanded"])
def test_any_strides(impl, layout):
    def made(tokens, seed):
        if layout == "transposed":
            return randn(2, 2, 8, tokens, dtype=torch.float32, seed=seed).mT
        if layout == "stepped":
            return randn(2, 2, tokens, 16, dtype=torch.float32, seed=seed)[..., ::2]
        return randn(2, 2, tokens, 1, dtype=torch.float32, seed=seed).expand(-1, -1, -1, 8)

    leaves = [made(16, 1).requires_grad_(), made(9, 2).requires_grad_(), made(9, 3).requires_grad_()]
    plain = [x.detach().contiguous().requires_grad_() for x in leaves]
    weight = randn(2, 2, 8, 16, dtype=torch.float32, seed=4).mT
    results = []
    for q, k, v in (leaves, plain):
        out, lse = ops.attention(q, k, v, return_lse=True, impl=impl)
        merged = ops.biased_attention(q, k, v, torch.ones(2, 2, 1, 16, device=DEVICE), [3], pinned_ids=[0], impl=impl)
        results.append([out, lse, merged, *torch.autograd.grad(((out + merged) * weight).sum() + lse.sum(), (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("tokens", [1, 9, 16, 77])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_query_or_key_gives_nan(impl, tokens):
    q, k, v = attention_inputs(2, 2, 16, tokens, 8, torch.float32)
    q[0, 0, 3] = torch.nan
    k[1, 1, 0, 2] = torch.nan
    out, lse = ops.attention(q, k, v, return_lse=True, impl=impl)
    expected = torch.zeros(2, 2, 16, dtype=torch.bool, device=DEVICE)
    expected[0, 0, 3] = expected[1, 1] = True
    assert torch.equal(out.isnan().any(-1), expected) and torch.equal(lse.isnan(), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_the_precision_alone(impl):
    q, k, v = attention_inputs(1, 2, 16, 9, 8, torch.float32)

    def run():
        stats = ops.target_statistics(q, k, v, [3], pinned_ids=[0], with_square=True, impl=impl)
        theta = rand(1, 2, 1, 1, 1)
        found = ops.regulate(stats, (4, 4), theta=theta, steps=3, impl=impl)
        loss = ops.regulation_loss(stats, found.bias, impl=impl)
        return [*stats, *found, loss, ops.merge_targets(stats, v, [3], found.bias, pinned_ids=[0], impl=impl)]

    expected = run()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        ours = run()
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_settings_that_are_not_the_defaults(impl):
    q, k, v = attention_inputs(2, 2, 128, 11, 8, widest(impl))
    grid, sigma, scale, ids = (8, 16), (1.5, 2.0), 0.7, [3, 6]
    theta = randn(2, 2, 2, 6, dtype=q.dtype, seed=3).unflatten(-1, ops.basis_shape(grid, sigma))

    def spanned(theta):
        y, x = (torch.arange(side, dtype=theta.dtype, device=DEVICE)[:, None] for side in grid)
        rows = torch.exp(-((y - torch.tensor([3.0, 6.0], device=DEVICE)) ** 2) / (2 * 1.5**2))
        columns = torch.exp(-((x - torch.tensor([4.0, 8.0, 12.0], device=DEVICE)) ** 2) / (2 * 2.0**2))
        return (rows @ theta @ columns.mT).flatten(-2)

    def biased(q, k, v, bias):
        return full_softmax_output(q, k, v, bias, ids, [0], scale)

    def regulated(q, k, v, theta):
        return biased(q, k, v, spanned(theta))

    bias = spanned(theta)
    how = {"pinned_ids": [0], "scale": scale, "impl": impl}
    ours = ops.regulated_attention(q, k, v, theta, ids, grid, sigma=sigma, **how)
    assert_right(ours, regulated, q, k, v, theta, what="regulated")
    assert_right(ops.biased_attention(q, k, v, bias, ids, **how), biased, q, k, v, bias, what="biased")
    stats = ops.target_statistics(q, k, v, ids, with_square=True, **how)
    merged = ops.merge_targets(stats, v, ids, bias, pinned_ids=[0], impl=impl)
    assert_right(merged, biased, q, k, v, bias, what="merged", carried=carried_by_lse(stats.rest_lse, v))
    rest = (scale * q @ k.mT).softmax(-1)[..., [0, 1, 2, 4, 5, 7, 8, 9, 10]]
    torch.testing.assert_close(stats.rest_square, rest.square().sum(-1))
    plain = functools.partial(F.scaled_dot_product_attention, scale=scale)
    assert_right(ops.attention(q, k, v, scale=scale, impl=impl), plain, q, k, v)


def check_merged(merged, q, k, v, bias, ids, pinned, lse):
    """Against the full softmax; the roundings are those of statistics in float32 and their merge, in which a logit of
    a pinned column is rounded twice, differently: by itself and within the logsumexp."""

    def parts():
        stats = ops.target_statistics(q, k, v, ids, pinned_ids=pinned, impl="reference")
        return ops.merge_targets(stats, v, ids, bias, pinned_ids=pinned, impl="reference")

    def plain(*inputs):
        return full_softmax_output(*inputs, ids, pinned, q.shape[-1] ** -0.5)

    expected = plain_results(plain, q, k, v, bias)._replace(compute=parts)
    assert_rows_close(merged, expected, merged.dtype, "merged", carried_by_lse(lse, v))


@pytest.mark.parametrize(
    ("impl", "dtype", "m", "n", "d"),
    [*pairs(IMPLS, DTYPES, SHAPES[1:]), *MEETING],
)
def test_statistics_and_merge(impl, dtype, m, n, d):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, 3.0, strided=True)
    ids, pinned = ([0], []) if n == 1 else ([n - 1, 3], [0, 7])
    bias = 4 * randn(2, 2, len(ids), m, dtype=torch.float32, seed=5)
    stats = ops.target_statistics(q, k, v, ids, pinned_ids=pinned, with_square=True, impl=impl)
    logits = q.double() @ k.double().mT * d**-0.5
    rest = [i for i in range(n) if i not in ids]
    torch.testing.assert_close(stats.logits.double(), logits[..., ids].mT, atol=2e-5, rtol=1e-5)
    expected = logits[..., rest].logsumexp(-1)
    torch.testing.assert_close(stats.rest_lse.double(), expected, atol=2e-4, rtol=1e-5)
    square = logits.softmax(-1)[..., rest].square().sum(-1)
    torch.testing.assert_close(stats.rest_square.double(), square, atol=1e-6, rtol=1e-3)
    if pinned:
        torch.testing.assert_close(stats.pinned_logits.double(), logits[..., pinned].mT, atol=2e-5, rtol=1e-5)
    else:
        assert stats.pinned_logits is None

    out = ops.merge_targets(stats, v, ids, bias, pinned_ids=pinned, impl=impl)
    assert out.dtype == dtype
    check_merged(out, q, k, v, bias, ids, pinned, logits.logsumexp(-1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("raised", [-1e4, -40.0, 0.0, 5.0, 20.0, 40.0, 1e4])
def test_merge_is_stable_at_any_bias(impl, raised):
    q, k, v = attention_inputs(1, 2, 64, 77, 40, torch.float32, 8.0)
    ids = [5, 9]
    bias = torch.full((1, 2, 2, 64), raised, device=DEVICE)
    bias[:, :, 1] *= 0.5
    stats = ops.target_statistics(q, k, v, ids, pinned_ids=[0], impl=impl)
    out = ops.merge_targets(stats, v, ids, bias, pinned_ids=[0], impl=impl)
    check_merged(out, q, k, v, bias, ids, [0], stats.rest_lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_columns_are_targets(impl):
    q, k, v = attention_inputs(1, 2, 16, 3, 8, widest(impl))
    stats = ops.target_statistics(q, k, v, [2, 0, 1], with_square=True, impl=impl)
    assert (stats.rest_lse == -torch.inf).all() and (stats.rest_out == 0).all() and (stats.rest_square == 0).all()
    merged = ops.merge_targets(stats, v, [2, 0, 1], impl=impl)
    assert_right(merged, _plain_attention, q, k, v)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inside", [False, True])
def test_biased_attention_conventions(impl, inside):
    q, k, v = attention_inputs(2, 2, 16, 11, 8, widest(impl))
    bias = randn(2, 2, 2, 16, dtype=q.dtype, seed=4)

    def plain(q, k, v, bias):
        added = q.new_zeros(2, 2, 16, 11)
        added[..., [3, 6]] = bias.mT
        logits = (q @ k.mT + added) / 8**0.5 if inside else q @ k.mT / 8**0.5 + added
        return logits.softmax(-1) @ v

    out = ops.biased_attention(q, k, v, bias, [3, 6], bias_inside_scale=inside, impl=impl)
    assert_right(out, plain, q, k, v, bias)


@pytest.mark.parametrize("impl", IMPLS)
def test_different_targets_per_sample_equal_each_sample_alone(impl):
    q, k, v = attention_inputs(3, 2, 16, 11, 8, widest(impl))
    rows, pins = [[3, 6], [5], []], [[0, 9], [0, 7], [0]]
    bias = randn(3, 2, 2, 16, dtype=q.dtype, seed=4)
    bias[1:, :, 1] = torch.nan  # a padded target's bias is ignored
    bias[2] = torch.nan
    out = ops.biased_attention(
        q, k, v, bias, [[3, 6], [5, -1], [-1, -1]], pinned_ids=[[0, 9], [0, 7], [0, -1]], impl=impl
    )
    for i in range(2):
        one = slice(i, i + 1)
        real = bias[one, :, : len(rows[i])]
        alone = ops.biased_attention(q[one], k[one], v[one], real, rows[i], pinned_ids=pins[i], impl=impl)
        torch.testing.assert_close(out[one], alone)

        def plain(q, k, v, bias, i=i):
            return full_softmax_output(q, k, v, bias, rows[i], pins[i], 8**-0.5)

        assert_right(out[one], plain, q[one], k[one], v[one], real)
    assert_right(out[2:], _plain_attention, q[2:], k[2:], v[2:])


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_targets_get_zero_gradient(impl):
    q, k, v = attention_inputs(2, 2, 16, 11, 8, widest(impl))
    bias = randn(2, 2, 2, 16, dtype=q.dtype, seed=4).requires_grad_()
    ops.biased_attention(q, k, v, bias, [[3, 6], [5, -1]], impl=impl).square().sum().backward()
    assert (bias.grad[1, :, 1] == 0).all() and (bias.grad[1, :, 0] != 0).any() and (bias.grad[0] != 0).any()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_biased_attention_gradients(impl, dtype):
    ids, pinned, scale = [5, 9], [0, 12], 40**-0.5
    leaves = [*attention_inputs(1, 2, 64, 77, 40, dtype, 3.0), 3 * randn(1, 2, 2, 64, dtype=torch.float32, seed=5)]
    leaves = [x.requires_grad_() for x in leaves]
    weight = randn(1, 2, 64, 40, dtype=dtype, seed=7)

    def total(out):
        return (out * weight.to(out.dtype)).sum()

    def plain(order, q, k, v, bias):
        return total(full_softmax_output(q[..., order], k[..., order], v, bias, ids, pinned, scale))

    q, k, v, bias = leaves
    ours = torch.autograd.grad(total(ops.biased_attention(q, k, v, bias, ids, pinned_ids=pinned, impl=impl)), leaves)
    # The merge is through the logsumexp of the edited logits.
    added = torch.zeros(1, 2, 64, 77, device=DEVICE).index_copy_(3, torch.tensor(ids, device=DEVICE), bias.detach().mT)
    carried = carried_to_gradients(*leaves[:3], weight, scale, added)
    for name, a, b in zip(("q", "k", "v", "bias"), ours, plain_gradients(plain, leaves), strict=True):
        assert_rows_close(a, b, dtype, f"d{name}", carried.get(name, 0.0))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a map is held on a CPU only")
@pytest.mark.parametrize(("ids", "dtype", "held"), pairs([[], [5, 9], [[5, 9], [3, -1]]], DTYPES, [True, False]))
def test_gradients_with_the_map_in_memory_and_without(ids, dtype, held, monkeypatch):
    if not held:
        monkeypatch.setattr(importlib.import_module("attnctl_fast.ops._library"), "LARGEST_MAP", 0)
    leaves = list(attention_inputs(2, 2, 64, 77, 40, dtype, 3.0))
    columns = torch.zeros(2, 2, 64, 77)
    rows = ids if ids and isinstance(ids[0], list) else [ids] * 2
    if ids:
        leaves.append(3 * randn(2, 2, 2, 64, dtype=torch.float32, seed=5))
        for sample, row in enumerate(rows):
            columns[sample, :, :, row] += leaves[3][sample, :, : len(row)].mT * torch.tensor([x >= 0 for x in row])
        leaves[3] = leaves[3].masked_fill(torch.tensor(rows)[:, None, :, None] < 0, torch.nan)
    leaves = [x.requires_grad_() for x in leaves]
    weight = randn(2, 2, 64, 40, dtype=dtype, seed=7)

    def plain(order, q, k, v, bias=None):
        logits = 40**-0.5 * (q[..., order] @ k[..., order].mT)
        if bias is not None:
            added = torch.zeros_like(logits)
            for sample, row in enumerate(rows):
                real = [x for x in row if x >= 0]
                added[sample, :, :, real] = bias[sample, :, : len(real)].mT.to(logits.dtype)
            logits = logits + added
        return ((logits.softmax(-1) @ v) * weight.to(v.dtype)).sum()

    q, k, v, *bias = leaves
    run = functools.partial(ops.biased_attention, bias=bias[0], target_ids=ids) if bias else ops.attention
    ours = torch.autograd.grad((run(q, k, v, impl="eager") * weight).sum(), leaves)
    carried = {} if held else carried_to_gradients(q, k, v, weight, 40**-0.5, columns.double())
    expected = plain_gradients(plain, leaves)
    for name, a, b in zip(("q", "k", "v", "bias"), ours, expected, strict=False):
        assert_rows_close(a, b, dtype, f"d{name}", carried.get(name, 0.0))
    if bias:
        out = run(*(x.detach() for x in (q, k, v)), impl="eager")
        alone = torch.autograd.grad((out * weight).sum(), bias)[0]
        assert_rows_close(alone, expected[3], torch.float32, "dbias alone")
        assert (ours[3][torch.tensor(rows)[:, None, :].expand(-1, 2, -1) < 0] == 0).all()


@pytest.mark.parametrize("centres", ["official", "paper"])
@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (16, 24), (40, 20)])
def test_gaussian_bias_equals_the_sum_over_centres(centres, grid):
    height, width = grid
    sigma_y, sigma_x = ops.default_sigma(grid)
    shape = ops.basis_shape(grid, centres=centres)
    ys = list(range(int(2 * sigma_y), height, int(2 * sigma_y)))
    xs = list(range(int(2 * sigma_x), width, int(2 * sigma_x)))
    if centres == "paper":
        ys = [int(2 * sigma_y) * p - 1 for p in range(1, int(height / (2 * sigma_y)) + 1)]
        xs = [int(2 * sigma_x) * p - 1 for p in range(1, int(width / (2 * sigma_x)) + 1)]
    assert shape == (len(ys), len(xs))
    pairs = [(i, j) for i in range(len(ys)) for j in range(len(xs))]

    def summed(theta, pairs):
        y, x = torch.meshgrid(*(torch.arange(side, dtype=theta.dtype, device=DEVICE) for side in grid), indexing="ij")
        total = theta.new_zeros(*theta.shape[:3], height, width)
        for i, j in pairs:
            gauss = torch.exp(-((y - ys[i]) ** 2) / (2 * sigma_y**2) - (x - xs[j]) ** 2 / (2 * sigma_x**2))
            total += theta[..., i, j, None, None] * gauss
        return total.flatten(-2)

    for impl in IMPLS:
        theta = rand(2, 2, 3, *shape, dtype=widest(impl))
        truth = summed(theta.double(), pairs)
        ours = ops.gaussian_bias(theta, grid, centres=centres, impl=impl)
        if impl == "triton":
            runs = [summed(theta, p) for p in (pairs, pairs[::-1])]
            assert_rows_close(ours, Plain(truth, runs, lambda x=theta: summed(x, pairs)), torch.float32, "bias")
        else:
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gaussian_bias_rounds_once(impl, dtype):
    grid = (512, 16)
    theta = rand(1, 1, 1, *ops.basis_shape(grid)).to(dtype)
    truth = ops.gaussian_bias(theta.double(), grid, impl="eager")
    bias = ops.gaussian_bias(theta, grid, impl=impl)
    assert bias.dtype == dtype
    assert ((bias.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-6).all()


def test_default_sigma_is_the_released_codes_but_never_zero():
    assert ops.default_sigma((16, 16)) == (1.0, 1.0)
    assert ops.default_sigma((32, 64)) == (2.0, 4.0)
    assert ops.default_sigma((8, 8)) == (1.0, 1.0)
    assert ops.basis_shape((16, 16)) == (7, 7) and ops.basis_shape((16, 16), centres="paper") == (8, 8)
    assert ops.basis_shape((8, 8)) == (3, 3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("centres", ["official", "paper"])
def test_regulated_attention_is_biased_attention_with_its_bias(impl, centres):
    grid = (8, 16)
    q, k, v = attention_inputs(2, 2, 128, 11, 8, widest(impl))
    theta = randn(2, 2, 2, 64, dtype=q.dtype, seed=3)[..., : math.prod(ops.basis_shape(grid, centres=centres))]
    theta = theta.unflatten(-1, ops.basis_shape(grid, centres=centres))
    how = {"pinned_ids": [0], "bias_inside_scale": True, "impl": impl}
    bias = ops.gaussian_bias(theta, grid, centres=centres, impl=impl)
    out = ops.regulated_attention(q, k, v, theta, [3, 6], grid, centres=centres, **how)
    torch.testing.assert_close(out, ops.biased_attention(q, k, v, bias, [3, 6], **how))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_inf_propagate(impl):
    q, k, v = attention_inputs(1, 2, 16, 9, 8, torch.float32)
    q[0, 0, 3, 1] = torch.nan
    q[0, 1, 5, 2] = torch.inf
    k[..., 2].abs_()  # every logit of that row is infinity
    out = ops.biased_attention(q, k, v, torch.ones(1, 2, 1, 16, device=DEVICE), [4], pinned_ids=[0], impl=impl)
    broken = out.isnan().any(-1)[0]
    assert broken[0, 3] and broken[1, 5] and broken.sum() == 2
    stats = ops.target_statistics(q, k, v, [4], impl=impl)
    assert ops.regulate(stats, (4, 4), steps=3, impl=impl).losses.isnan().all()


@pytest.mark.parametrize("excluded", [[], [2, 5], list(range(9))])
def test_the_form_for_accelerators_equals_the_cpus(excluded):
    """Off the CPU eager materialises the logits; that code runs here on the CPU's tensors."""
    module = importlib.import_module("attnctl_fast.ops.attention")
    q, k, v = (x.cpu() for x in attention_inputs(2, 2, 16, 9, 8, torch.float64))
    ids = torch.tensor(excluded, dtype=torch.int64)
    mask = module._mask(q, k, ids, None, None)
    out, lse = module.attention_op(q, k, v, None, ids, None, 0.3)
    for ours, expected in zip(module._dense_forward(q, k, v, mask, 0.3), (out, lse), strict=True):
        torch.testing.assert_close(ours, expected)
    finite = lse.masked_fill(lse.isneginf(), 0.0)
    for grad_lse in (None, randn(2, 2, 16, 1, dtype=torch.float64, seed=5)[..., 0].cpu()):
        grad_out = randn(2, 2, 16, 8, dtype=torch.float64, seed=4).cpu()
        every = [True, True, True, False]
        backward = torch.ops.attnctl_fast.attention_backward
        fused = backward(grad_out, grad_lse, q, k, v, None, ids, None, 0.3, out, lse, every)[:3]
        for needed in ([True, True, True], [True, False, False], [False, True, True], [False, False, True]):
            with _Products() as products:
                dense = module._dense_backward(grad_out, grad_lse, q, k, v, out, finite, mask, 0.3, needed)
            assert products.count == 1 + (needed[0] or needed[1]) + sum(needed)
            for ours, expected, wanted in zip(dense, fused, needed, strict=True):
                torch.testing.assert_close(ours, expected if wanted else expected.new_empty(0))


class _Asked(TorchDispatchMode):
    """Collects which gradients attention's backward operation is asked for."""

    def __init__(self):
        super().__init__()
        self.needed = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "attnctl_fast::attention_backward":
            self.needed.append(args[-1])
        return function(*args, **(kwargs or {}))


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm)
        return function(*args, **(kwargs or {}))


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("impl", FAST)
def test_no_full_map_is_made(impl, monkeypatch):
    """Above a bound on a CPU."""
    monkeypatch.setattr(importlib.import_module("attnctl_fast.ops._library"), "LARGEST_MAP", 2 * 256 * 300 - 1)
    if impl == "eager" and DEVICE.type != "cpu":
        pytest.skip("off the CPU, eager materialises the logits")
    q, k, v = attention_inputs(1, 2, 256, 300, 8, torch.float32)
    full_map = 2 * 256 * 300 * 4
    bias = torch.zeros(1, 2, 2, 256, device=DEVICE, requires_grad=True)
    with _LargestTensor() as ours:
        ops.biased_attention(q.requires_grad_(), k, v, bias, [3, 6], pinned_ids=[0], impl=impl).sum().backward()
        ops.biased_attention(q, k, v, bias, [3, 6], impl=impl).sum().backward()
        ops.attention_with_maps(q, k, v, [3, 6], impl=impl)[1].sum().backward()
        stats = ops.target_statistics(q.detach(), k, v, [3, 6], with_square=True, impl=impl)
        ops.regulate(stats, (16, 16), objective="paper", steps=2, impl=impl)
        out, update = ops.attention_with_context_gradient(q, k, v, impl=impl)
        (out.sum() + update.sum() + ops.context_energy(q, k, impl=impl).attention.sum()).backward()
        ops.composed_attention(q, [k, k], [v, v], [1.0, 0.5], impl=impl).sum().backward()
    with _LargestTensor() as textbook:
        ops.biased_attention(q, k, v, bias, [3, 6], impl="reference")
    assert ours.bytes < full_map / 4
    assert textbook.bytes >= full_map


def test_one_tile_of_the_map_is_made_for_both_softmaxes():
    module = importlib.import_module("attnctl_fast.ops.attention_with_context_gradient")
    q, k, v = attention_inputs(2, 4, 4096, 300, 8, torch.float32)
    with _LargestTensor() as ours:
        assert module._shared_map(q, k, v, rand(2, 4096), 0.3, None) is not None
    assert ours.bytes <= 4 * _tiled.TILE < 4 * 4 * 4096 * 300 / 4


def test_use_and_environment_choose_the_implementation(monkeypatch):
    called = []
    module = importlib.import_module("attnctl_fast.ops.attention")
    monkeypatch.setattr(module, "attention_reference", lambda *a: called.append(a) or reference.attention(*a))
    q, k, v = attention_inputs(1, 1, 4, 5, 8, torch.float32)
    ops.attention(q, k, v)
    assert not called
    with use("reference"):
        ops.attention(q, k, v)
        assert len(called) == 1
        with use("eager"):
            ops.attention(q, k, v)
        ops.attention(q, k, v, impl="eager")
        assert len(called) == 1
    with pytest.raises(RuntimeError, match="inside"), use("reference"):
        raise RuntimeError("inside")
    ops.attention(q, k, v)
    assert len(called) == 1


def test_use_as_a_plain_statement(monkeypatch):
    """Checked at once, and in force from then on."""
    module = importlib.import_module("attnctl_fast._impl")
    monkeypatch.setattr(module, "_default", None)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="impl is 'no such'; it must be one of"):
        use("no such")
    assert module.resolve(None, cpu) == "eager"
    use("reference")
    assert module.resolve(None, cpu) == "reference"
    with use("eager"):
        assert module.resolve(None, cpu) == "eager"
    assert module.resolve(None, cpu) == "reference"
