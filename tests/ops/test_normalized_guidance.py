"""normalized_guidance against the released code's equations with full maps, in float64."""

from __future__ import annotations

import pytest
import torch

from attnctl_fast import ops
from attnctl_fast.ops.normalized_guidance import guided
from bench.ops.inputs import attention_inputs, fenced, randn
from tests.support.marks import pairs
from tests.support.numerics import DEVICE, FAST, IMPLS, assert_right, widest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, N', d): one block and several, one piece of the head and two, texts of other lengths.
SHAPES = [(1, 1, 1, 8), (63, 77, 77, 40), (33, 9, 154, 64), (48, 20, 4, 160)]
NUMBERS = {"scale": 5.0, "tau": 1.5, "alpha": 0.25, "norm": 2}


def plain(q, keys, values, negative_values, numbers, columns):
    """The released code: both attentions with heads side by side. `keys` are of both texts, the first `columns` and the
    others, as one tensor, so that their width can be reordered."""
    scale, tau, alpha, norm = numbers.values()
    positive, negative = (
        ((q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        for k, v in ((keys[:, :, :columns], values), (keys[:, :, columns:], negative_values))
    )
    extended = positive * scale - negative * (scale - 1)
    ratio = torch.norm(extended, norm, -1, True) / torch.norm(positive, norm, -1, True)
    out = extended * torch.clamp(ratio, max=tau) / ratio * alpha + positive * (1 - alpha)
    return out.unflatten(2, (q.shape[1], -1)).transpose(1, 2)


def texts(m, n, other, d, dtype, heads=3, **how):
    q, k, v = attention_inputs(2, heads, m, n, d, dtype, 2.0, **how)
    return q, k, v, *(randn(2, heads, other, d, dtype=dtype, seed=seed, **how) for seed in (31, 32))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "other", "d", "norm"), pairs(IMPLS, DTYPES, SHAPES, [1, 2]))
def test_equals_the_released_code(impl, dtype, m, n, other, d, norm):
    q, k, v, k_negative, v_negative = texts(m, n, other, d, dtype, strided=True)
    numbers = {**NUMBERS, "norm": norm}
    out = ops.normalized_guidance(q, *(fenced(x) for x in (k, v, k_negative, v_negative)), **numbers, impl=impl)
    assert out.dtype == dtype
    assert_right(out, plain, q, torch.cat([k, k_negative], 2), v, v_negative, numbers, k.shape[2])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("impl", IMPLS)
def test_shared_columns_are_columns_of_both_texts(impl):
    q, k, v, k_negative, v_negative = texts(20, 9, 5, 16, widest(impl), strided=True)
    keys, values = (randn(2, 3, 30, 16, dtype=q.dtype, seed=seed) for seed in (41, 42))
    given = [torch.cat(pair, 2) for pair in ((k, keys), (v, values), (k_negative, keys), (v_negative, values))]
    expected = ops.normalized_guidance(q, *given, **NUMBERS, impl="reference")
    shared = ops.attention(q, keys, values, return_lse=True, impl=impl)
    found = ops.normalized_guidance(q, k, v, k_negative, v_negative, **NUMBERS, shared=shared, impl=impl)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Without any column but those.
    masked = torch.full((2, 9), -torch.inf, device=DEVICE)
    given = {"key_bias": masked, "key_bias_negative": masked[:, :5], "shared": shared, "impl": impl}
    alone = ops.normalized_guidance(q, k, v, k_negative, v_negative, **NUMBERS, **given)
    torch.testing.assert_close(alone, shared[0].to(q.dtype), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", [1, 2])
def test_the_norm_is_bounded_and_the_strength_one_is_attention(impl, norm):
    given = texts(32, 9, 9, 16, widest(impl))
    numbers = {"tau": 1.25, "alpha": 1.0, "norm": norm, "impl": impl}
    attended = ops.attention(*given[:3], impl=impl)
    sizes = [
        torch.linalg.vector_norm(x, norm, (1, 3))
        for x in (ops.normalized_guidance(*given, scale=8.0, **numbers), attended)
    ]
    assert (sizes[0] <= sizes[1] * (1.25 + 1e-5)).all() and (sizes[0] > sizes[1] * 1.249).any()
    for changed in (
        {"scale": 1.0, "tau": 1.0},
        {"scale": 8.0, "alpha": 0.0},
        {"scale": 8.0, "alpha": attended.new_zeros(())},
    ):
        torch.testing.assert_close(
            ops.normalized_guidance(*given, **{**numbers, **changed}), attended, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_are_within_any_bound(impl):
    """Where the released code divides by zero: attention that is zero, and guided attention that is."""
    positive = randn(1, 2, 3, 8, dtype=widest(impl), seed=1)
    positive[:, :, 1] = 0
    negative = torch.where(torch.arange(3, device=DEVICE)[:, None] == 2, positive * 2, positive)
    out = guided(positive, negative, scale=2.0, tau=1.0, alpha=0.5, norm=2, impl=impl)
    torch.testing.assert_close(out[:, :, 0], positive[:, :, 0])
    assert (out[:, :, 1] == 0).all()
    torch.testing.assert_close(out[:, :, 2], positive[:, :, 2] / 2)


@pytest.mark.parametrize("impl", FAST)
def test_gradients(impl):
    given = texts(16, 9, 5, 8, torch.float32, heads=2)

    def gradients(impl, *tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(ops.normalized_guidance(*leaves, **NUMBERS, impl=impl).square().sum(), leaves)

    truth = gradients("reference", *(x.double() for x in given))
    for ours, exact in zip(gradients(impl, *given), truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    given = texts(8, 9, 5, 8, torch.float16)
    given[0][0, 1, 3] = torch.nan
    out = ops.normalized_guidance(*given, **NUMBERS, impl=impl)
    assert out[0, :, 3].isnan().all() and out.isnan().sum() == out[0, :, 3].numel()


def test_bad_arguments():
    given = texts(4, 3, 2, 8, torch.float32)
    shared = ops.attention(*given[:3], return_lse=True)
    for changed, message in (
        ({"scale": -1.0}, "scale is -1.0; it must be a finite number of at least 0"),
        ({"tau": torch.inf}, "tau is inf"),
        ({"norm": 3}, r"norm is 3; it must be 1 \(the paper's text\) or 2 \(the released code\)"),
        ({"alpha": torch.ones(2)}, r"alpha has shape \(2,\); it must be one number"),
        ({"key_bias_negative": torch.zeros(2, 3)}, r"key_bias_negative is .* = \[2, 2\]"),
        ({"shared": shared[::-1]}, r"shared\[0\] has shape \(2, 3, 4\)"),
        ({"shared": (shared[0], shared[1].to("meta"))}, r"shared\[1\] is on meta but q is on"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.normalized_guidance(*given, **{**NUMBERS, **changed})


def test_kernels_refuse_rows_that_no_program_holds():
    pytest.importorskip("triton")
    wide = torch.zeros(1, 65, 1, 256, device=DEVICE)
    with pytest.raises(ValueError, match="at most 16384 features, not 65 heads of 256, .*; use impl='eager'"):
        guided(wide, wide, **NUMBERS, impl="triton")
