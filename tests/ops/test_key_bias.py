"""key_bias, in every operation with a softmax over the text: what it means, its errors, and its precision."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from attnctl_fast import ops
from bench.ops.attention import GROUPS
from bench.ops.inputs import Case, attention_inputs, fenced, rand, randn
from bench.ops.registry import ATTENTION
from tests.support.kernel_cases import check
from tests.support.numerics import (
    DEVICE,
    IMPLS,
    TRITON,
    assert_right,
    assert_rows_close,
    carried_to_gradients,
    plain_gradients,
    plain_results,
    widest,
)
from tests.support.regions import full_maps, regions

INF = torch.inf
GRID = (4, 4)
M, N, D = 16, 9, 8
IDS, PINS = [[3, 5], [4, -1]], [[0, 8], [0, -1]]
MASKED = [1, 6]
GAMMAS = {"gamma_attn": 0.3, "gamma_norm": 0.7}


def _region(q, k, v, impl, key_bias, columns=slice(None)):
    rows, of_columns, _ = regions(M, N)
    return ops.region_attention(q, k, v, rows, of_columns[:, columns], rand(2, M), key_bias=key_bias, impl=impl)


def _grouped(q, k, v, impl, key_bias, columns=slice(None)):
    t = Case(M, N, D, batch=2).tensors(GROUPS)
    of_groups = t["row_groups"], t["column_groups"][:, columns], t["allowed"]
    return ops.grouped_attention(q, k, v, *of_groups, key_bias=key_bias, return_lse=True, impl=impl)


def _statistics(q, k, v, impl, key_bias, ids=IDS, pins=PINS):
    return ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=True, key_bias=key_bias, impl=impl)


def _bias(q):
    return randn(2, 2, 2, M, dtype=torch.promote_types(q.dtype, torch.float32), seed=5)


def _merged(q, k, v, impl, key_bias, ids=IDS, pins=PINS):
    stats = _statistics(q, k, v, impl, key_bias, ids, pins)
    return ops.merge_targets(stats, v, ids, _bias(q), pinned_ids=pins, impl=impl)


def _regulated(q, k, v, impl, key_bias, ids=IDS, pins=PINS):
    theta = rand(2, 2, 2, *ops.basis_shape(GRID, 1.0), dtype=_bias(q).dtype, seed=6)
    how = {"sigma": 1.0, "pinned_ids": pins, "key_bias": key_bias, "impl": impl}
    return ops.regulated_attention(q, k, v, theta, ids, GRID, **how)


def _composed(q, k, v, impl, key_bias):
    weights, short = [1.0, 0.5], slice(0, 5)
    given = {"key_bias": None if key_bias is None else [key_bias, None], "impl": impl}
    return ops.composed_attention(q, [k, k[:, :, short].detach()], [v, v[:, :, short].detach()], weights, **given)


def _guided(q, k, v, impl, key_bias):
    negative = k.roll(1, 2).detach(), v.roll(1, 2).detach()
    how = {"scale": 3.0, "tau": 1.5, "alpha": 0.5, "norm": 2, "key_bias": key_bias, "impl": impl}
    if key_bias is not None:
        how["key_bias_negative"] = key_bias.roll(1, -1)
    return ops.normalized_guidance(q, k, v, *negative, **how)


# Functions of q, k, v, impl, key_bias and, for some, of the ids; their results that have a row for each image token.
FUNCTIONS = {
    "attention": lambda q, k, v, impl, x: ops.attention(q, k, v, key_bias=x, return_lse=True, impl=impl),
    "attention without its lse": lambda q, k, v, impl, x: ops.attention(q, k, v, key_bias=x, impl=impl),
    "maps": lambda q, k, v, impl, x, ids=IDS, _=None: ops.attention_with_maps(q, k, v, ids, key_bias=x, impl=impl),
    "statistics": lambda *given: tuple(_statistics(*given)),
    "merged": _merged,
    "biased": lambda q, k, v, impl, x, ids=IDS, pins=PINS: ops.biased_attention(
        q, k, v, _bias(q), ids, pinned_ids=pins, key_bias=x, impl=impl
    ),
    "biased, nothing pinned": lambda q, k, v, impl, x, ids=IDS, _=None: ops.biased_attention(
        q, k, v, _bias(q), ids, key_bias=x, impl=impl
    ),
    "regulated": _regulated,
    "context": lambda q, k, v, impl, x: ops.attention_with_context_gradient(q, k, v, key_bias=x, impl=impl),
    "energy": lambda q, k, v, impl, x: tuple(ops.context_energy(q, k, key_bias=x, impl=impl)),
    "composed": _composed,
    "guided": _guided,
    "entmax": lambda q, k, v, impl, x: ops.entmax_attention(q, k, v, weight=2.0, key_bias=x, impl=impl),
    "region": _region,
    "grouped": _grouped,
}
WITH_IDS = ("maps", "statistics", "merged", "biased", "biased, nothing pinned", "regulated")


def a_key_bias(dtype=torch.float32):
    """Finite, but for the columns MASKED of both samples."""
    key_bias = randn(1, 1, 2, N, dtype=dtype, seed=8)[0, 0]
    key_bias[:, MASKED] = -INF
    return fenced(key_bias)


def leaves(impl):
    return [x.requires_grad_() for x in attention_inputs(2, 2, M, N, D, widest(impl))]


def results(function, tensors, *rest, differentiable=True):
    """Results, and the gradients of their sum of squares by q, k and v; -inf counts for nothing."""
    with torch.set_grad_enabled(differentiable):
        found = function(*tensors, *rest)
    found = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
    if not differentiable:
        return found, []
    total = sum(x.masked_fill(x.isneginf(), 0.0).square().sum() for x in found)
    return found, torch.autograd.grad(total, tensors, allow_unused=True, materialize_grads=True)


def close(impl):
    return {"atol": 2e-5, "rtol": 1e-4} if impl == "triton" else {"atol": 1e-10, "rtol": 1e-8}


def differentiable(impl, name):
    return impl != "triton" or name not in ("region", "entmax")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_masked_column_is_no_column(name, impl):
    """Outputs and gradients are those of keys and values without it; its own gradients and update are zero."""
    function, tensors = FUNCTIONS[name], leaves(impl)
    kept = [i for i in range(N) if i not in MASKED]
    key_bias = torch.zeros(2, N, device=DEVICE)
    key_bias[:, MASKED] = -INF
    with_gradient = differentiable(impl, name)
    ours, gradients = results(function, tensors, impl, key_bias, differentiable=with_gradient)
    short = [x if i == 0 else x[:, :, kept] for i, x in enumerate(tensors)]
    rest = [impl, None]
    if name in WITH_IDS:
        rest += [[[kept.index(i) if i >= 0 else -1 for i in row] for row in rows] for rows in (IDS, PINS)]
    if name in ("region", "grouped"):
        rest += [kept]
    if name == "composed":
        # The other context keeps all its columns.
        expected = ops.attention(*short, impl=impl) + 0.5 * ops.attention(
            *leaves(impl)[:1], *(x[:, :, :5] for x in tensors[1:]), impl=impl
        )
        torch.testing.assert_close(ours[0], expected / 1.5, **close(impl))
        assert all((x[:, :, MASKED] == 0).all() for x in gradients[1:])
        return
    leaf = [x.detach().requires_grad_() for x in short]
    expected, wanted = results(function, leaf, *rest, differentiable=with_gradient)
    if name == "context":
        assert (ours[1][:, :, MASKED] == 0).all()
        ours[1] = ours[1][:, :, kept]
    if name == "energy":
        # The norms of all keys count.
        ours, expected = ours[:1], expected[:1]
        gradients, wanted = [], []
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **close(impl))
    for i, (a, b) in enumerate(zip(gradients, wanted, strict=True)):
        torch.testing.assert_close(a if i == 0 else a[:, :, kept], b, **close(impl))
        assert i == 0 or (a[:, :, MASKED] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("composed", "energy")])
def test_a_finite_bias_is_one_more_number_of_the_head(name, impl):
    q, k, v = attention_inputs(2, 2, M, N, D, widest(impl))
    key_bias = randn(1, 1, 2, N, dtype=q.dtype, seed=8)[0, 0]
    added = (key_bias * D**0.5)[:, None, :, None].expand(-1, 2, -1, -1)
    wide = [torch.cat(x, -1) for x in ((q, torch.ones_like(q[..., :1])), (k, added), (v, torch.zeros_like(added)))]
    wide[0] *= ((D + 1) / D) ** 0.5  # for the scale's 1 / sqrt(d)
    with torch.no_grad():
        ours, expected = (
            results(FUNCTIONS[name], x, impl, bias, differentiable=False)[0]
            for x, bias in (((q, k, v), key_bias), (wide, None))
        )
    if name == "context":
        # Its second result weighs the queries; a column's bias does not change the weights.
        expected = [expected[0], expected[1] * (D / (D + 1)) ** 0.5]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b[..., : a.shape[-1]] if b.shape != a.shape else b, **close(impl))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_where_every_column_is_masked_results_and_gradients_are_zero(name, impl):
    """In the second sample; a logsumexp and targets' logits are -inf, and the other sample does not notice."""
    key_bias = a_key_bias()
    key_bias[1] = -INF
    alone = a_key_bias()
    tensors = leaves(impl)
    with_gradient = differentiable(impl, name)
    ours, gradients = results(FUNCTIONS[name], tensors, impl, key_bias, differentiable=with_gradient)
    others, theirs = results(FUNCTIONS[name], tensors, impl, alone, differentiable=with_gradient)
    for a, b in zip([*ours, *gradients], [*others, *theirs], strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a[0], b[0])
    if name == "composed":
        expected = ops.attention(tensors[0], *(x[:, :, :5] for x in tensors[1:]), impl=impl)[1] / 3
        torch.testing.assert_close(ours[0][1], expected, **close(impl))
        ours, gradients = [], gradients[1:]
    if name == "energy":
        ours, gradients = ours[:1], gradients[:1]
    for x in (*ours, *gradients):
        assert ((x[1] == 0) | x[1].isneginf()).all()


@pytest.mark.parametrize("impl", TRITON)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_large_bias_is_nothing_beyond_the_last_row(name, impl):
    """Where a tile has no row, no logsumexp takes the bias off again: exp(30) is inf in half precision."""
    tensors = [x.requires_grad_() for x in attention_inputs(2, 2, M, N, D, torch.float16)]
    key_bias = torch.zeros(2, N, device=DEVICE)
    key_bias[:, 3] = 30.0
    ours, gradients = results(FUNCTIONS[name], tensors, impl, key_bias, differentiable=differentiable(impl, name))
    assert all((x.isfinite() | x.isneginf()).all() for x in (*ours, *gradients))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", ["official", "paper"])
def test_a_masked_target_is_a_padded_one(objective, impl):
    """And a sample without a column is regulated without a NaN."""
    q, k, v = attention_inputs(2, 2, M, N, D, widest(impl))
    key_bias = torch.zeros(2, N, device=DEVICE)
    key_bias[0, 5] = -INF
    masked, padded = (
        ops.target_statistics(q, k, v, ids, with_square=True, key_bias=key_bias, impl=impl)
        for ids in ([[3, 5], [4, 6]], [[3, -1], [4, 6]])
    )
    how = {"sigma": 1.0, "objective": objective, "steps": 3, "impl": impl}
    theta = rand(2, 2, 2, *ops.basis_shape(GRID, 1.0), dtype=q.dtype)
    # The rest of the first has the masked column, which is none.
    found, expected = (ops.regulate(stats, GRID, theta=theta, **how) for stats in (masked, padded))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **close(impl))
    assert (found.bias[0, :, 1] == 0).all()
    stats = _statistics(q, k, v, impl, torch.full((2, N), -INF, device=DEVICE))
    assert all(not x.isnan().any() for x in ops.regulate(stats, GRID, theta=theta, **how))
    bias = _bias(q).requires_grad_()
    loss = ops.regulation_loss(stats, bias, objective=objective, impl=impl)
    (gradient,) = torch.autograd.grad(loss.sum(), bias)
    assert loss.isfinite().all() and (gradient == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision_of_the_eager_form(name, dtype):
    """The kernels' is in tests/kernels."""
    case = Case(16, 20, 24, batch=3, ids=((3, 7), (5, -1), (2, 4)), pinned=((0, 2), (0, -1), (1, 3)), keyed=True)
    check(name, replace(case, dtype=dtype), impl="eager")


def keyed(q, k, key_bias):
    return (q.shape[-1] ** -0.5 * (q @ k.mT) + key_bias[:, None, None, :]).to(q.dtype)


def plain_out(q, k, v, key_bias):
    return keyed(q, k, key_bias).softmax(-1) @ v


def plain_update(q, k, queries, key_bias):
    """The columns' softmax; zeros for masked ones."""
    update = (q.shape[-1] ** -0.5 * (k @ q.mT)).softmax(-1) @ queries
    return update.masked_fill(key_bias.isneginf()[:, None, :, None], 0.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "d"), [(63, 77, 40), (200, 77, 64), (64, 154, 16)])
def test_precision_of_the_context_gradient(impl, dtype, m, n, d):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, 2.0, strided=True)
    key_bias = 2 * randn(1, 1, 2, n, dtype=torch.float32, seed=8)[0, 0]
    key_bias[0, ::4], key_bias[1, n // 2 :] = -INF, -INF
    out, update = ops.attention_with_context_gradient(q, k, v, key_bias=fenced(key_bias), impl=impl)
    assert_right(out, plain_out, q, k, v, key_bias)
    assert_rows_close(update, plain_results(plain_update, q, k, q, key_bias), dtype, "update")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision_of_the_gradients_of_the_context_gradient(impl, dtype):
    m, n, d = 64, 77, 40
    leaves_of = [x.requires_grad_() for x in attention_inputs(2, 2, m, n, d, dtype)]
    key_bias = randn(1, 1, 2, n, dtype=torch.float32, seed=8)[0, 0]
    key_bias[0, 3:7], key_bias[1, 30:] = -INF, -INF
    of_out, of_update = randn(2, 2, m, d, dtype=dtype, seed=7), randn(2, 2, n, d, dtype=dtype, seed=8)

    def total(out, update):
        return (out * of_out.to(out.dtype)).sum() + (update * of_update.to(update.dtype)).sum()

    def plain(order, q, k, v):
        moved = q[..., order], k[..., order]
        return total(plain_out(*moved, v, key_bias), plain_update(*moved, q, key_bias))

    q, k, v = leaves_of
    ours = torch.autograd.grad(
        total(*ops.attention_with_context_gradient(q, k, v, key_bias=key_bias, impl=impl)), leaves_of
    )
    rows = carried_to_gradients(q, k, v, of_out, d**-0.5, key_bias=key_bias)
    columns = carried_to_gradients(k, q, q, of_update, d**-0.5)
    carried = [rows["q"] + columns["k"] + columns["v"], rows["k"] + columns["q"], rows["v"]]
    for name, a, b, extra in zip("qkv", ours, plain_gradients(plain, leaves_of), carried, strict=True):
        assert_rows_close(a, b, dtype, f"d{name}", extra)


def plain_composed(q, k, *others):
    *values, biases, lengths = others
    parts = zip(k.split(lengths, 2), values, biases.split(lengths, 1), strict=True)
    return sum(share * plain_out(q, part, v, x) for share, (part, v, x) in zip((0.8, 0.2), parts, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_precision_of_a_composition(impl, dtype):
    q, lengths = randn(2, 2, 63, 40, dtype=dtype, seed=1, strided=True), (77, 154)
    ks, vs = ([randn(2, 2, n, 40, dtype=dtype, seed=s + n, strided=True) for n in lengths] for s in (0, 500))
    biases = [randn(1, 1, 2, n, dtype=torch.float32, seed=n)[0, 0] for n in lengths]
    biases[0][:, 5:9], biases[1][1, 100:] = -INF, -INF
    out = ops.composed_attention(q, ks, vs, [0.8, 0.2], key_bias=[fenced(x) for x in biases], impl=impl)
    assert_right(out, plain_composed, q, torch.cat(ks, 2), *vs, torch.cat(biases, 1), lengths)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes_of_regions_are_those_of_open_columns(impl, dtype):
    """Against the formula on the columns that are left."""
    q, k, v = attention_inputs(2, 2, 63, 77, 40, dtype, 2.0)
    rows, columns, shared = regions(63, 77)
    weight, key_bias = rand(2, 63), torch.zeros(2, 77, device=DEVICE)
    key_bias[:, 10:60:3] = -INF
    left = [i for i in range(77) if key_bias[0, i] == 0]
    out = ops.region_attention(q, k, v, rows, columns, weight, key_bias=key_bias, impl=impl)
    assert_right(out, full_maps, q, k[:, :, left], v[:, :, left], shared[..., left], weight[:, None, :, None])
    given = (k, v, rows, columns, weight)
    negative = ops.region_attention(q, *given, scale=-0.3, key_bias=key_bias, impl=impl)
    expected = ops.region_attention(-q, *given, scale=0.3, key_bias=key_bias, impl=impl)
    torch.testing.assert_close(negative, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_float_dtype_is_taken_for_the_computations(impl, dtype):
    q, k, v = attention_inputs(2, 2, M, N, D, torch.float32)
    key_bias = a_key_bias(dtype)
    expected = ops.attention(q, k, v, key_bias=key_bias.float(), impl=impl)
    assert torch.equal(ops.attention(q, k, v, key_bias=key_bias, impl=impl), expected)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(ops.attention(q, k, v, key_bias=key_bias, impl=impl), expected)


def test_float64_stays_float64():
    q, k, v = attention_inputs(2, 2, M, N, D, torch.float64)
    key_bias = randn(1, 1, 2, N, dtype=torch.float64, seed=8)[0, 0]
    expected = (D**-0.5 * (q @ k.mT) + key_bias[:, None, None, :]).softmax(-1) @ v
    for impl in ("reference", "eager"):
        torch.testing.assert_close(ops.attention(q, k, v, key_bias=key_bias, impl=impl), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("tokens", [600, 1200])
def test_leading_tiles_that_are_masked(tokens):
    """The fused attention of a CPU goes over tiles of 512 columns."""
    q, k, v = attention_inputs(2, 2, 5, tokens, D, torch.float64)
    key_bias = torch.zeros(2, tokens, device=DEVICE)
    key_bias[:, : tokens - 50] = -INF
    found = ops.attention(q, k, v, key_bias=key_bias, return_lse=True, impl="eager")
    expected = ops.attention(q, k[:, :, -50:], v[:, :, -50:], return_lse=True, impl="reference")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["eager", *TRITON])
def test_none_and_zeros_are_the_same(impl):
    q, k, v = attention_inputs(2, 2, M, N, D, widest(impl))
    for name, function in FUNCTIONS.items():
        zeros = torch.zeros(2, N, device=DEVICE)
        with torch.no_grad():
            plain, ours = (results(function, (q, k, v), impl, x, differentiable=False)[0] for x in (None, zeros))
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, **close(impl), msg=name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name):
    q, k, v = attention_inputs(2, 2, M, N, D, torch.float32)
    what = "key_bias[0]" if name == "composed" else "key_bias"
    good = torch.zeros(2, N, device=DEVICE)
    for bad, text in (
        (
            good[0],
            f"{what} is torch.float32 of shape ({N},); it must be a float tensor [batch, text tokens] = [2, {N}]",
        ),
        (good[:1], f"{what} is torch.float32 of shape (1, {N}); it must be"),
        (good > 0, f"{what} is torch.bool of shape (2, {N}); it must be a float tensor"),
        (good.to("meta"), f"{what} is on meta but k is on"),
        (
            good.clone().requires_grad_(),
            f"{what} requires a gradient, but is a constant; pass {what}.detach()",
        ),
        (torch.full_like(good, torch.nan), f"{what} holds NaN or +inf; every number must be finite, or -inf to mask"),
        (torch.full_like(good, INF), f"{what} holds NaN or +inf"),
    ):
        if DEVICE.type != "cpu" and "holds" in text:
            continue
        with pytest.raises(ValueError, match=re.escape(text)):
            FUNCTIONS[name](q, k, v, "eager", bad)


def test_a_composition_takes_one_for_each_context():
    q, k, v = attention_inputs(1, 1, 4, 3, 8, torch.float32)
    with pytest.raises(ValueError, match="key_bias holds 1 for 2 contexts; pass one, or None, per context"):
        ops.composed_attention(q, [k, k], [v, v], [1.0, 1.0], key_bias=[None])
