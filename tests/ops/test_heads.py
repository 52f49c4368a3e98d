"""Keys and values with fewer heads than the queries: every operation is what it is with a copy for every head.

Those whose kernels are judged by the rule for errors have families of their own in tests/kernels/test_operations.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attnctl_fast import ops
from tests.support.marks import full
from tests.support.numerics import IMPLS

BATCH, HEADS, KEYS, IMAGE, TOKENS, WIDTH = 2, 4, 2, 16, 9, 8


def made(impl, *shape, seed):
    dtype = torch.float32 if impl == "triton" else torch.float64
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(impl, within_tokens=False):
    """q, k and v `[B,H,M,d]`, or such as a layer's projections `[B,M,H*d]` give."""
    shapes = ((IMAGE, HEADS), (TOKENS, KEYS), (TOKENS, KEYS))
    every = (made(impl, BATCH, tokens, heads, WIDTH, seed=i) for i, (tokens, heads) in enumerate(shapes))
    views = [x.transpose(1, 2) for x in every]
    return views if within_tokens else [x.contiguous() for x in views]


def context_gradient(q, k, v, **how):
    out, update = ops.attention_with_context_gradient(q, k, v, query_weight=torch.linspace(0, 1, IMAGE), **how)
    # Of keys that several heads share it is the sum.
    return out, update.unflatten(1, (KEYS, -1)).sum(2)


def energies(q, k, v, **how):
    attention, context = ops.context_energy(q, k, **how)
    # That of the keys counts every head of theirs once.
    return attention, context if k.shape[1] == KEYS else ops.context_energy(q[:, ::2], k[:, ::2], **how).context


def composed(q, k, v, key_bias, weights=(1.0, 0.5), **how):
    return ops.composed_attention(q, [k, k[:, :, 1:]], [v, v[:, :, :-1]], weights, key_bias=[key_bias, None], **how)


def guided(q, k, v, key_bias, shared=None, **how):
    away = {"scale": 3.0, "tau": 1.2, "alpha": 0.4, "norm": 2}
    return ops.normalized_guidance(q, k, v, k.flip(2), v.flip(2), **away, key_bias=key_bias, shared=shared, **how)


def guided_beside(q, k, v, key_bias, **how):
    return guided(q, k, v, key_bias, shared=(q.flip(2), q.sum(3)), **how)


# Without a rule for errors of their own, or with more forms than that tries.
OPERATIONS = {
    "attention": partial(ops.attention, return_lse=True),
    "maps of heads": lambda q, k, v, **how: ops.attention_with_maps(q, k, v, [[1, 4], [2, -1]], reduce="none", **how)[
        1
    ],
    "maps of heads from lse": lambda q, k, v, **how: ops.maps_from_lse(q, k, q.sum(3), [1, 4], reduce="none", **how),
    "context gradient": context_gradient,
    "energies": energies,
    "composed": composed,
    "composed by a tensor": lambda q, k, v, **how: composed(q, k, v, weights=q.new_tensor([1.0, 0.5]), **how),
    "entmax": partial(ops.entmax_attention, weight=1.5),
    "guided": guided,
    "guided beside": guided_beside,
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_heads_are_as_copies(name, impl):
    q, k, v = inputs(impl)
    key_bias = made(impl, BATCH, TOKENS, seed=4)
    key_bias[0, 3] = -torch.inf

    def run(q, k, v):
        found = OPERATIONS[name](q, k, v, key_bias=key_bias, impl=impl)
        return found if isinstance(found, tuple) else (found,)

    differentiable = not (impl == "triton" and name == "entmax")
    few = [x.clone().requires_grad_(differentiable) for x in (q, k, v)]
    many = [few[0], *(x.repeat_interleave(HEADS // KEYS, 1) for x in few[1:])]
    found, expected = run(*few), run(*many)
    exact = {"rtol": 1e-4, "atol": 1e-5} if impl == "triton" else {}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **exact)
    if not differentiable:
        return
    loss = [sum((x.where(x.isfinite(), 0.0) ** 2).sum() for x in each) for each in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(x, few, allow_unused=True) for x in loss), strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, **exact)


@pytest.mark.parametrize("impl", ["eager", full("triton")])
def test_nothing_is_repeated_in_memory(impl):
    """Of one sample, and of several that lie head by head, all are views; the keys' head has no step."""
    from attnctl_fast.ops._heads import Grouped

    q, k, _ = inputs(impl)
    heads = Grouped(q, k)
    assert heads.queries(q).data_ptr() == q.data_ptr() and heads.keys(k).data_ptr() == k.data_ptr()
    assert heads.keys(k).stride(1) == 0 and heads.keys(k).shape == (BATCH * KEYS, HEADS // KEYS, TOKENS, WIDTH)
    q, k, v = inputs(impl, within_tokens=True)
    one = Grouped(q[:1], k[:1])
    assert one.queries(q[:1]).data_ptr() == q.data_ptr() and one.keys(k[:1]).data_ptr() == k.data_ptr()
    copies = (x.repeat_interleave(HEADS // KEYS, 1) for x in (k, v))
    torch.testing.assert_close(ops.attention(q, k, v, impl=impl), ops.attention(q, *copies, impl=impl))


def test_fewer_heads_that_do_not_fit():
    q, k, v = inputs("eager")
    with pytest.raises(ValueError, match="each is that of as many of q's"):
        ops.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="which does not fit rest_out"):
        ops.merge_targets(ops.target_statistics(q[:, :2], k, v, [1]), q[:, :3, :TOKENS], [1])
    with pytest.raises(ValueError, match=r"ks have \[2, 1\] heads; give the keys of all contexts as many"):
        ops.composed_attention(q, [k, k[:, :1]], [v, v[:, :1]], [1.0, 1.0])


def test_one_graph_with_fewer_heads():
    q, k, v = (x.requires_grad_() for x in inputs("eager"))

    def edited(q, k, v):
        stats = ops.target_statistics(q, k, v, [1, 4])
        out = ops.merge_targets(stats, v, [1, 4], stats.logits.sin())
        return out.sum() + ops.maps_from_lse(q, k, stats.rest_lse, [2]).square().sum()

    found = torch.compile(edited, fullgraph=True, backend="aot_eager")(q, k, v)
    expected = edited(q, k, v)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(x, (q, k, v)) for x in (found, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
