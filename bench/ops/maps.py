"""Attention that returns its maps, and what losses make of maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from attnctl_fast.ops.map_similarity import KERNEL_TOKENS
from bench.harness.timing import Run
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
    wide,
)
from bench.ops.layers import Inputs, Layer


def _map_contenders(x: Inputs) -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """By name, what makes the output and the maps of the targets."""
    columns = rivals.Columns.of(x.target_ids, x.k)
    found: dict[str, Any] = {
        name: lambda q, k, v, name=name: ops.attention_with_maps(q, k, v, x.target_ids, impl=name)
        for name in impls(x.q.device)
    }
    for name in rivals.backends(x.q.device):
        attend = partial(rivals.sdpa, name)
        found[f"SDPA {name}, one-hot"] = lambda q, k, v, attend=attend: rivals.one_hot_maps(
            attend, q, k, v, columns.one_hot
        )
    found["published"] = lambda q, k, v: rivals.kept_maps(q, k, v, x.target_ids)
    return found


def attention_with_maps(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    contenders = {name: ready(partial(run, *x[:3])) for name, run in _map_contenders(x).items()}
    contenders["plain attention"] = plain(x)
    truth = ops.attention_with_maps(*wide(x)[:3], x.target_ids, impl="reference")
    moved, flops = size(*x[:3], x.q) + 4 * truth[1].numel(), products(layer, 2)
    return Comparison("attention_with_maps", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def attention_with_maps_guidance(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward, and the queries' gradient by the maps alone: the last layer that a loss of the maps reads."""
    exact = ops.attention_with_maps(*wide(x)[:3], x.target_ids, impl="reference")[1]
    grad = torch.randn(exact.shape, generator=torch.Generator(x.q.device).manual_seed(1), device=x.q.device)

    def run(function: Callable[..., tuple[Tensor, Tensor]], x: Inputs, grad: Tensor) -> Run:
        return trained([x.q], lambda q: function(q, x.k, x.v)[1], grad)

    contenders = {name: ready(run(function, x, grad)) for name, function in _map_contenders(x).items()}
    reference = partial(ops.attention_with_maps, token_ids=x.target_ids, impl="reference")
    truth = run(reference, wide(x), grad.double())()
    op, moved, flops = "attention_with_maps_guidance", size(*x[:3], x.q, x.q) + 8 * exact.numel(), products(layer, 3)
    return Comparison(op, layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def _maps(x: Inputs) -> tuple[Tensor, Tensor]:
    """The tokens' maps [B,n,M], averaged over heads, and causal rows [B,n,n] that sum to 1: of 12 tokens, or as many as
    there are targets, within the prompt and what the kernels take."""
    probabilities = rivals.full_logits(x.q, x.k).softmax(-1).mean(1)
    tokens = min(max(12, len(x.target_ids)), probabilities.shape[2] - 2, KERNEL_TOKENS)
    maps = probabilities[..., 1 : 1 + tokens].mT.contiguous()
    generator = torch.Generator(x.q.device).manual_seed(1)
    text = torch.rand(len(maps), tokens, tokens, generator=generator, device=maps.device).tril()
    return maps, text / text.sum(-1, keepdim=True)


def _smoothing(maps: Tensor) -> int:
    """FLOPs of a kernel of three cells along both axes."""
    return 2 * 2 * 3 * maps.numel()


def _comparing(maps: Tensor) -> int:
    """FLOPs of all similarities."""
    return 2 * maps.numel() * maps.shape[1]


def smooth_maps(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    maps, _ = _maps(x)
    contenders = implementations(partial(ops.smooth_maps, maps, layer.grid), maps.device)
    contenders["reference"] = ready(partial(ops.smooth_maps, maps, layer.grid, impl="reference"))
    contenders["conv2d"] = ready(partial(rivals.convolved, maps, layer.grid))
    truth = first(ops.smooth_maps(maps.double(), layer.grid, impl="reference"))
    tolerance, moved, flops = TOLERANCES[torch.float32], size(maps, maps), _smoothing(maps)
    return Comparison("smooth_maps", layer, dtype, contenders, truth, tolerance, moved, flops, first)


def map_similarity(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and the maps' gradient."""
    maps, text = _maps(x)

    def run(function: Callable[..., Tensor], maps: Tensor = maps) -> Contender:
        return ready(trained([maps], function, text.to(maps.dtype)))

    contenders = {name: run(partial(ops.map_similarity, impl=name)) for name in impls(maps.device)}
    contenders["closed form"] = run(rivals.plain_similarity)
    truth = run(partial(ops.map_similarity, impl="reference"), maps.double()).build()()
    moved, flops = 2 * size(maps) + 2 * size(text), 2 * _comparing(maps)
    tolerance = TOLERANCES[torch.float32]
    return Comparison("map_similarity", layer, dtype, contenders, truth, tolerance, moved, flops, tuple)


def similarity_loss(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and the maps' gradient."""
    maps, text = _maps(x)
    grad = torch.ones(len(maps), device=maps.device)

    def run(function: Callable[..., Tensor], maps: Tensor = maps, text: Tensor = text) -> Run:
        return trained([maps], lambda m: function(m, text, layer.grid), grad.to(maps.dtype))

    contenders = {name: ready(run(partial(ops.similarity_loss, impl=name))) for name in impls(maps.device)}
    contenders["closed form"] = ready(run(rivals.plain_similarity_loss))
    contenders["torch.compile"] = Contender(lambda: run(compile(rivals.plain_similarity_loss)), compiles=True)
    contenders["published"] = ready(run(rivals.published_similarity_loss))
    truth = run(partial(ops.similarity_loss, impl="reference"), maps.double(), text.double())()
    moved, flops = 2 * size(maps) + size(text), 2 * (_smoothing(maps) + _comparing(maps))
    tolerance = TOLERANCES[torch.float32]
    return Comparison("similarity_loss", layer, dtype, contenders, truth, tolerance, moved, flops, first)


OPERATIONS = {
    "attention_with_maps": attention_with_maps,
    "attention_with_maps_guidance": attention_with_maps_guidance,
    "smooth_maps": smooth_maps,
    "map_similarity": map_similarity,
    "similarity_loss": similarity_loss,
}
