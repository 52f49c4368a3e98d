"""Attention with a bias on the targets' columns, and the Gaussians that make one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.base import (
    TOLERANCES,
    Build,
    Comparison,
    Contender,
    first,
    implementations,
    impls,
    products,
    ready,
    size,
    spanning,
    trained,
    upstream,
    wide,
)
from bench.ops.layers import Inputs, Layer


def gaussian_bias(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    truth = first(ops.gaussian_bias(x.theta.double(), layer.grid, impl="reference"))
    contenders = implementations(partial(ops.gaussian_bias, x.theta, layer.grid), x.theta.device)
    contenders["two products"] = ready(partial(rivals.span, x.theta, rivals.axes(layer.grid, x.theta)))
    tolerance, moved = TOLERANCES[torch.float32], size(x.theta, x.bias)
    return Comparison("gaussian_bias", layer, dtype, contenders, truth, tolerance, moved, spanning(layer), first)


def gaussian_bias_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and backward."""

    def run(function: Callable[[Tensor], Tensor], theta: Tensor = x.theta) -> Contender:
        return ready(trained([theta], function, x.bias.to(theta.dtype)))

    spread = partial(ops.gaussian_bias, grid=layer.grid)
    contenders = {name: run(partial(spread, impl=name)) for name in impls(x.q.device)}
    contenders["two products"] = run(partial(rivals.span, basis=rivals.axes(layer.grid, x.theta)))
    truth = run(partial(spread, impl="reference"), x.theta.double()).build()()
    tolerance, moved, flops = TOLERANCES[torch.float32], 2 * size(x.theta, x.bias), 2 * spanning(layer)
    return Comparison("gaussian_bias_all", layer, dtype, contenders, truth, tolerance, moved, flops, tuple)


def _biased_rivals(
    device: torch.device,
    attend: Callable[[Callable[..., Tensor]], Callable[..., Any]],
    compile: rivals.Compile,
    differentiated: bool = False,
) -> dict[str, Contender]:
    """Stock PyTorch for attention with a bias on columns. `attend` puts `function(q, k, v, bias, columns)` to work;
    `differentiated`: by the bias too."""
    # Flash attention takes no mask on a GPU, and none that needs a gradient on a CPU. What does not fuse gains nothing
    # from a lower rank.
    maskless = device.type == "cuda" or differentiated
    masked = [name for name in rivals.backends(device) if not (name == "flash" and maskless)]
    fused = [name for name in rivals.backends(device) if name != "math"]
    forms = {
        **{f"SDPA {name}, mask": partial(rivals.masked_sdpa, name) for name in masked},
        **{f"SDPA {name}, low rank": partial(rivals.low_rank_sdpa, name) for name in fused},
    }
    found = {name: ready(attend(function)) for name, function in forms.items()}
    found["FlexAttention"] = Contender(lambda: attend(rivals.flex(compile)), compiles=True)
    return found


def biased_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Without pinned columns, which no rival has."""
    exact, columns = wide(x), rivals.Columns.of(x.target_ids, x.k)
    truth = first(ops.biased_attention(*exact[:3], exact.bias, x.target_ids, impl="reference"))
    given = (*x[:3], x.bias)
    contenders = implementations(partial(ops.biased_attention, *given, x.target_ids), x.q.device)
    contenders |= _biased_rivals(x.q.device, lambda function: partial(function, *given, columns), compile)
    moved, flops = size(*given, x.q), products(layer, 2)
    return Comparison("biased_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


def regulated_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    exact, basis, columns = wide(x), rivals.axes(layer.grid, x.theta), rivals.Columns.of(x.target_ids, x.k)
    truth = first(ops.regulated_attention(*exact[:3], exact.theta, x.target_ids, layer.grid, impl="reference"))
    run = partial(ops.regulated_attention, *x[:3], x.theta, x.target_ids, layer.grid)
    contenders = implementations(run, x.q.device)
    contenders |= _biased_rivals(
        x.q.device, lambda function: lambda: function(*x[:3], rivals.span(x.theta, basis), columns), compile
    )
    moved, flops = size(*x[:3], x.theta, x.q), products(layer, 2) + spanning(layer)
    return Comparison("regulated_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, first)


def _training(op: str, wanted: str, x: Inputs, layer: Layer, dtype: torch.dtype, compile: rivals.Compile) -> Comparison:
    """Forward and backward, to the bias (or theta) alone or to q, k and v as well."""
    edit = x.bias if op == "biased_attention" else x.theta
    basis, columns = rivals.axes(layer.grid, x.theta), rivals.Columns.of(x.target_ids, x.k)

    def ours(impl: str, q: Tensor, k: Tensor, v: Tensor, edit: Tensor) -> Tensor:
        if op == "biased_attention":
            return ops.biased_attention(q, k, v, edit, x.target_ids, impl=impl)
        return ops.regulated_attention(q, k, v, edit, x.target_ids, layer.grid, impl=impl)

    def run(function: Callable[..., Tensor], x: Inputs, edit: Tensor) -> Run:
        grad = upstream(x)
        if wanted == "edit":
            return trained([edit], partial(function, *x[:3]), grad)
        return trained([*x[:3], edit], function, grad)

    def attend(function: Callable[..., Tensor]) -> Run:
        def stock(q: Tensor, k: Tensor, v: Tensor, edit: Tensor) -> Tensor:
            bias = edit if op == "biased_attention" else rivals.span(edit, basis)
            return function(q, k, v, bias, columns)

        return run(stock, x, edit)

    exact = wide(x)
    contenders = {name: ready(run(partial(ours, name), x, edit)) for name in impls(x.q.device)}
    contenders |= _biased_rivals(x.q.device, attend, compile, differentiated=True)
    truth = run(partial(ours, "reference"), exact, edit.double())()
    moved = 2 * size(*x[:3], edit, x.q) if wanted == "all" else size(*x[:3], edit, x.q, x.q, edit)
    # To the edit alone, its columns of dO V^T; to everything, dV, dP, dQ and dK.
    flops = products(layer, 6) if wanted == "all" else products(layer, 2) + products(layer, columns=layer.targets)
    flops += 2 * spanning(layer) if op == "regulated_attention" else 0
    return Comparison(f"{op}_{wanted}", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, flops, tuple)


OPERATIONS: dict[str, Build] = {
    "biased_attention": biased_attention,
    "regulated_attention": regulated_attention,
    "biased_attention_edit": partial(_training, "biased_attention", "edit"),
    "biased_attention_all": partial(_training, "biased_attention", "all"),
    "regulated_attention_edit": partial(_training, "regulated_attention", "edit"),
    "regulated_attention_all": partial(_training, "regulated_attention", "all"),
    "gaussian_bias": gaussian_bias,
    "gaussian_bias_all": gaussian_bias_all,
}
