"""Bad input: an error that names the value and the remedy."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import attnctl_fast as ac
from attnctl_fast import ops
from bench.ops.inputs import attention_inputs, rand, randn
from tests.support.numerics import DEVICE, TRITON


@pytest.fixture
def qkv():
    return attention_inputs(2, 2, 16, 9, 8, torch.float32)


def refused(text, function, *arguments, **keywords):
    with pytest.raises(ValueError, match=re.escape(text)):
        function(*arguments, **keywords)


@pytest.mark.parametrize("attend", [ops.attention, lambda q, k, v: ops.target_statistics(q, k, v, [0])])
def test_shapes_dtypes_and_devices(qkv, attend):
    q, k, v = qkv
    refused("q has shape (2, 16, 8); it must be [batch, heads, tokens, head width]", attend, q[:, 0], k, v)
    refused("k has dtype torch.float16 but q has torch.float32; cast them", attend, q, k.half(), v)
    refused("q has dtype torch.int32; it must be a floating-point", attend, q.int(), k, v)
    refused(f"v is on meta but q is on {q.device}; move them", attend, q, k, v.to("meta"))
    refused("k has shape (2, 2, 9, 8) but v has (2, 2, 8, 8)", attend, q, k, v[:, :, 1:])
    refused("must agree in batch, heads and head width", attend, q[:, :1], k, v)
    refused("q has shape (2, 2, 0, 8): every dimension must be at least 1", attend, q[:, :, :0], k, v)
    refused("k has shape (2, 2, 0, 8): every dimension must be at least 1", attend, q, k[:, :, :0], v[:, :, :0])


def test_target_ids(qkv):
    statistics = lambda ids, **how: ops.target_statistics(*qkv, ids, **how)  # noqa: E731
    refused("target_ids is empty; name at least one", statistics, [])
    refused("target_ids holds 9, but the context has tokens 0..8", statistics, [3, 9])
    refused(
        "target_ids holds -1, but the context has tokens 0..8; -1 pads only the [batch, T] form", statistics, [3, -1]
    )
    refused("target_ids holds -2, but the context has tokens 0..8", statistics, [[3, -2], [1, -1]])
    refused("target_ids holds 3 more than once: [3, 3]", statistics, [3, 3])
    refused("target_ids holds 3 more than once: [3, 3]", statistics, torch.tensor([[1, 2], [3, 3]]))
    refused("target_ids names 10 tokens, but the context has only 9", statistics, torch.arange(10))
    refused(
        "target_ids has dtype torch.int32; it must be torch.int64", statistics, torch.tensor([1], dtype=torch.int32)
    )
    refused("target_ids has shape (3, 1); it must be [T] or [batch, T] with batch 2", statistics, [[1], [2], [3]])
    refused("target_ids mixes ids and lists of ids: [[1], 2]", statistics, [[1], 2])
    refused("target_ids holds 2.7; token ids are ints", statistics, [2.7])
    refused("target_ids holds 'bag'; token ids are ints", statistics, ["bag"])
    refused("target_ids holds True; token ids are ints", statistics, np.array([True, False]))
    refused("target_ids is 3; it must be token ids", statistics, 3)
    refused("target_ids is 'bag'; it must be token ids", statistics, "bag")
    refused("target_ids holds 3 more than once", statistics, [torch.tensor(3), torch.tensor(3)])
    refused("token 3 is both in target_ids and in pinned_ids", statistics, [3], pinned_ids=[0, 3])
    refused("token 3 is both in target_ids and in pinned_ids", statistics, torch.tensor([[1], [3]]), pinned_ids=[0, 3])


def test_ids_that_a_graph_reads_outlive_the_cache(monkeypatch):
    module = importlib.import_module("attnctl_fast._validate")
    monkeypatch.setattr(module, "_captured", {})
    k = torch.zeros(1, 1, 9, 8, device=DEVICE)
    plain = module.check_columns([1, 2], k)
    assert not module._captured
    monkeypatch.setattr(module, "_capturing", lambda device: True)
    captured = module.check_columns([1, 2], k)
    module._kept.cache_clear()
    assert captured is plain and [*module._captured.values()][0] is plain


def test_bias_and_statistics_that_do_not_fit(qkv):
    q, k, v = qkv
    stats = ops.target_statistics(q, k, v, [3, 5], pinned_ids=[0])
    merge = ops.merge_targets
    refused("target_ids names 1 tokens, but the statistics hold 2", merge, stats, v, [3], pinned_ids=[0])
    refused("pinned_ids names 0 tokens, but the statistics hold 1 pinned", merge, stats, v, [3, 5])
    refused(
        "must be a float tensor [B,H,T,M] = [2, 2, 2, 16]",
        merge,
        stats,
        v,
        [3, 5],
        torch.zeros(2, 2, 1, 16, device=DEVICE),
        pinned_ids=[0],
    )
    two = torch.zeros(2, 2, 2, 16, device=DEVICE)
    refused("must be a float tensor [B,H,T,M] = [2, 2, 1, 16]", ops.biased_attention, q, k, v, two, [3])
    refused("bias is on meta", ops.biased_attention, q, k, v, torch.zeros(2, 2, 1, 16, device="meta"), [3])
    refused(
        "v has shape (2, 2, 9, 4), which does not fit rest_out (2, 2, 16, 8)",
        merge,
        stats,
        v[..., :4],
        [3, 5],
        pinned_ids=[0],
    )
    refused("must be a float tensor [B,H,T,M] = [2, 2, 2, 16]", ops.regulation_loss, stats, two[..., :15])


def test_numbers_and_weights_on_another_device(qkv):
    """A kernel gets addresses, which look alike everywhere."""
    q, k, v = qkv
    number = torch.ones((), device="meta")
    refused(f"weight is on meta but q is on {q.device}; move it there", ops.entmax_attention, q, k, v, weight=number)
    how = {"scale": 3.0, "tau": 2.5, "alpha": number, "norm": 2}
    refused(f"alpha is on meta but q is on {q.device}", ops.normalized_guidance, q, k, v, k, v, **how)
    theta = torch.zeros(2, 2, 1, 1, 1, device="meta")
    refused(f"theta is on meta but q is on {q.device}", ops.regulated_attention, q, k, v, theta, [3], (4, 4))
    stats, bias = ops.target_statistics(q, k, v, [3]), rand(2, 2, 1, 16)
    refused("theta is on meta but the bias is on", ops.regulation_loss, stats, bias, theta=theta)
    elsewhere = stats._replace(rest_lse=stats.rest_lse.to("meta"))
    refused("rest_lse is on meta but logits is on", ops.regulate, elsewhere, (4, 4))
    refused("rest_lse is on meta but logits is on", ops.regulation_loss, elsewhere, bias)


def test_dtypes_of_what_is_added(qkv):
    q, k, v = qkv
    stats = ops.target_statistics(q, k, v, [3], with_square=True)
    bias, theta = rand(2, 2, 1, 16), rand(2, 2, 1, 1, 1)
    wide = "is torch.float64 but the computation is torch.float32; cast it"
    refused(f"bias {wide}", ops.biased_attention, q, k, v, bias.double(), [3])
    refused(f"bias {wide}", ops.merge_targets, stats, v, [3], bias.double())
    refused(f"bias {wide}", ops.regulation_loss, stats, bias.double())
    refused(f"theta {wide}", ops.regulation_loss, stats, bias, theta=theta.double())
    refused(f"theta {wide}", ops.regulated_attention, q, k, v, theta.double(), [3], (4, 4))
    half = bias.bfloat16()
    torch.testing.assert_close(ops.regulation_loss(stats, half), ops.regulation_loss(stats, half.float()))
    torch.testing.assert_close(
        ops.biased_attention(q, k, v, half, [3]), ops.biased_attention(q, k, v, half.float(), [3])
    )
    narrow = stats._replace(logits=stats.logits.bfloat16())
    refused("the statistics hold logits in torch.bfloat16", ops.regulate, narrow, (4, 4))
    refused("the statistics hold logits in torch.bfloat16", ops.regulation_loss, narrow, bias)
    for shape in ((2, 2, 2, 1, 1), (2, 2, 1, 9), (1, 1, 1, 1, 1)):
        refused("theta is torch.float32 of shape", ops.regulation_loss, stats, bias, theta=rand(*shape))


def test_values_that_do_not_fit_the_statistics(qkv):
    q, k, v = qkv
    stats = ops.target_statistics(q, k, v, [3])
    refused("v has shape (9, 8), which does not fit rest_out", ops.merge_targets, stats, v[0, 0], [3])
    wanted = f"it must be a float tensor on {q.device}"
    refused(f"v is torch.int32 on {q.device}; {wanted}", ops.merge_targets, stats, v.int(), [3])
    refused(f"v is torch.float32 on meta; {wanted}", ops.merge_targets, stats, v.to("meta"), [3])


def test_grid_sigma_and_centres(qkv):
    stats = ops.target_statistics(*qkv, [3])
    refused("grid 3x5 has 15 cells, but there are 16 image tokens", ops.regulate, stats, (3, 5))
    refused("grid is (4.0, 4.0); it must be (height, width), two ints", ops.regulate, stats, (4.0, 4.0))
    refused("grid is 16; it must be (height, width)", ops.basis_shape, 16)
    refused("sigma is (1, 1, 1); it must be one number or", ops.basis_shape, (8, 8), (1, 1, 1))
    refused("grid is (0, 16); it must be (height, width)", ops.regulate, stats, (0, 16))
    refused("sigma is 0; it must be positive", ops.regulate, stats, (4, 4), sigma=0)
    refused("sigma is (1.0, -2.0); it must be positive", ops.regulate, stats, (4, 4), sigma=(1.0, -2.0))
    refused("sigma is nan", ops.regulate, stats, (4, 4), sigma=float("nan"))
    refused("the grid's height 2 holds no centre for sigma 1", ops.regulate, stats, (2, 8))
    refused("the grid's width 4 holds no centre for sigma 3", ops.regulate, stats, (4, 4), sigma=(1.0, 3.0))
    refused("centres is 'grid'; it must be one of 'official', 'paper'", ops.basis_shape, (8, 8), centres="grid")
    theta = torch.zeros(2, 2, 1, 2, 1, device=DEVICE)
    refused(
        "theta has 2x1 centres, but this grid, sigma and centres give 1x1", ops.regulate, stats, (4, 4), theta=theta
    )
    refused("theta is torch.float32 of shape (2, 2, 1, 2)", ops.gaussian_bias, theta[..., 0], (4, 4))
    refused(
        f"theta is torch.float64 on {theta.device}, but the statistics are torch.float32 on {theta.device}; cast it",
        ops.regulate,
        stats,
        (4, 4),
        theta=theta[:, :, :, :1].double(),
    )
    refused("grid 3x5 has 15 cells", ops.regulated_attention, *qkv, theta[:, :, :, :1], [3], (3, 5))


def test_objective_and_steps(qkv):
    stats = ops.target_statistics(*qkv, [3])
    refused(
        "objective is 'papers'; it must be one of 'official', 'paper'", ops.regulate, stats, (4, 4), objective="papers"
    )
    refused(
        "objective 'paper' needs stats.rest_square; call target_statistics(..., with_square=True)",
        ops.regulate,
        stats,
        (4, 4),
        objective="paper",
    )
    refused("steps is 0; it must be an int of at least 1", ops.regulate, stats, (4, 4), steps=0)
    refused("steps is 3.0; it must be an int", ops.regulate, stats, (4, 4), steps=3.0)
    refused("step_size is nan; it must be finite", ops.regulate, stats, (4, 4), step_size=float("nan"))
    refused("scale is nan; it must be finite", ops.attention, *qkv, scale=float("nan"))
    refused("select is 'best'", ops.regulate, stats, (4, 4), select="best")
    refused("quantile is 1.5; it must be in [0, 1]", ops.regulation_loss, stats, stats.logits, quantile=1.5)


def test_implementations(qkv):
    refused("impl is 'cuda'; it must be one of 'reference', 'eager', 'triton'", ops.attention, *qkv, impl="cuda")
    with pytest.raises(ValueError, match="impl is 'fast'"), ac.use("fast"):
        pass
    ops.attention(*qkv)


KERNELS = {"impl": "triton"}
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")


@needs_triton
def test_what_the_kernels_do_not_take():
    def made(width, dtype=torch.float32, tokens=80):
        return attention_inputs(1, 1, 16, tokens, width, dtype)

    def statistics(width, ids=(3,), pinned_ids=(), dtype=torch.float32):
        return ops.target_statistics(*made(width, dtype), list(ids), pinned_ids=list(pinned_ids), **KERNELS)

    wide = "the Triton kernels take float16, bfloat16 and float32, not torch.float64; cast, or use impl='eager'"
    q, k, v = made(8, torch.float64)
    bias, theta = randn(1, 1, 1, 16, dtype=q.dtype, seed=4), rand(1, 1, 1, 1, 1, dtype=q.dtype)
    stats = ops.target_statistics(q, k, v, [3], with_square=True, impl="eager")
    refused(wide, ops.attention, q, k, v, **KERNELS)
    refused(wide, statistics, 8, dtype=torch.float64)
    refused(wide, ops.biased_attention, q, k, v, bias, [3], **KERNELS)
    refused(wide, ops.regulated_attention, q, k, v, theta, [3], (4, 4), **KERNELS)
    refused(wide, ops.merge_targets, stats, v, [3], bias, **KERNELS)
    refused(wide, ops.gaussian_bias, theta, (4, 4), **KERNELS)
    refused(wide, ops.regulation_loss, stats, bias, **KERNELS)
    refused(wide, ops.regulate, stats, (4, 4), **KERNELS)
    for width in (4, 264):
        refused(f"the Triton kernels take head widths 8 to 256, not {width}; use impl='eager'", statistics, width)
        refused(f"head widths 8 to 256, not {width}", ops.attention, *made(width), **KERNELS)
    many = "the Triton kernels take at most 64 target and pinned tokens together, not 66; name fewer"
    refused(many, statistics, 8, range(64), pinned_ids=[70, 71])
    half = torch.zeros(1, 1, 64, 16, device=DEVICE)
    refused(many, ops.biased_attention, *made(8), half, list(range(64)), pinned_ids=[70, 71], **KERNELS)


@needs_triton
def test_the_kernels_run_up_to_their_limits():
    q, k, v = attention_inputs(1, 1, 16, 80, 256, torch.float32)
    ids, pinned = list(range(62)), [70, 71]
    bias = randn(1, 1, 62, 16, dtype=torch.float32, seed=4)
    ours, expected = (ops.biased_attention(q, k, v, bias, ids, pinned_ids=pinned, impl=i) for i in ("triton", "eager"))
    torch.testing.assert_close(ours, expected)


@needs_triton
def test_tensors_where_no_kernel_runs(qkv):
    q, k, v = (x.to("meta") for x in qkv)
    refused("the implementation is 'triton', but the tensors are on meta; move them", ops.attention, q, k, v, **KERNELS)


ENVIRONMENT = """
import importlib, os, sys, torch
from attnctl_fast import _impl
for os.environ["ATTNCTL_IMPL"] in sys.argv[2:]:
    importlib.reload(_impl)
    try:
        print(_impl.resolve(None, torch.device(sys.argv[1])))
    except ValueError as error:
        print(error)
"""


def test_environment_variable():
    expected = {
        "reference": "reference",
        **({"triton": "triton"} if TRITON else {}),
        "": "triton" if DEVICE.type == "cuda" else "eager",
        "nonsense": "the environment variable ATTNCTL_IMPL is 'nonsense'; it must be one of",
    }
    command = [sys.executable, "-c", ENVIRONMENT, DEVICE.type, *expected]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(expected)
    assert all(line.startswith(start) for line, start in zip(said, expected.values(), strict=True)), said


def test_maps_and_their_smoothing():
    maps = rand(2, 3, 24)
    refused("maps has shape (2, 24); it must be [batch, tokens, image tokens]", ops.map_similarity, maps[:, 0])
    refused("maps has dtype torch.int64; it must be a floating-point", ops.map_similarity, maps.long())
    refused("maps has shape (2, 0, 24): every dimension must be at least 1", ops.map_similarity, maps[:, :0])
    refused("grid 4x5 has 20 cells, but there are 24 image tokens", ops.smooth_maps, maps, (4, 5))
    for size in (2, 0, 3.0, True):
        refused(f"kernel_size is {size!r}; it must be an odd int", ops.smooth_maps, maps, (4, 6), kernel_size=size)
    refused("sigma is 0; it must be positive and finite", ops.smooth_maps, maps, (4, 6), sigma=0)
    refused(
        "a kernel of 9 reflects 4 cells at each border, but the grid is 4x6; pass a smaller kernel_size",
        ops.smooth_maps,
        maps,
        (4, 6),
        kernel_size=9,
    )
    refused("choose a layer with a larger grid", ops.smooth_maps, maps[..., :6], (1, 6))


def test_similarity_loss():
    maps, text = rand(2, 3, 24), rand(3, 3)

    def loss(given=text, **how):
        return ops.similarity_loss(maps, given, (4, 6), **how)

    refused("variant is 'l2'; it must be one of 'cosine', 'normalised_cosine', 'absolute'", loss, variant="l2")
    refused("weight is nan; it must be finite", loss, weight=float("nan"))
    refused("text_similarity has shape (2, 2); it must be [3, 3] or [2, 3, 3]", loss, text[:2, :2])
    refused(
        "text_similarity requires a gradient, but the loss has none by it; detach() it",
        loss,
        rand(3, 3).requires_grad_(),
    )
    refused("text_similarity is torch.float64 but the computation is torch.float32", loss, text.double())
    refused(f"text_similarity is on meta but maps is on {maps.device}; move it", loss, text.to("meta"))
    refused("lengths has dtype torch.float32; it must be torch.int64", loss, lengths=torch.ones(2))
    refused("lengths has shape (3,); it must be one number per sample [2]", loss, lengths=[1, 2, 3])
    refused("lengths holds 4, but the maps are of 3 tokens", loss, lengths=[3, 4])
    refused("lengths is [1.5, 2]; it must be one int per sample", loss, lengths=[1.5, 2])


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_limits_of_the_map_kernels():
    refused(
        "take float16, bfloat16 and float32, not torch.float64",
        ops.smooth_maps,
        rand(1, 2, 24).double(),
        (4, 6),
        impl="triton",
    )
    refused(
        "a kernel_size of at most 7, not 9; use impl='eager'",
        ops.smooth_maps,
        rand(1, 2, 64),
        (8, 8),
        kernel_size=9,
        impl="triton",
    )
    refused(
        "the maps of at most 64 tokens, not 65; pass fewer, or use impl='eager'",
        ops.map_similarity,
        rand(1, 65, 4),
        impl="triton",
    )
