"""Attention regulation: the targets' statistics, the inner loop on them, and merging its bias in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from attnctl_fast.ops.gaussian_bias import full_basis
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
    spanning,
    trained,
    upstream,
    wide,
)
from bench.ops.layers import Inputs, Layer
from bench.ops.regulation_results import LOSS_TOLERANCE, Results, lowest


def _present(stats: ops.TargetStatistics) -> tuple[Tensor, ...]:
    return tuple(t for t in stats if t is not None)


def _retyped(stats: ops.TargetStatistics, dtype: torch.dtype) -> ops.TargetStatistics:
    made: dict[str, Any] = {name: None if t is None else t.to(dtype) for name, t in stats._asdict().items()}
    return stats._replace(**made)


def _merging(x: Inputs, layer: Layer) -> int:
    """FLOPs of the products with the values of the targets and the pinned columns."""
    return products(layer, columns=layer.targets + len(x.pinned_ids))


def _solving(layer: Layer) -> int:
    """FLOPs of the steps: the bias from its weights, and their gradient from the bias's."""
    return 2 * layer.steps * spanning(layer)


def target_statistics(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    run = partial(ops.target_statistics, *x[:3], x.target_ids, **how)
    stats = ops.target_statistics(*wide(x)[:3], x.target_ids, **how, impl="reference")
    contenders, truth = implementations(run, x.q.device), _present(stats)
    moved, flops = size(*x[:3]) + size(*stats) // 2, products(layer, 2)
    return Comparison("target_statistics", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, _present)


def merge_targets(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    exact = wide(x)
    stats = _retyped(ops.target_statistics(*exact[:3], x.target_ids, **how, impl="reference"), torch.float32)
    run = partial(ops.merge_targets, stats, x.v, x.target_ids, x.bias, **how)
    truth = first(
        ops.merge_targets(_retyped(stats, torch.float64), exact.v, x.target_ids, exact.bias, **how, impl="reference")
    )
    contenders = implementations(run, x.q.device)
    moved, flops = size(*stats, x.bias, x.q), _merging(x, layer)
    return Comparison("merge_targets", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


def merge_targets_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and backward, to everything."""
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    stats = ops.target_statistics(*x[:3], x.target_ids, **how, impl="eager")
    grad = upstream(x)

    def run(impl: str, x: Inputs, stats: ops.TargetStatistics) -> Contender:
        def merged(out: Tensor, lse: Tensor, logits: Tensor, pinned: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            made = ops.TargetStatistics(out, lse, logits, None, pinned)
            return ops.merge_targets(made, v, x.target_ids, bias, **how, impl=impl)

        leaves = [t for t in (*stats, x.v, x.bias) if t is not None]
        return ready(trained(leaves, merged, grad))

    contenders = {name: run(name, x, stats) for name in impls(x.q.device)}
    truth = run("reference", wide(x), _retyped(stats, torch.float64)).build()()
    moved, flops = 2 * size(*stats, x.bias, x.q, x.v), 3 * _merging(x, layer)
    return Comparison("merge_targets_all", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


def regulation_loss(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and the bias's gradient."""
    stats = ops.target_statistics(*x[:3], x.target_ids, impl="eager")

    def loss(impl: str, stats: ops.TargetStatistics, bias: Tensor) -> Tensor:
        return ops.regulation_loss(stats, bias, impl=impl)

    grad = torch.ones(layer.batch, layer.heads, device=x.q.device)
    contenders = {
        name: ready(trained([x.bias], partial(loss, name, stats), grad)) for name in (*impls(x.q.device), "reference")
    }
    exact = _retyped(stats, torch.float64)
    truth = trained([x.bias.double()], partial(loss, "reference", exact), grad.double())()
    tolerance, moved = TOLERANCES[torch.float32], size(stats.logits, stats.rest_lse, x.bias, x.bias)
    return Comparison("regulation_loss", layer, dtype, contenders, truth, tolerance, moved, 0, first)


def regulate(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """The inner loop; the published form starts from q and k, as it has no statistics."""
    stats = ops.target_statistics(*x[:3], x.target_ids, impl="eager")
    basis = full_basis(layer.grid, None, "official", x.theta)

    def solve(impl: str) -> tuple[Tensor, Tensor]:
        found = ops.regulate(stats, layer.grid, theta=x.theta, steps=layer.steps, impl=impl)
        return found.losses, found.bias

    def loop(compile: rivals.Compile) -> Run:
        run = rivals.statistics_loop(layer.grid, rivals.axes(layer.grid, x.theta), layer.steps, compile)
        return partial(run, stats.logits, stats.rest_lse, x.theta)

    old = (x.q, x.k, x.target_ids, x.theta, basis, layer.steps)
    contenders = {
        **{name: ready(partial(solve, name)) for name in impls(x.q.device)},
        "published": ready(partial(rivals.published, *old)),
        "published, no sync": ready(partial(rivals.published_without_sync, *old)),
        "closed form": ready(loop(rivals.uncompiled)),
        "torch.compile": Contender(partial(loop, compile), compiles=True),
    }
    moved, flops = size(stats.logits, stats.rest_lse, x.theta, stats.logits, x.theta), _solving(layer)
    results = Results(x, layer)
    truth, check = results.truth(), results.check_bias
    return Comparison("regulate", layer, dtype, contenders, truth, LOSS_TOLERANCE, moved, flops, lowest, check)


def regulated_layer(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """A whole layer under attention regulation, pinned columns and all, and plain ones beside it."""
    basis = full_basis(layer.grid, None, "official", x.theta)
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}

    def layered(impl: str, solve: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        stats = ops.target_statistics(*x[:3], x.target_ids, **how, impl=impl)
        losses, bias = solve(stats)
        return losses, bias, ops.merge_targets(stats, x.v, x.target_ids, bias, **how, impl=impl)

    def solver(impl: str) -> Run:
        def solve(stats: ops.TargetStatistics) -> tuple[Tensor, Tensor]:
            found = ops.regulate(stats, layer.grid, theta=x.theta, steps=layer.steps, impl=impl)
            return found.losses, found.bias

        return partial(layered, impl, solve)

    def closed(compile: rivals.Compile) -> Run:
        loop = rivals.statistics_loop(layer.grid, rivals.axes(layer.grid, x.theta), layer.steps, compile)
        return partial(layered, "eager", lambda stats: loop(stats.logits, stats.rest_lse, x.theta))

    def old(loop: Callable[..., tuple[Tensor, Tensor]]) -> Run:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            losses, bias = loop(x.q, x.k, x.target_ids, x.theta, basis, layer.steps)
            logits = rivals.full_logits(x.q, x.k)
            probabilities = logits.index_add(3, x.target_ids, bias.mT).softmax(-1)
            kept = logits.softmax(-1).index_select(3, x.pinned_ids)
            probabilities = probabilities.index_copy(3, x.pinned_ids, kept)
            return losses, bias, probabilities.to(x.v.dtype) @ x.v

        return run

    contenders = {
        **{name: ready(solver(name)) for name in impls(x.q.device)},
        "published": ready(old(rivals.published)),
        "published, no sync": ready(old(rivals.published_without_sync)),
        "closed form": ready(closed(rivals.uncompiled)),
        "torch.compile": Contender(partial(closed, compile), compiles=True),
        "plain layer": plain(x),
        "plain layer, SDPA": Contender(
            lambda: partial(torch.nn.functional.scaled_dot_product_attention, *x[:3]), checked=False
        ),
    }
    moved, flops = size(*x[:3], x.theta, x.q), products(layer, 2) + _solving(layer) + _merging(x, layer)
    results = Results(x, layer)
    truth, check = results.truth(), results.check_layer
    return Comparison("regulated_layer", layer, dtype, contenders, truth, LOSS_TOLERANCE, moved, flops, lowest, check)


OPERATIONS = {
    "regulate": regulate,
    "regulated_layer": regulated_layer,
    "target_statistics": target_statistics,
    "merge_targets": merge_targets,
    "merge_targets_all": merge_targets_all,
    "regulation_loss": regulation_loss,
}
