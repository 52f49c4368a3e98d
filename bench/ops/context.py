"""Contexts that layers move on, and several contexts in one layer."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.ops import rivals
from bench.ops.base import (
    TOLERANCES,
    Comparison,
    Contender,
    first,
    implementations,
    impls,
    plain,
    products,
    ready,
    size,
    wide,
)
from bench.ops.layers import Inputs, Layer


def attention_with_context_gradient(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    q, k, v = x[:3]
    contenders = implementations(partial(ops.attention_with_context_gradient, q, k, v), q.device)
    for name in rivals.backends(q.device):
        contenders[f"SDPA {name}, twice"] = ready(partial(rivals.sdpa_pair, name, q, k, v))
    contenders["published"] = ready(partial(rivals.published_context_gradient, q, k, v))
    contenders["plain attention"] = plain(x)
    truth = ops.attention_with_context_gradient(*wide(x)[:3], impl="reference")
    op, moved, flops = "attention_with_context_gradient", size(q, k, v, q) + 4 * k.numel(), products(layer, 3)
    return Comparison(op, layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def context_energy(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    contenders = implementations(partial(ops.context_energy, x.q, x.k), x.q.device)
    contenders["logits in memory"] = ready(partial(rivals.kept_energy, x.q, x.k))
    truth = tuple(ops.context_energy(*wide(x)[:2], impl="reference"))
    moved, flops = size(x.q, x.k) + 2 * 4 * layer.batch, products(layer)
    return Comparison("context_energy", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def context_update(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """With a projection to as many numbers as all heads have."""
    update, gammas = x.v.float().contiguous(), torch.tensor([0.3, 0.7], device=x.k.device)
    inner = layer.heads * layer.width
    weight = torch.eye(inner, dtype=dtype, device=x.k.device)

    def run(k: Tensor, weight: Tensor, impl: str) -> Tensor:
        return ops.context_update(update, k, weight, gamma_attn=gammas[0], gamma_norm=gammas[1], impl=impl)

    contenders = {name: ready(partial(run, x.k, weight, name)) for name in impls(x.q.device)}
    contenders["torch.compile"] = Contender(lambda: compile(partial(run, x.k, weight, "eager")), compiles=True)
    truth = (run(x.k.double(), weight.double(), "reference"),)
    moved = size(update, x.k, weight, x.k)
    flops = 2 * layer.batch * layer.tokens * inner * inner
    return Comparison("context_update", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


def composed_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """The prompt and two edits, one of them negated."""
    shift = [(x.k.roll(i, 2), x.v.roll(i, 1)) for i in range(3)]
    ks, vs = ([pair[i] for pair in shift] for i in range(2))
    weights = [1.0, 1.3, -0.4]
    contenders = implementations(partial(ops.composed_attention, x.q, ks, vs, weights), x.q.device)
    for name in rivals.backends(x.q.device):
        contenders[f"SDPA {name}, each"] = ready(partial(rivals.sdpa_each, name, x.q, ks, vs, weights))
    wide_ks, wide_vs = ([t.double() for t in ts] for ts in (ks, vs))
    truth = first(ops.composed_attention(x.q.double(), wide_ks, wide_vs, weights, impl="reference"))
    moved, flops = size(x.q, x.q, *ks, *vs), products(layer, 2 * len(ks))
    return Comparison("composed_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


OPERATIONS = {
    "attention_with_context_gradient": attention_with_context_gradient,
    "context_energy": context_energy,
    "context_update": context_update,
    "composed_attention": composed_attention,
}
