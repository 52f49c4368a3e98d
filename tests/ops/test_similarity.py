"""smooth_maps, map_similarity and similarity_loss: against loops over pairs and rows, in float64."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from attnctl_fast import ops
from bench.ops.inputs import Case, rand, randn
from bench.ops.registry import MAPS
from tests.support.kernel_cases import check
from tests.support.marks import pairs
from tests.support.numerics import DEVICE, IMPLS, TRITON, Plain, assert_rows_close, widest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = ["cosine", "normalised_cosine", "absolute"]
GRIDS = [(16, 16), (7, 9), (4, 6), (2, 3)]
# Grid and number of tokens.
SIDES = [((16, 16), 5), ((7, 9), 8), ((2, 3), 3), ((4, 6), 2), ((4, 6), 1)]
CASES = {"plain": Case(256), "strided": Case(63, batch=3, strided=True), "sharp": Case(64, sharp=7.0)}


def some_maps(batch, tokens, grid, dtype=torch.float64, seed=0):
    """Attention over the tokens: positive, and summing to less than 1 at every cell."""
    logits = 3 * randn(batch, tokens + 2, grid[0] * grid[1], dtype=torch.float64, seed=seed)
    return logits.softmax(1)[:, 1:-1].to(dtype).contiguous()


def some_text(batch, tokens, dtype=torch.float64):
    """Causal self-attention, sharpened, as T-SAM has it."""
    logits = 2 * randn(batch, tokens, tokens, dtype=torch.float64, seed=9)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).triu(1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).to(dtype)


def smoothed_by_loops(image, sigma, size):
    """One map, cell by cell."""
    radius, (height, width) = size // 2, image.shape
    taps = [math.exp(-(((x - radius) / (2 * sigma)) ** 2)) for x in range(size)]

    def inside(cell, side):
        cell = abs(cell)
        return cell if cell < side else 2 * (side - 1) - cell

    rows = []
    for y, x in itertools.product(range(height), range(width)):
        cells = itertools.product(range(-radius, radius + 1), repeat=2)
        rows.append(
            sum(
                taps[i + radius] * taps[j + radius] * image[inside(y + i, height), inside(x + j, width)]
                for i, j in cells
            )
        )
    return torch.stack(rows).view(height, width) / sum(taps) ** 2


def loss_by_pairs(maps, text, grid, variant="cosine", weight=None, length=None, sigma=0.5, size=3):
    """One sample's loss, pair by pair."""
    length = len(maps) if length is None else length
    weight = {"cosine": 0.2}.get(variant, 1.0) if weight is None else weight
    smooth = [smoothed_by_loops(m.view(grid), sigma, size).flatten() for m in maps[:length]]
    loss = maps.new_zeros(())
    for i in range(1, length):
        row = torch.stack([F.cosine_similarity(smooth[i], smooth[j], dim=0) for j in range(i)])
        if variant == "cosine":
            loss = loss + weight * i * (1 - F.cosine_similarity(text[i, :i], row, dim=0))
            continue
        row = torch.cat([row, row.new_ones(1)])
        row, expected = row / row.sum(), text[i, : i + 1]
        apart = (expected - row).abs().sum() if variant == "absolute" else 1 - F.cosine_similarity(expected, row, dim=0)
        loss = loss + weight * (i + 1) / length * apart
    return loss


def tolerance(impl):
    return {"atol": 1e-6, "rtol": 2e-5} if widest(impl) == torch.float32 else {"atol": 1e-12, "rtol": 1e-9}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("grid", "sigma", "size"), [(g, 0.5, 3) for g in GRIDS] + [((7, 9), 1.3, 5), ((4, 6), 2.0, 7)])
def test_smoothing_is_the_released_kernel(impl, grid, sigma, size):
    maps = some_maps(2, 3, grid, widest(impl)).requires_grad_()
    wide = maps.detach().double().requires_grad_()
    out = ops.smooth_maps(maps, grid, sigma=sigma, kernel_size=size, impl=impl)
    truth = torch.stack([smoothed_by_loops(m.view(grid), sigma, size).flatten() for m in wide.flatten(0, 1)])
    grad = randn(*out.shape, dtype=torch.float64, seed=3)
    torch.testing.assert_close(out.double(), truth.view(out.shape), **tolerance(impl))
    ours, expected = (
        torch.autograd.grad(o, m, grad.to(o.dtype).view(o.shape)) for o, m in ((out, maps), (truth, wide))
    )
    torch.testing.assert_close(ours[0].double(), expected[0], **tolerance(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_similarity_is_the_cosine(impl):
    maps = randn(2, 5, 63, dtype=widest(impl), seed=1)
    maps[0, 2] = 0
    maps.requires_grad_()
    out = ops.map_similarity(maps, impl=impl)
    wide = maps.detach().double().requires_grad_()
    truth = F.cosine_similarity(wide[:, :, None], wide[:, None], dim=-1)
    torch.testing.assert_close(out.double(), truth, **tolerance(impl))
    grad = randn(2, 5, 5, dtype=torch.float64, seed=3)
    (ours,) = torch.autograd.grad(out, maps, grad.to(out.dtype))
    (expected,) = torch.autograd.grad(truth, wide, grad)
    assert (ours[0, 2] == 0).all() and (out[0, 2] == 0).all() and (out[0, :, 2] == 0).all()
    expected[0, 2] = 0
    torch.testing.assert_close(ours.double(), expected, **tolerance(impl))


@pytest.mark.parametrize(("impl", "variant", "grid", "tokens"), pairs(IMPLS, VARIANTS, SIDES))
def test_loss_is_the_published_one(impl, variant, grid, tokens):
    maps = some_maps(2, tokens, grid, widest(impl)).requires_grad_()
    text = some_text(2, tokens, widest(impl))
    loss = ops.similarity_loss(maps, text, grid, variant=variant, impl=impl)
    wide = maps.detach().double().requires_grad_()
    truth = torch.stack([loss_by_pairs(m, t.double(), grid, variant) for m, t in zip(wide, text, strict=True)])
    torch.testing.assert_close(loss.double(), truth, **tolerance(impl))
    if tokens > 1:
        weights = torch.tensor([1.0, -2.0], device=DEVICE)
        (ours,) = torch.autograd.grad((weights * loss).sum(), maps)
        (expected,) = torch.autograd.grad((weights * truth).sum(), wide)
        off = (ours.double() - expected).abs().amax() / expected.abs().amax().clamp(min=0.1)
        assert off <= (1e-5 if impl == "triton" else 1e-9), off


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_tokens_take_no_part(impl, variant):
    grid, lengths = (4, 6), [5, 3, 1, 0]
    maps, text = some_maps(4, 5, grid, widest(impl)), some_text(1, 5, widest(impl))[0]
    dirty = maps.clone()
    for sample, length in enumerate(lengths):
        dirty[sample, length:] = torch.nan
    dirty.requires_grad_()
    given = torch.tensor(lengths, device=DEVICE)
    texts = text.expand(4, 5, 5).clone()
    texts[1, 3:] = torch.nan
    loss = ops.similarity_loss(dirty, texts, grid, variant=variant, weight=0.7, lengths=given, impl=impl)
    (grad,) = torch.autograd.grad(loss.sum(), dirty)
    assert not loss.isnan().any() and not grad.isnan().any()
    assert (loss[2:] == 0).all()
    for sample, length in enumerate(lengths):
        assert (grad[sample, length:] == 0).all()
        alone = maps[sample : sample + 1, : max(length, 1)].clone().requires_grad_()
        part = text[: max(length, 1), : max(length, 1)]
        expected = ops.similarity_loss(alone, part, grid, variant=variant, weight=0.7, impl="reference")
        torch.testing.assert_close(loss[sample], expected[0], **tolerance(impl))
        (of_alone,) = torch.autograd.grad(expected.sum(), alone, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(grad[sample : sample + 1, : max(length, 1)], of_alone, **tolerance(impl))
    listed = ops.similarity_loss(dirty, texts, grid, variant=variant, weight=0.7, lengths=lengths, impl=impl)
    assert torch.equal(listed, loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_of_zeros_give_no_nan(impl, variant):
    maps = some_maps(2, 4, (4, 6), widest(impl))
    maps[0, 1], maps[1] = 0, 0
    maps.requires_grad_()
    losses = {}
    for name in (impl, "reference"):
        loss = ops.similarity_loss(maps, some_text(1, 4, maps.dtype)[0], (4, 6), variant=variant, impl=name)
        losses[name] = loss, torch.autograd.grad(loss.sum(), maps)[0]
    for ours, expected in zip(losses[impl], losses["reference"], strict=True):
        assert not ours.isnan().any()
        torch.testing.assert_close(ours, expected, **tolerance(impl))
    assert (losses[impl][1][0, 1] == 0).all() and (losses[impl][1][1] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl):
    maps, text = some_maps(2, 4, (3, 4)).requires_grad_(), some_text(2, 4)
    assert gradcheck(lambda m: ops.smooth_maps(m, (3, 4), impl=impl), [maps])
    assert gradcheck(lambda m: ops.map_similarity(m, impl=impl), [maps])
    for variant in VARIANTS:
        for lengths in (None, [4, 3]):
            how = {"variant": variant, "lengths": lengths, "impl": impl}
            assert gradcheck(lambda m, how=how: ops.similarity_loss(m, text, (3, 4), **how), [maps])


@pytest.mark.parametrize(("name", "dtype", "case"), pairs(MAPS, DTYPES, list(CASES)))
def test_eager_is_as_exact_as_plain_pytorch(name, dtype, case):
    """As tests/kernels has it of the kernels."""
    check(name, replace(CASES[case], dtype=dtype), impl="eager")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(impl, dtype):
    maps = some_maps(2, 5, (4, 6), dtype).requires_grad_()
    text = some_text(2, 5, torch.float32).to(dtype)
    calls = {
        "smooth": lambda m, impl: ops.smooth_maps(m, (4, 6), impl=impl),
        "similarity": lambda m, impl: ops.map_similarity(m, impl=impl),
        "loss": lambda m, impl: ops.similarity_loss(m, text, (4, 6), impl=impl),
    }
    for call in calls.values():
        out = call(maps, impl)
        wide = maps.detach().double().requires_grad_()
        truth = call(wide, "reference")
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), truth, atol=1e-6, rtol=1e-5)
        (ours,), (expected,) = (torch.autograd.grad(o.sum(), m) for o, m in ((out, maps), (truth, wide)))
        assert ours.dtype == dtype
        allowed = 2 * torch.finfo(dtype).eps * expected.abs().amax(-1) + 1e-6
        assert ((ours.double() - expected).abs().amax(-1) <= allowed).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_maps(impl):
    """As attention gives them: [B,M,n] seen as [B,n,M]."""
    maps = some_maps(2, 4, (4, 6), widest(impl))
    strided = maps.mT.contiguous().mT
    text = some_text(2, 4, maps.dtype).mT.contiguous().mT
    for call in (
        lambda m, _: ops.smooth_maps(m, (4, 6), impl=impl),
        lambda m, _: ops.smooth_maps(m, (4, 6), kernel_size=1, impl=impl),
        lambda m, _: ops.map_similarity(m, impl=impl),
        lambda m, t: ops.similarity_loss(m, t, (4, 6), impl=impl),
    ):
        out = call(strided, text)
        assert out.is_contiguous()
        torch.testing.assert_close(out, call(maps, text.contiguous()))


@pytest.mark.parametrize("impl", TRITON)
def test_smoothing_reaches_beyond_32_bits(impl):
    storage = torch.empty((1 << 31) + 24, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((1, 3, 24), (0, 1 << 30, 1)).copy_(some_maps(1, 3, (4, 6)))
    expected = ops.smooth_maps(far.clone(), (4, 6), impl="reference")
    torch.testing.assert_close(ops.smooth_maps(far, (4, 6), impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_of_any_stride(impl):
    maps, text = some_maps(3, 5, (4, 6), widest(impl)), some_text(3, 5, widest(impl))
    spread, one = torch.tensor([4, 99, 2, 99, 5, 99], device=DEVICE)[::2], torch.tensor([3], device=DEVICE)
    for lengths in (spread, one.expand(3)):
        loss = ops.similarity_loss(maps, text, (4, 6), lengths=lengths, impl=impl)
        listed = ops.similarity_loss(maps, text, (4, 6), lengths=lengths.tolist(), impl=impl)
        assert torch.equal(loss, listed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_shows(impl, variant):
    """A NaN in one map: its similarities and its sample's loss and gradient are NaN, no others."""
    maps, text = some_maps(2, 4, (4, 6), widest(impl)), some_text(2, 4, widest(impl))
    maps[0, 2, 5] = torch.nan
    similarity = ops.map_similarity(maps, impl=impl)
    expected = torch.zeros_like(similarity, dtype=torch.bool)
    expected[0, 2], expected[0, :, 2] = True, True
    assert torch.equal(similarity.isnan(), expected)
    maps.requires_grad_()
    loss = ops.similarity_loss(maps, text, (4, 6), variant=variant, impl=impl)
    (grad,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.isnan().tolist() == [True, False]
    assert grad[0].isnan().any() and not grad[1].isnan().any()


def test_autocast_leaves_the_precision_alone(monkeypatch):
    """As on an accelerator, where tensors are not seen as numpy arrays."""
    modules = [importlib.import_module(f"attnctl_fast.ops.{name}") for name in ("smooth_maps", "map_similarity")]
    modules.append(importlib.import_module("attnctl_fast.ops.similarity_loss"))
    for module in modules:
        monkeypatch.setattr(module, "arrays", lambda *tensors: list(tensors))
    maps, text = some_maps(2, 5, (4, 6), torch.float32).requires_grad_(), some_text(2, 5, torch.float32)

    def run(enabled):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            smoothed = ops.smooth_maps(maps, (4, 6), impl="eager")
            found = [smoothed, ops.map_similarity(maps, impl="eager")]
            found += [ops.similarity_loss(maps, text, (4, 6), variant=x, impl="eager") for x in VARIANTS]
            return found + [torch.autograd.grad(x.square().sum(), maps)[0] for x in found]

    modules[0]._kept_axis.cache_clear()
    try:
        for ours, expected in zip(run(True), run(False), strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    finally:
        modules[0]._kept_axis.cache_clear()


@pytest.mark.parametrize("impl", IMPLS)
def test_alike_rows_lose_no_digits(impl):
    """Where C is nearly T the loss is a small number: 1 - cos would hold its first digits only."""
    tokens, grid = 4, (4, 6)
    maps = some_maps(1, tokens, grid, widest(impl))
    similarity = ops.map_similarity(ops.smooth_maps(maps.double(), grid, impl="reference"), impl="reference")
    text = (similarity * (1 + 1e-4 * rand(1, tokens, tokens, dtype=torch.float64))).to(widest(impl))
    truth = ops.similarity_loss(maps.double(), text.double(), grid, impl="reference")

    def plain():
        return ops.similarity_loss(maps, text, grid, impl="reference")[None]

    ours = ops.similarity_loss(maps, text, grid, impl=impl)[None]
    assert_rows_close(ours, Plain(truth[None], [plain()], plain), torch.float32, "loss")
