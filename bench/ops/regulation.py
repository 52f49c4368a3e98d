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
from bench.ops.attention import QKV
from bench.ops.base import EDIT, Operation, Rival, Timing, plain, products, spanning
from bench.ops.inputs import STATISTICS, Case, Tensors, qkv
from bench.ops.regulation_results import judge_layer, judge_solver

GIVEN = ("rest_lse", "logits", "theta")


def statistics_of(t: Tensors) -> ops.TargetStatistics:
    """Return the statistics among the tensors; what is not there is None."""
    out, lse, logits = t["rest_out"], t["rest_lse"], t["logits"]
    return ops.TargetStatistics(out, lse, logits, t.get("rest_square"), t.get("pinned_logits"))


def _edit(t: Tensors) -> dict[str, Any]:
    return {name: t[name] for name in EDIT}


def _target_statistics(case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {**_edit(t), "key_bias": t.get("key_bias"), "with_square": case.more, "impl": impl}

    def run() -> tuple[Tensor | None, ...]:
        return tuple(ops.target_statistics(*qkv(t), **how))

    return run


def _merge_targets(case: Case, t: Tensors, impl: str) -> Run:
    return partial(ops.merge_targets, statistics_of(t), t["v"], bias=t["bias"], **_edit(t), impl=impl)


def _loss(objective: str, case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"objective": objective, "theta": t.get("theta"), "impl": impl}
    return partial(ops.regulation_loss, _solvable(t), t["bias"], **how)


def _solvable(t: Tensors) -> ops.TargetStatistics:
    """The statistics that the objectives read, whatever their output is."""
    rest = t["rest_lse"]
    return ops.TargetStatistics(rest.unsqueeze(-1), rest, t["logits"], t.get("rest_square"), None)


def _regulate(objective: str, how: dict[str, Any], case: Case, t: Tensors, impl: str) -> Run:
    given: dict[str, Any] = {"theta": t["theta"], "steps": case.steps, "objective": objective, "impl": impl, **how}
    if how.get("ema"):
        given["previous"] = t["theta"]
    if "gammas" in t:
        given["strength"] = t["gammas"][0]

    def run() -> tuple[Tensor, Tensor]:
        found = ops.regulate(_solvable(t), case.grid, **given)
        return found.losses, found.bias

    return run


def _layer(solve: Callable[[ops.TargetStatistics], tuple[Tensor, Tensor]], t: Tensors, impl: str) -> Run:
    """A whole layer under attention regulation, pinned columns and all."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        stats = ops.target_statistics(*qkv(t), **_edit(t), impl=impl)
        losses, bias = solve(stats)
        return losses, bias, ops.merge_targets(stats, t["v"], bias=bias, **_edit(t), impl=impl)

    return run


def _regulated_layer(case: Case, t: Tensors, impl: str) -> Run:
    def solve(stats: ops.TargetStatistics) -> tuple[Tensor, Tensor]:
        found = ops.regulate(stats, case.grid, theta=t["theta"], steps=case.steps, impl=impl)
        return found.losses, found.bias

    return _layer(solve, t, impl)


def _no_fusing(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {"reference": Rival(lambda t: _loss("official", case, t, "reference"))}


def _closed(case: Case, t: Tensors, compile: rivals.Compile) -> Callable[..., tuple[Tensor, Tensor]]:
    return rivals.statistics_loop(case.grid, rivals.axes(case.grid, t["theta"]), case.steps, compile)


def _solvers(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    """The published form starts from q and k, as it has no statistics."""

    def loop(compile: rivals.Compile) -> Callable[[Tensors], Run]:
        return lambda t: partial(_closed(case, t, compile), t["logits"], t["rest_lse"], t["theta"])

    def old(solve: Callable[..., Any]) -> Rival:
        basis = full_basis(case.grid, None, "official", t["theta"])
        return Rival(lambda t: partial(solve, t["q"], t["k"], t["target_ids"], t["theta"], basis, case.steps))

    return {
        "published": old(rivals.published),
        "published, no sync": old(rivals.published_without_sync),
        "closed form": Rival(loop(rivals.uncompiled)),
        "torch.compile": Rival(loop(compile), compiles=True),
    }


def _layers(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    basis = full_basis(case.grid, None, "official", t["theta"])

    def closed(compile: rivals.Compile) -> Callable[[Tensors], Run]:
        def bind(t: Tensors) -> Run:
            loop = _closed(case, t, compile)
            return _layer(lambda stats: loop(stats.logits, stats.rest_lse, t["theta"]), t, "eager")

        return bind

    def old(loop: Callable[..., tuple[Tensor, Tensor]]) -> Rival:
        return Rival(lambda t: partial(_published_layer, loop, t, basis, case.steps))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        "published": old(rivals.published),
        "published, no sync": old(rivals.published_without_sync),
        "closed form": Rival(closed(rivals.uncompiled)),
        "torch.compile": Rival(closed(compile), compiles=True),
        "plain layer": plain(case),
        "plain layer, SDPA": Rival(lambda t: partial(sdpa, *qkv(t)), checked=False),
    }


def _published_layer(
    loop: Callable[..., tuple[Tensor, Tensor]], t: Tensors, basis: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    losses, bias = loop(t["q"], t["k"], t["target_ids"], t["theta"], basis, steps)
    logits = rivals.full_logits(t["q"], t["k"])
    probabilities = logits.index_add(3, t["target_ids"], bias.mT).softmax(-1)
    kept = logits.softmax(-1).index_select(3, t["pinned_ids"])
    probabilities = probabilities.index_copy(3, t["pinned_ids"], kept)
    return losses, bias, probabilities.to(t["v"].dtype) @ t["v"]


def _merging(case: Case) -> int:
    """FLOPs of the products with the values of the targets and the pinned columns."""
    return products(case, columns=len(case.ids[0]) + len(case.pinned[0]))


def _solving(case: Case) -> int:
    """FLOPs of the steps: the bias from its weights, and their gradient from the bias's."""
    return 2 * case.steps * spanning(case)


MERGED = ("rest_out", "rest_lse", "logits", "pinned_logits", "v", "bias")
OFFICIAL, PAPER = ("logits", "rest_lse", "bias", "theta"), ("logits", "rest_lse", "rest_square", "bias")
SOLVED = ("losses", "bias")
OPERATIONS = {
    "target_statistics": Operation(
        _target_statistics,
        (*QKV, *EDIT, "key_bias"),
        STATISTICS,
        QKV,
        {"target_statistics": Timing(lambda case: products(case, 2), kernels=("attention_fwd",))},
    ),
    "merge_targets": Operation(
        _merge_targets,
        (*MERGED, *EDIT),
        ("out",),
        MERGED,
        {
            "merge_targets": Timing(_merging, kernels=("merge_targets_fwd",)),
            "merge_targets_all": Timing(
                lambda case: 3 * _merging(case),
                leaves=MERGED,
                kernels=("merge_targets_bwd", "merge_targets_values_bwd"),
            ),
        },
    ),
    "regulation_loss_official": Operation(
        partial(_loss, "official"),
        OFFICIAL,
        ("loss",),
        OFFICIAL,
        {
            "regulation_loss": Timing(
                rivals=_no_fusing, leaves=("bias",), kernels=("regulation_loss_fwd", "regulation_loss_bwd")
            )
        },
    ),
    "regulation_loss_paper": Operation(partial(_loss, "paper"), PAPER, ("loss",), PAPER),
    "regulate": Operation(
        partial(_regulate, "official", {}),
        GIVEN,
        SOLVED,
        timings={
            "regulate": Timing(
                _solving,
                _solvers,
                also=(*QKV, *EDIT),
                judge=judge_solver,
                kernels=("regulate_fwd", "select_fwd"),
            )
        },
    ),
    # As a method solves that knows the weights of the step before.
    "regulate_again": Operation(partial(_regulate, "official", {"ema": 0.25}), GIVEN, SOLVED),
    "regulate_scaled": Operation(partial(_regulate, "official", {}), (*GIVEN, "gammas"), SOLVED),
    "regulate_scaled_again": Operation(partial(_regulate, "official", {"ema": 0.25}), (*GIVEN, "gammas"), SOLVED),
    "regulate_paper": Operation(partial(_regulate, "paper", {}), (*GIVEN, "rest_square"), SOLVED),
    "regulate_paper_again": Operation(partial(_regulate, "paper", {"ema": 0.25}), (*GIVEN, "rest_square"), SOLVED),
    "regulated_layer": Operation(
        _regulated_layer,
        (*QKV, "theta", *EDIT),
        (*SOLVED, "out"),
        timings={
            "regulated_layer": Timing(
                lambda case: products(case, 2) + _solving(case) + _merging(case), _layers, judge=judge_layer
            )
        },
    ),
}
