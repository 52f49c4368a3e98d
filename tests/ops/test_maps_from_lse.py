"""maps_from_lse against float64 truth: the maps, and the gradients by q, k and the logsumexp."""

from __future__ import annotations

import importlib
import itertools
import re

import pytest
import torch
from torch.autograd import gradcheck

from attnctl_fast import ops
from bench.ops.inputs import randn
from tests.ops.test_maps import Largest
from tests.support.marks import pairs
from tests.support.numerics import (
    DEVICE,
    FAST,
    IMPLS,
    TRITON,
    assert_right,
    assert_rows_close,
    carried_to_maps,
    chosen_maps,
    plain_gradients,
    widest,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "none"]
# (M, N, d, H): N columns, M of which are the rows as well; one piece of the head and two.
SHAPES = [(1, 1, 8, 1), (63, 140, 40, 3), (64, 184, 80, 2), (65, 85, 160, 2), (64, 218, 16, 3), (48, 400, 128, 4)]
IDS = {"few": [5, 2], "one for each": [[7], [1]], "padded": [[3, -1, 6], [-1, -1, 0]], "none": [[-1], [2]]}
MANY = list(range(40, 0, -1))


def joint_inputs(m, n, d, heads, dtype, sharp=1.0, batch=2):
    """Rows and all columns of one sequence, as a model's projections give it, and the logsumexp of all columns, which
    is a view of that of the whole sequence."""
    sequence = max(m, n)
    q = randn(batch, heads, sequence, d, dtype=dtype, seed=1, strided=True)
    k = (sharp * randn(batch, heads, sequence, d, dtype=torch.float64, seed=2, strided=True)).to(dtype)[:, :, :n]
    wide = torch.promote_types(dtype, torch.float32)
    lse = (d**-0.5 * (q.double() @ k.double().mT)).logsumexp(-1).to(wide)
    return q[:, :, :m], k, lse.mT.contiguous().mT[:, :, :m]


def rows_of(ids, batch=2):
    return [ids] * batch if isinstance(ids[0], int) else ids


def plain(q, k, lse, ids, reduce="mean", scale=None, key_bias=None):
    """From the logits of all columns, in float32 or wider; with the queries scaled, as in test_maps.py."""
    q, k = (x.to(lse.dtype) for x in (q, k))
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    logits = logits if key_bias is None else logits + key_bias[:, None, None, :]
    return chosen_maps((logits - lse.unsqueeze(-1)).exp(), rows_of(ids), reduce)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d", "heads", "reduce"), pairs(IMPLS, DTYPES, SHAPES, REDUCTIONS))
def test_maps(impl, dtype, m, n, d, heads, reduce):
    q, k, lse = joint_inputs(m, n, d, heads, dtype)
    for ids in ([0], [[0], [-1]]) if n == 1 else (MANY, [[3, -1, 6], [-1, 2, n - 1]]):
        maps = ops.maps_from_lse(q, k, lse, ids, reduce=reduce, impl=impl)
        assert maps.dtype == torch.float32 and maps.is_contiguous()
        assert_right(maps, plain, q, k, lse, ids, reduce, what="maps")


@pytest.mark.parametrize(("ids", "impl", "reduce"), pairs(list(IDS), IMPLS, REDUCTIONS))
def test_ids_and_sharp_maps(impl, ids, reduce):
    q, k, lse = joint_inputs(40, 60, 16, 2, torch.float32, 8.0)
    maps = ops.maps_from_lse(q, k, lse, IDS[ids], reduce=reduce, impl=impl)
    assert_right(maps, plain, q, k, lse, IDS[ids], reduce, what="maps")


@pytest.mark.parametrize(("source", "impl", "reduce"), pairs(IMPLS, IMPLS, REDUCTIONS))
def test_they_are_the_columns_of_the_softmax(source, impl, reduce):
    """With the logsumexp of another attention; its rounding is an error of every probability."""
    q, k, _ = joint_inputs(40, 60, 16, 2, torch.float32, 3.0)
    key_bias = randn(1, 1, 2, 60, dtype=torch.float32, seed=8)[0, 0]
    key_bias[:, ::7] = -torch.inf
    how = {"reduce": reduce, "key_bias": key_bias}
    lse = ops.attention(q, k, k, key_bias=key_bias, return_lse=True, impl=source)[1]
    maps = ops.maps_from_lse(q, k, lse, IDS["padded"], **how, impl=impl)
    wide = (q.double(), k.double(), k.double())
    truth = ops.attention_with_maps(*wide, IDS["padded"], **how, impl="reference")[1]
    carried = 4 * carried_to_maps(q, k, IDS["padded"], reduce, 0.25, key_bias)
    assert ((maps.double() - truth).abs().amax(-1) <= carried + 1e-6 * truth.amax(-1)).all()


def check_gradients(impl, dtype, shape, ids, reduce, needed=("q", "k", "lse"), sharp=1.0, key_bias=None, higher=0.0):
    """`higher`: than the true logsumexp is the one that is given."""
    m, n, d, heads = shape
    leaves = dict(zip(("q", "k", "lse"), joint_inputs(m, n, d, heads, dtype, sharp), strict=True))
    leaves["lse"] = leaves["lse"] + higher
    for name in needed:
        leaves[name].requires_grad_()
    wanted = [leaves[name] for name in needed]
    maps = ops.maps_from_lse(*leaves.values(), ids, reduce=reduce, key_bias=key_bias, impl=impl)
    weights = randn(*maps.shape, dtype=torch.float32, seed=7)
    ours = torch.autograd.grad(maps, wanted, weights)

    def total(order, q, k, lse):
        found = plain(q[..., order], k[..., order], lse, ids, reduce, key_bias=key_bias)
        return (found * weights.to(found.dtype)).sum()

    for name, a, b in zip(needed, ours, plain_gradients(total, list(leaves.values())), strict=True):
        assert a.is_contiguous() and a.dtype == leaves[name].dtype
        assert_rows_close(a, b, a.dtype, f"d{name}")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("impl", "dtype", "d", "ids", "reduce"), pairs(FAST, DTYPES, [40, 64], ["padded", "few"], REDUCTIONS)
)
def test_gradients(impl, dtype, d, ids, reduce):
    check_gradients(impl, dtype, (40, 60, d, 2), IDS[ids], reduce)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "reduce"), pairs(FAST, DTYPES, REDUCTIONS))
def test_gradients_of_many_columns_and_a_key_bias(impl, dtype, reduce):
    key_bias = randn(1, 1, 2, 200, dtype=torch.float32, seed=8)[0, 0]
    key_bias[:, ::7] = -torch.inf
    check_gradients(impl, dtype, (130, 200, 16, 3), MANY, reduce, key_bias=key_bias)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("ids", IDS)
def test_gradients_of_sharp_maps(impl, ids):
    check_gradients(impl, torch.float32, (33, 50, 16, 3), IDS[ids], "mean", sharp=6.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(
    "needed", [x for size in (1, 2, 3) for x in itertools.combinations(("q", "k", "lse"), size)], ids="-".join
)
def test_every_subset_of_gradients(impl, needed):
    check_gradients(impl, torch.float32, (20, 29, 8, 2), [4, 1], "mean", needed)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("needed", ["q", "k"])
def test_gradients_of_maps_below_what_float16_holds(impl, needed):
    """Probabilities of about 1e-8; a gradient in float16 is none unless the others' numbers are large."""
    m, n, d = 40, 60, 16
    q, k, lse = joint_inputs(m, n, d, 2, torch.float16)
    q, k = (q / 2**10, k * 2**10) if needed == "q" else (q * 2**10, k / 2**10)
    leaf = {"q": q, "k": k}[needed].requires_grad_()
    lse = lse + 11
    maps = ops.maps_from_lse(q, k, lse, [5, 2, 9], impl=impl)
    weights = randn(*maps.shape, dtype=torch.float32, seed=7)
    (ours,) = torch.autograd.grad(maps, leaf, weights)

    def total(order, q, k):
        found = plain(q[..., order], k[..., order], lse.to(torch.promote_types(q.dtype, lse.dtype)), [5, 2, 9])
        return (found * weights.to(found.dtype)).sum()

    (expected,) = plain_gradients(total, [q, k])
    assert expected.truth.abs().amax() > 1e-4
    assert_rows_close(ours, expected, torch.float16, f"d{needed}")


@pytest.mark.parametrize(("impl", "reduce"), pairs(["reference", "eager"], REDUCTIONS))
def test_with_the_gradient_of_the_logsumexp_they_are_attentions(impl, reduce):
    """The derivative through both ways is that of the softmax."""
    leaves = [x.requires_grad_() for x in joint_inputs(20, 30, 8, 2, torch.float64)[:2]]
    weights = randn(2, 2, 3, 20, dtype=torch.float64, seed=7)
    weights = weights if reduce == "none" else weights[:, 0]
    how = {"reduce": reduce, "impl": impl}
    lse = ops.attention(leaves[0], leaves[1], leaves[1], return_lse=True, impl=impl)[1]
    ours = ops.maps_from_lse(*leaves, lse, IDS["padded"], **how)
    expected = ops.attention_with_maps(leaves[0], leaves[1], leaves[1], IDS["padded"], **how)[1]
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weights) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("ids", "reduce", "impl"), pairs(list(IDS), REDUCTIONS, ["reference", "eager"]))
def test_gradcheck(impl, reduce, ids):
    leaves = [x.requires_grad_() for x in joint_inputs(6, 14, 8, 2, torch.float64, 2.0)]
    assert gradcheck(lambda *x: ops.maps_from_lse(*x, IDS[ids], reduce=reduce, impl=impl), leaves, fast_mode=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.full
@pytest.mark.parametrize(("programs", "reduce"), pairs([1, 1000], REDUCTIONS))
def test_kernels_share_heads_rows_and_columns(programs, reduce):
    """All of them in one program, and in many, whose parts are added."""
    launch = importlib.import_module("attnctl_fast.kernels._launch")
    use = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    names = [f"maps_from_lse_{name}" for name in ("fwd", "bwd_rows", "bwd_columns", "bwd_merge")]
    table = {
        name: [{"use": use if name.endswith(("rows", "merge")) else {**use, "PROGRAMS": programs}}] for name in names
    }
    with launch.forced(table):
        for ids in (MANY[:20], [[3, -1, 6], [-1, 2, 0]]):
            check_gradients("triton", torch.float32, (70, 80, 16, 9), ids, reduce)
            q, k, lse = joint_inputs(70, 80, 16, 9, torch.float32)
            maps = ops.maps_from_lse(q, k, lse, ids, reduce=reduce, impl="triton")
            assert_right(maps, plain, q, k, lse, ids, reduce, what="maps")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_of_ids_a_scale_and_any_strides(impl):
    dtype = widest(impl)
    q = randn(2, 2, 8, 16, dtype=dtype, seed=1).mT
    k = randn(2, 2, 9, 16, dtype=dtype, seed=2)[..., ::2]
    lse, weights = randn(2, 16, 2, dtype=dtype, seed=3).mT, randn(2, 16, 2, dtype=dtype, seed=4).mT
    leaves = [x.requires_grad_() for x in (q, k, lse)]
    ids = torch.tensor([[3, 0], [8, -1]], device=DEVICE)
    ours = ops.maps_from_lse(q, k, lse, ids, scale=0.7, impl=impl)
    expected = plain(q, k, lse, ids.tolist(), scale=0.7)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(*(torch.autograd.grad(x, leaves, weights) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "reduce", "keyed"), pairs(IMPLS, REDUCTIONS, [False, True]))
def test_a_row_without_columns_is_zeros(impl, reduce, keyed):
    """And so are the gradients; with a key_bias, its logits may be -inf themselves."""
    leaves = [x.requires_grad_() for x in joint_inputs(20, 30, 8, 2, widest(impl))]
    key_bias = torch.zeros(2, 30, device=DEVICE) if keyed else None
    if key_bias is not None:
        key_bias[1] = -torch.inf
    lse = leaves[2].detach().clone()
    lse[0, 1, 3] = -torch.inf
    lse[1] = -torch.inf
    leaves[2] = lse.requires_grad_()
    maps = ops.maps_from_lse(*leaves, [4, 1], reduce=reduce, key_bias=key_bias, impl=impl)
    gradients = torch.autograd.grad(maps.sum(), leaves)
    assert not maps.isnan().any() and all(not x.isnan().any() for x in gradients)
    assert (maps[1] == 0).all() and all((x[1] == 0).all() for x in gradients)
    assert (gradients[0][0, 1, 3] == 0).all() and gradients[2][0, 1, 3] == 0
    assert (maps[0, 1, :, 3] == 0).all() if reduce == "none" else (maps[0, :, 3] != 0).all()
    assert gradients[0][0].any() and gradients[1][0].any()


@pytest.mark.parametrize(("batch", "contiguous"), [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize("impl", IMPLS)
@torch.no_grad()
def test_without_gradients_samples_are_each_their_own(impl, batch, contiguous):
    """Eager makes the maps of one sample at once, and of several whose heads lie one behind the other."""
    q, k, lse = joint_inputs(20, 30, 8, 2, torch.float32, batch=batch)
    q = q.contiguous() if contiguous else q
    assert q.is_contiguous() == contiguous
    lse = lse.clone()
    lse[-1, :, 3] = -torch.inf
    maps = ops.maps_from_lse(q, k, lse, [4, 1], impl=impl)
    expected = ops.maps_from_lse(q.double(), k.double(), lse.double(), [4, 1], impl="reference")
    torch.testing.assert_close(maps, expected.float())
    assert (maps[-1, :, 3] == 0).all() and (maps[-1, :, 4] != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_only_chosen_keys_have_a_gradient(impl):
    q, k, lse = joint_inputs(20, 30, 8, 2, torch.float32)
    maps = ops.maps_from_lse(q, k.requires_grad_(), lse, [[3, -1, 6], [-1, 2, 0]], impl=impl)
    (dk,) = torch.autograd.grad(maps.square().sum(), k)
    named = torch.zeros(2, 30, dtype=torch.bool, device=DEVICE)
    named[0, [3, 6]] = named[1, [2, 0]] = True
    assert torch.equal(dk.any(-1).all(1), named) and torch.equal(dk.any(-1).any(1), named)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    q, k, lse = joint_inputs(16, 20, 8, 2, torch.float32)
    q, lse = q.clone(), lse.clone()
    q[0, 1, 3] = lse[0, 0, 5] = torch.nan
    maps = ops.maps_from_lse(q, k, lse, [[2], [-1]], impl=impl)
    expected = torch.zeros(2, 16, dtype=torch.bool, device=DEVICE)
    expected[0, [3, 5]] = True
    assert torch.equal(maps.isnan()[:, 0], expected)


@pytest.mark.parametrize("impl", FAST)
def test_autocast_changes_nothing(impl):
    leaves = [x.requires_grad_() for x in joint_inputs(16, 20, 8, 2, torch.float32)]

    def run(enabled):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            maps = ops.maps_from_lse(*leaves, [3], impl=impl)
        return [maps, *torch.autograd.grad(maps.square().sum(), leaves)]

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_maps_may_be_changed_in_place():
    """What the backward pass reads is not what is returned."""
    leaves = [x.requires_grad_() for x in joint_inputs(16, 20, 8, 2, torch.float64)]
    for reduce in REDUCTIONS:
        plainly, changed = (ops.maps_from_lse(*leaves, [3, 5], reduce=reduce, impl="eager") for _ in range(2))
        for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (2 * plainly, changed.mul_(2))), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [False, True])
def test_kept_or_made_again_the_gradients_are_the_same(keep, monkeypatch):
    module = importlib.import_module("attnctl_fast.ops.maps_from_lse")
    monkeypatch.setattr(module, "may_hold_columns", lambda *_: keep)
    monkeypatch.setattr(module, "TILE", 1)
    monkeypatch.setattr(module, "LEAST_ROWS", 7)
    for reduce in REDUCTIONS:
        check_gradients("eager", torch.float32, (40, 60, 16, 2), IDS["padded"], reduce)
        check_gradients("eager", torch.float16, (40, 60, 16, 2), IDS["few"], reduce)


@pytest.mark.parametrize("impl", FAST)
@torch.no_grad()
def test_the_maps_of_all_heads_are_never_held(impl, monkeypatch):
    """Below the registered operations, into which a dispatch mode does not see."""
    m, n, heads = 512, 64, 16
    q, k, lse = joint_inputs(m, 600, 8, heads, torch.float32, batch=1)
    given = [q, k, lse, torch.arange(n, device=DEVICE), None, False, 0.3]
    with Largest() as largest:
        if impl == "eager":
            module = importlib.import_module("attnctl_fast.ops.maps_from_lse")
            monkeypatch.setattr(module, "TILE", 1 << 16)
            maps, kept = module._forward(*given, False)
            grads = module._backward(torch.ones_like(maps), *given, kept, [True] * 3)
        else:
            kernels = importlib.import_module("attnctl_fast.kernels.maps_from_lse")
            maps = kernels.maps_from_lse(*given)
            grads = kernels.maps_from_lse_backward(torch.ones_like(maps), *given, [True] * 3)
    assert all(x is not None and x.numel() for x in grads)
    assert maps.nbytes <= largest.size <= heads * m * n * 4 // 4


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_an_id_beyond_the_columns_is_written_nowhere():
    """Ids that lie on a GPU are trusted, but one of another prompt must not write over another head's gradient."""
    kernels = importlib.import_module("attnctl_fast.kernels.maps_from_lse")
    (q, k, lse), ids = joint_inputs(16, 20, 8, 2, torch.float32), torch.tensor([19], device=DEVICE)
    given = (q, k[:, :, :19], lse, ids, None, False, 0.3)
    _, dk, _ = kernels.maps_from_lse_backward(torch.ones(2, 1, 16, device=DEVICE), *given, [False, True, False])
    assert not dk.any()


def test_errors():
    q, k, lse = joint_inputs(16, 20, 8, 2, torch.float32)
    ids = [3]
    for arguments, how, text in (
        ((q, k, lse, None), {}, "token_ids is None; name the columns of k whose maps are wanted"),
        ((q, k, lse, []), {}, "token_ids is empty; name at least one column of k"),
        ((q, k, lse, [20]), {}, "token_ids holds 20, but the context has tokens 0..19"),
        ((q, k, lse, [2, 2]), {}, "token_ids holds 2 more than once"),
        ((q, k, lse, [[1]]), {}, "it must be [T] or [batch, T] with batch 2"),
        ((q, k, lse, ids), {"reduce": "sum"}, "reduce is 'sum'; it must be 'mean'"),
        ((q, k, lse, ids), {"scale": float("nan")}, "scale is nan; it must be finite"),
        ((q, k, lse[:, :1], ids), {}, "lse has shape (2, 1, 16); it must be [batch, heads, image tokens] = [2, 2, 16]"),
        ((q, k, lse.half(), ids), {}, "lse has dtype torch.float16; with q in torch.float32 it must be torch.float32"),
        ((q, k, lse.double(), ids), {}, "lse has dtype torch.float64; with q in torch.float32 it must be"),
        ((q.double(), k.double(), lse, ids), {}, "with q in torch.float64 it must be torch.float64"),
        ((q, k, lse.to("meta"), ids), {}, "lse is on meta but q is on"),
        ((q[:, :1], k, lse, ids), {}, "must agree in batch, heads and head width"),
        ((q, k, lse, ids), {"key_bias": torch.zeros(2, 19)}, "key_bias is torch.float32 of shape (2, 19)"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            ops.maps_from_lse(*arguments, **how)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_limits_of_the_kernels():
    for dtype, width, text in ((torch.float64, 8, "not torch.float64"), (torch.float32, 257, "8 to 256, not 257")):
        with pytest.raises(ValueError, match=text):
            ops.maps_from_lse(*joint_inputs(4, 4, width, 1, dtype), [1], impl="triton")
