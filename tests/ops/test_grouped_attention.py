"""grouped_attention against attention under a mask, in float64; and that nothing is computed that nobody sees."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch

from attnctl_fast import ops
from bench.ops.inputs import attention_inputs, fenced
from bench.ops.rivals import seen_by_groups
from tests.support.marks import pairs
from tests.support.numerics import DEVICE, IMPLS, TRITON, assert_right, widest

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (M, N, d): one tile and several, one piece of the head and two.
SHAPES = [(1, 1, 8), (63, 77, 40), (150, 200, 16), (64, 154, 80), (48, 20, 160)]
# Ways of the eager form: by a mask, by blocks of rows, by gathering.
WAYS = {"mask": (1 << 40, 0, 1 << 40), "blocks": (1 << 40, 0, 2000), "gathered": (0, 0, 1 << 40)}


def plain(q, k, v, seen):
    """All logits in float32 or wider; zeros for rows that see nothing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.shape[-1] ** -0.5 * (q.to(wide) @ k.to(wide).mT)
    return (torch._safe_softmax(logits.masked_fill(~seen, -torch.inf), -1) @ v.to(wide)).to(q.dtype)


def groups(m, n, count=6, batch=2):
    """Groups in runs, in the last sample mixed, one of which sees nothing."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(count, (batch, side), generator=generator) for side in (m, n))
    for x in (rows, columns):
        x[:-1] = x[:-1].sort(1)[0]
    allowed = torch.rand(count, count, generator=generator) < 0.5
    allowed[1:2] = False
    return [fenced(x.to(DEVICE)) for x in (rows, columns, allowed)]


def eager(monkeypatch, way):
    module = importlib.import_module("attnctl_fast.ops.grouped_attention")
    for name, value in zip(("SMALL", "FEW", "LOGITS_ELSEWHERE"), WAYS[way], strict=True):
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "dtype", "m", "n", "d"), pairs(IMPLS, DTYPES, SHAPES))
def test_equals_attention_under_a_mask(impl, dtype, m, n, d):
    q, k, v = attention_inputs(2, 2, m, n, d, dtype, 2.0, strided=True)
    given = groups(m, n)
    out = ops.grouped_attention(q, k, v, *given, impl=impl)
    assert out.dtype == dtype and out.shape == q.shape
    assert_right(out, plain, q, k, v, seen_by_groups(*given).unsqueeze(1), what=f"{impl} {dtype} {m} {n} {d}")


def found(impl, given, of_groups, **how):
    """Output, logsumexp and gradients by both."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    out, lse = ops.grouped_attention(*leaves, *of_groups, return_lse=True, impl=impl, **how)
    total = out.square().sum() + lse.masked_fill(lse.isneginf(), 0.0).square().sum()
    return [out, lse, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_the_eager_form(monkeypatch, way, keyed):
    eager(monkeypatch, way)
    given, of_groups = attention_inputs(2, 2, 37, 41, 16, torch.float64), groups(37, 41)
    how = {"key_bias": groups(37, 41)[1].double().masked_fill(groups(37, 41)[1] == 2, -torch.inf)} if keyed else {}
    ours, expected = (found(impl, given, of_groups, **how) for impl in ("eager", "reference"))
    torch.testing.assert_close(ours, expected)


def test_the_eager_form_makes_no_logit_that_nobody_sees(monkeypatch):
    module, made = eager(monkeypatch, "gathered"), []
    forward = module.masked_forward

    def counted(q, k, *rest):
        made.append(math.prod(q.shape[:3]) * k.shape[2])
        return forward(q, k, *rest)

    monkeypatch.setattr(module, "masked_forward", counted)
    q, k, v = attention_inputs(2, 3, 50, 60, 8, torch.float32)
    given = groups(50, 60)
    ops.grouped_attention(q, k, v, *given, impl="eager")
    assert sum(made) == 3 * int(seen_by_groups(*given).sum())


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("count", [1, 5, 32])
def test_the_kernels_list_the_tiles_that_are_seen(count):
    """Whole ones from the front, others from the back; each once, and no other."""
    from attnctl_fast.kernels.grouped_attention import _tiles_of

    rows, columns, allowed = (x.contiguous() for x in groups(90, 150, count))
    allowed |= torch.eye(count, dtype=torch.bool, device=DEVICE)
    bits, listed, counts = _tiles_of(rows, columns, allowed, 16, 8)
    seen = seen_by_groups(rows, columns, allowed)
    for b in range(2):
        assert all(
            int(bits[b, m]) & (2**32 - 1) == sum(2**g for g in range(count) if allowed[rows[b, m], g])
            for m in range(90)
        )
        for down in range(6):
            blocks = seen[b, 16 * down : 16 * (down + 1)].split(8, 1)
            whole = [i for i, x in enumerate(blocks) if x.all() and x.shape[1] == 8]
            part = [i for i, x in enumerate(blocks) if x.any() and i not in whole]
            assert counts[b, down].tolist() == [len(whole), len(part)]
            tiles = listed[b, down].tolist()
            assert tiles[: len(whole)] == whole and sorted(tiles[len(tiles) - len(part) :]) == part


@pytest.mark.parametrize("impl", IMPLS)
def test_where_nothing_is_seen_everything_is_zero(impl):
    """By the groups alone, and together with a key_bias that masks the rest."""
    given = attention_inputs(1, 2, 20, 12, 8, widest(impl))
    rows, columns = torch.arange(20, device=DEVICE) % 3, torch.arange(12, device=DEVICE) % 3
    allowed = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 0]], device=DEVICE).bool()
    key_bias = torch.zeros(1, 12, device=DEVICE).masked_fill(columns == 1, -torch.inf)
    out, lse, dq, dk, dv = found(impl, given, (rows[None], columns[None], allowed), key_bias=key_bias)
    for x in (out, dq):
        assert (x[:, :, rows > 0] == 0).all() and (x[:, :, rows == 0] != 0).all()
    assert torch.equal(lse.isneginf(), (rows > 0).expand_as(lse))
    for x in (dk, dv):
        assert (x[:, :, columns > 0] == 0).all() and (x[:, :, columns == 0] != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_group_that_sees_itself_is_attention(impl):
    q, k, v = attention_inputs(2, 2, 33, 20, 16, widest(impl))
    given = (torch.zeros(2, side, dtype=torch.int64, device=DEVICE) for side in (33, 20))
    allowed = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    how = {"scale": -0.3, "return_lse": True, "impl": impl}
    ours = ops.grouped_attention(q, k, v, *given, allowed, **how)
    for x, expected in zip(ours, ops.attention(q, k, v, **how), strict=True):
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=1e-5)


def test_bad_arguments():
    q, k, v = attention_inputs(2, 1, 4, 3, 8, torch.float32)
    rows, columns, allowed = groups(4, 3)
    good = {"q": q, "k": k, "v": v, "row_groups": rows, "column_groups": columns, "allowed": allowed}
    for changed, message in (
        ({"row_groups": rows[:, :3]}, "row_groups has shape (2, 3); it must be [batch, tokens] (2, 4)"),
        ({"column_groups": columns[:1]}, "column_groups has shape (1, 3); it must be [batch, tokens] (2, 3)"),
        ({"row_groups": rows.int()}, "row_groups has dtype torch.int32; it must be torch.int64"),
        ({"column_groups": columns.to("meta")}, "column_groups is on meta but q is on"),
        ({"allowed": allowed.float()}, "allowed is torch.float32 of shape (6, 6); it must be torch.bool"),
        ({"allowed": allowed[:3]}, "allowed is torch.bool of shape (3, 6)"),
        ({"allowed": allowed[:0, :0]}, "allowed is torch.bool of shape (0, 0)"),
        ({"allowed": allowed.to("meta")}, "allowed is on meta but q is on"),
        ({"q": q[0]}, "q has shape"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            ops.grouped_attention(**good | changed)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="groups on an accelerator are not read")
@pytest.mark.parametrize("name", ["row_groups", "column_groups"])
@pytest.mark.parametrize("value", [-1, 2])
def test_groups_that_are_not_allowed_for(name, value):
    q, k, v = attention_inputs(1, 1, 4, 4, 8, torch.float32)
    good = torch.zeros(1, 4, dtype=torch.int64)
    given = {"row_groups": good, "column_groups": good, name: torch.tensor([[0, 1, value, 0]])}
    with pytest.raises(ValueError, match=re.escape(f"{name} holds {value}, but allowed is of the groups 0..1")):
        ops.grouped_attention(q, k, v, **given, allowed=torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_the_kernels_take_32_groups():
    q, k, v = attention_inputs(1, 1, 4, 4, 8, torch.float32)
    some = torch.zeros(1, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="at most 32 groups, not 33; give tokens that see and are seen alike"):
        ops.grouped_attention(q, k, v, some, some, torch.ones(33, 33, dtype=torch.bool, device=DEVICE), impl="triton")
