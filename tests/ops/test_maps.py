"""attention_with_maps against float64 truth: the output, the maps, and the gradients through both."""

from __future__ import annotations

import importlib
import itertools
import re

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl_fast import ops
from attnctl_fast.ops import _tiled
from bench.ops.inputs import attention_inputs, randn
from tests.support.marks import pairs
from tests.support.numerics import (
    DEVICE,
    FAST,
    IMPLS,
    TRITON,
    assert_right,
    assert_rows_close,
    carried_through_maps,
    carried_to_maps,
    chosen_maps,
    plain_gradients,
    widest,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "none"]
# (M, N, d, H): on chip and not, one piece and two of the head and of the context.
SHAPES = [(1, 1, 8, 1), (63, 77, 40, 3), (64, 120, 80, 2), (65, 20, 160, 2), (64, 154, 16, 3)]
IDS = {"all": None, "few": [5, 2], "one for each": [[7], [1]], "padded": [[3, -1, 6], [-1, -1, 0]], "none": [[-1], [2]]}


def chosen(ids, n):
    """`ids` inside of a context of n tokens."""
    if n >= 8 or ids is None:
        return ids
    return [0] if isinstance(ids[0], int) else [[0 if i >= 0 else -1 for i in row[:n]] for row in ids]


def per_sample(ids, batch=2):
    return [ids] * batch if ids is not None and isinstance(ids[0], int) else ids


def plain(q, k, v, ids=None, reduce="mean", scale=None):
    """The full softmax in the inputs' dtype."""
    probabilities = ((q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)).softmax(-1)
    return probabilities @ v, chosen_maps(probabilities, per_sample(ids), reduce)


def plain_maps(q, k, ids, reduce):
    """In float32, as only q and k are rounded; with the queries scaled, as in scaled_dot_product_attention: one
    rounding more than with the logits scaled."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    return plain(q * q.shape[-1] ** -0.5, k, k, ids, reduce, 1.0)[1]


def check_forward(impl, dtype, m, n, d, heads, ids, reduce, sharp=1.0):
    q, k, v = attention_inputs(2, heads, m, n, d, dtype, sharp, strided=True)
    out, maps = ops.attention_with_maps(q, k, v, ids, reduce=reduce, impl=impl)
    assert out.dtype == dtype and maps.dtype == torch.float32 and maps.is_contiguous()
    assert_right(out, lambda *x: plain(*x)[0], q, k, v)
    carried = 0.0
    if impl == "triton" and (dtype == torch.float32 or n > 128):
        carried = carried_to_maps(q, k, per_sample(ids), reduce, d**-0.5)
    assert_right(maps, plain_maps, q, k, ids, reduce, what="maps", carried=carried)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d", "heads", "reduce"), pairs(IMPLS, DTYPES, SHAPES, REDUCTIONS))
def test_out_and_maps(impl, dtype, m, n, d, heads, reduce):
    for ids in (None, [[3, -1, 6], [-1, 2, 0]]):
        check_forward(impl, dtype, m, n, d, heads, chosen(ids, n), reduce)


@pytest.mark.parametrize(("ids", "impl", "reduce"), pairs(list(IDS), IMPLS, REDUCTIONS))
def test_ids_and_sharp_maps(impl, ids, reduce):
    check_forward(impl, torch.float32, 40, 20, 16, 2, IDS[ids], reduce, sharp=8.0)


def through(outputs, weights):
    return sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True) if w is not None)


def check_gradients(impl, dtype, shape, ids, reduce, used, sharp=1.0, needed="qkv"):
    """`used`: whether the output and the maps have a gradient."""
    m, n, d, heads = shape
    leaves = dict(zip("qkv", attention_inputs(2, heads, m, n, d, dtype, sharp, strided=True), strict=True))
    for name in needed:
        leaves[name].requires_grad_()
    wanted = [leaves[name] for name in needed]
    out, maps = ops.attention_with_maps(*leaves.values(), ids, reduce=reduce, impl=impl)
    weights = [
        randn(*x.shape, dtype=torch.float32, seed=seed).to(x.dtype) if use else None
        for seed, x, use in zip((7, 8), (out, maps), used, strict=True)
    ]
    ours = torch.autograd.grad(through((out, maps), weights), wanted, materialize_grads=True)

    def total(order, q, k, v):
        return through(plain(q[..., order], k[..., order], v, ids, reduce), weights)

    carried = carried_through_maps(*(x.detach() for x in leaves.values()), *weights, per_sample(ids), d**-0.5)
    for name, a, b in zip(needed, ours, plain_gradients(total, list(leaves.values())), strict=True):
        assert_rows_close(a, b, dtype, f"d{name}", carried[name])


USED = {"both": (True, True), "maps": (False, True), "out": (True, False)}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "used", "reduce"), pairs(FAST, DTYPES, list(USED), REDUCTIONS))
def test_gradients(impl, dtype, used, reduce):
    check_gradients(impl, dtype, (40, 20, 40, 2), [[3, -1, 6], [-1, 2, 0]], reduce, USED[used])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "used", "reduce"), pairs(FAST, ["maps", "both"], REDUCTIONS))
def test_gradients_of_few_among_many(impl, used, reduce, monkeypatch):
    """Of columns that the eager form takes out one by one, where the caches do not hold all of them."""
    monkeypatch.setattr(_tiled, "TILE", 1)
    check_gradients(impl, torch.float32, (40, 24, 40, 2), [[3, -1, 6], [-1, 2, 0]], reduce, USED[used])


@pytest.mark.parametrize(("impl", "dtype", "used", "needed"), pairs(FAST, DTYPES, list(USED), ["q", "qkv"]))
def test_gradients_of_a_few_words(impl, dtype, used, needed):
    """The same of every sample, of a map that the eager form holds in differentiable operations."""
    check_gradients(impl, dtype, (40, 24, 40, 2), [3, 6], "mean", USED[used], needed=needed)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize(("d", "programs", "needed"), pairs([40, 64], [1, 12], ["q", "qkv"]))
def test_a_backward_program_goes_over_several_tiles(d, programs, needed):
    """All of them in one program, and several parts, the last one shorter."""
    launch = importlib.import_module("attnctl_fast.kernels._launch")
    use = launch.read_table("default")["attention_bwd_short"][0]["use"]
    with launch.forced({"attention_bwd_short": [{"use": {**use, "BLOCK_M": 16, "PROGRAMS": programs}}]}):
        check_gradients("triton", torch.float16, (100, 77, d, 2), [3, 6], "mean", USED["both"], needed=needed)


@pytest.mark.parametrize(("impl", "ids", "used"), pairs(FAST, list(IDS), list(USED)))
def test_gradients_of_sharp_maps(impl, ids, used):
    check_gradients(impl, torch.float32, (33, 20, 16, 3), IDS[ids], "mean", USED[used], sharp=6.0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("needed", ["".join(x) for size in (1, 2, 3) for x in itertools.combinations("qkv", size)])
def test_every_subset_of_gradients(impl, needed):
    for used in USED.values():
        if needed == "v" and not used[0]:
            continue  # no map depends on v
        check_gradients(impl, torch.float32, (20, 9, 8, 2), [4, 1], "mean", used, needed=needed)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_map_depends_on_v(impl):
    leaves = [x.requires_grad_() for x in attention_inputs(2, 2, 20, 9, 8, torch.float32)]
    _, maps = ops.attention_with_maps(*leaves, [4, 1], impl=impl)
    dq, dk, dv = torch.autograd.grad(maps.square().sum(), leaves, allow_unused=True)
    assert dv is None and dq.any() and dk.any()


@pytest.mark.parametrize(("ids", "reduce", "impl"), pairs(list(IDS), REDUCTIONS, ["reference", "eager"]))
def test_gradcheck(impl, reduce, ids):
    leaves = [x.requires_grad_() for x in attention_inputs(2, 2, 6, 9, 8, torch.float64, 2.0, strided=True)]
    assert gradcheck(lambda *x: ops.attention_with_maps(*x, IDS[ids], reduce=reduce, impl=impl), leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tensor_of_ids_a_scale_and_any_strides(impl):
    dtype = widest(impl)
    q = randn(2, 2, 8, 16, dtype=dtype, seed=1).mT
    k = randn(2, 2, 9, 16, dtype=dtype, seed=2)[..., ::2]
    v = randn(2, 2, 9, 1, dtype=dtype, seed=3).expand(-1, -1, -1, 8)
    weights = [randn(2, 2, 8, 16, dtype=dtype, seed=4).mT, randn(2, 16, 2, dtype=torch.float32, seed=5).mT]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    ids = torch.tensor([[3, 0], [8, -1]], device=DEVICE)
    ours = ops.attention_with_maps(q, k, v, ids, scale=0.7, impl=impl)
    expected = plain(q, k, v, ids.tolist(), scale=0.7)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(through(x, weights), leaves) for x in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    q, k, v = attention_inputs(2, 2, 16, 9, 8, torch.float32)
    q[0, 1, 3] = torch.nan
    out, maps = ops.attention_with_maps(q, k, v, [[2], [-1]], impl=impl)
    expected = torch.zeros(2, 16, dtype=torch.bool, device=DEVICE)
    expected[0, 3] = True
    assert torch.equal(maps.isnan()[:, 0], expected)
    assert torch.equal(out.isnan().any(-1), expected[:, None] & torch.tensor([[False], [True]], device=DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_leaves_the_precision_alone(impl):
    leaves = [x.requires_grad_() for x in attention_inputs(1, 2, 16, 9, 8, torch.float32)]

    def run(enabled):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            out, maps = ops.attention_with_maps(*leaves, [3], impl=impl)
        return [out, maps, *torch.autograd.grad(out.square().sum() + maps.square().sum(), leaves)]

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.nbytes)
        return made


@pytest.mark.parametrize("ids", [None, range(20, 95)], ids=["all", "many"])
@pytest.mark.parametrize("impl", FAST)
@torch.no_grad()
def test_the_softmax_is_never_held(impl, ids, monkeypatch):
    """Below the registered operations, into which a dispatch mode does not see; eager where it may not hold it."""
    batch, heads, m, n, d = 1, 8, 256, 96, 8
    q, k, v = attention_inputs(batch, heads, m, n, d, torch.float32)
    tokens = None if ids is None else torch.tensor(ids, device=DEVICE)
    module = importlib.import_module("attnctl_fast.ops.attention_with_maps")
    if impl == "eager":
        monkeypatch.setattr(_tiled, "TILE", 1 << 14)
    with Largest() as largest:
        if impl == "eager":
            out, maps, kept = module._forward(q, k, v, tokens, None, False, 0.3, False)
            backward, made = module._backward, [tokens, None, False, 0.3, kept]
        else:
            slots = tokens if tokens is None else module.slot_table(tokens, n)
            settings = [tokens, slots, None, False, 0.3]
            kernels = importlib.import_module("attnctl_fast.kernels.attention_with_maps")
            out, maps, lse = kernels.attention_with_maps(q, k, v, *settings)
            kernels = importlib.import_module("attnctl_fast.kernels.attention_backward")
            backward, made = kernels.attention_with_maps_backward, [*settings, lse]
        grads = backward(torch.ones_like(out), torch.ones_like(maps), q, k, v, *made, [True] * 3)
    assert all(x.numel() for x in grads)
    assert out.nbytes <= largest.size <= batch * heads * m * n * out.itemsize // 4


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_the_kernels_table_of_ids_follows_them():
    """It is kept for as long as they do not change."""
    q, k, v = attention_inputs(1, 1, 16, 9, 8, torch.float16)
    ids = torch.tensor([1, 3], device=DEVICE)
    before = ops.attention_with_maps(q, k, v, ids, impl="triton")[1]
    assert torch.equal(before, ops.attention_with_maps(q, k, v, ids, impl="triton")[1])
    ids += 1
    after = ops.attention_with_maps(q, k, v, ids, impl="triton")[1]
    assert torch.equal(after, ops.attention_with_maps(q, k, v, [2, 4], impl="triton")[1])


def test_errors():
    q, k, v = attention_inputs(2, 2, 16, 9, 8, torch.float32)
    for how, text in (
        ({"reduce": "sum"}, "reduce is 'sum'; it must be 'mean'"),
        ({"token_ids": []}, "token_ids is empty; name at least one token, or pass None for all"),
        ({"token_ids": [9]}, "token_ids holds 9, but the context has tokens 0..8"),
        ({"token_ids": [-1]}, "-1 pads only"),
        ({"token_ids": [2, 2]}, "token_ids holds 2 more than once"),
        ({"token_ids": [[1]]}, "it must be [T] or [batch, T] with batch 2"),
        ({"token_ids": torch.tensor([1.0])}, "it must be torch.int64"),
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            ops.attention_with_maps(q, k, v, **how)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_limits_of_the_kernels():
    for dtype, width, text in ((torch.float64, 8, "not torch.float64"), (torch.float32, 257, "8 to 256, not 257")):
        with pytest.raises(ValueError, match=text):
            ops.attention_with_maps(*attention_inputs(1, 1, 4, 4, width, dtype), impl="triton")
