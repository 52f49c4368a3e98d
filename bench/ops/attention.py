"""Attention without control, and attention by regions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

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
    trained,
    upstream,
    wide,
)
from bench.ops.layers import Inputs, Layer


def attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    contenders = implementations(partial(ops.attention, *x[:3]), x.q.device)
    for name in rivals.backends(x.q.device):
        contenders[f"SDPA {name}"] = ready(partial(rivals.sdpa, name, *x[:3]))
    truth = first(ops.attention(*wide(x)[:3], impl="reference"))
    moved, flops = size(*x[:3], x.q), products(layer, 2)
    return Comparison("attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


def attention_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and backward."""
    grad = upstream(x)

    def run(function: Callable[..., Any], x: Inputs) -> Contender:
        return ready(trained(x[:3], function, grad))

    contenders = {name: run(partial(ops.attention, impl=name), x) for name in impls(x.q.device)}
    contenders |= {f"SDPA {name}": run(partial(rivals.sdpa, name), x) for name in rivals.backends(x.q.device)}
    truth = run(partial(ops.attention, impl="reference"), wide(x)).build()()
    moved, flops = 2 * size(*x[:3], x.q), products(layer, 6)
    return Comparison("attention_all", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def region_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Four stripes of the picture, each with a phrase of four tokens."""
    batch, device = layer.batch, x.q.device
    bits = 1 << (torch.arange(layer.image_tokens, device=device) * 4 // layer.image_tokens)
    words = torch.zeros(layer.tokens, dtype=torch.int64, device=device)
    words[1:17] = (1 << torch.arange(4, device=device)).repeat_interleave(4)[: layer.tokens - 1]
    rows, columns = (x.int().expand(batch, -1).contiguous() for x in (bits, words))
    weight = torch.full((batch, layer.image_tokens), 0.5, device=device)
    given = (x.q, x.k, x.v, rows, columns, weight)
    contenders = implementations(partial(ops.region_attention, *given), device)
    contenders["published"] = ready(partial(rivals.published_region_attention, *given))
    contenders["plain attention"] = plain(x)
    truth = first(ops.region_attention(*wide(x)[:3], rows, columns, weight.double(), impl="reference"))
    moved, flops = size(*given, x.q), products(layer, 2)
    return Comparison("region_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


OPERATIONS = {"attention": attention, "attention_all": attention_all, "region_attention": region_attention}
