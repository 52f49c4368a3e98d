"""Layers of joint attention, image rows over all columns, as control runs them: with maps, and with an edit."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attnctl_fast import ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.attention import QKV
from bench.ops.base import Operation, Rival, Timing, products
from bench.ops.biased import given_bias, stock_rivals
from bench.ops.inputs import Case, Tensors, qkv
from bench.ops.maps import one_hot_rivals


def _with_maps(case: Case, t: Tensors, impl: str) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        out, lse = ops.attention(*qkv(t), return_lse=True, impl=impl)
        return out, ops.maps_from_lse(t["q"], t["k"], lse, t["target_ids"], impl=impl)

    return run


def _edited(case: Case, t: Tensors, impl: str) -> Run:
    def run() -> Tensor:
        stats = ops.target_statistics(*qkv(t), t["target_ids"], impl=impl)
        return ops.merge_targets(stats, t["v"], t["target_ids"], t["bias"], impl=impl)

    return run


def _plain(case: Case) -> dict[str, Rival]:
    """The attention without what control adds, for scale: the aims are shares of it."""

    def attend(name: str) -> Rival:
        return Rival(lambda t: partial(rivals.sdpa, name, *qkv(t)), checked=False)

    return {f"plain SDPA {name}": attend(name) for name in rivals.backends(case.device) if name != "math"}


def _maps_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {**one_hot_rivals(case, t), **_plain(case)}


def _edit_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {**stock_rivals(given_bias, False, case, t, compile), **_plain(case)}


OPERATIONS = {
    "joint_maps": Operation(
        _with_maps,
        (*QKV, "target_ids"),
        ("out", "maps"),
        QKV,
        timings={"joint_maps": Timing(partial(products, count=2), _maps_rivals)},
    ),
    "joint_edit": Operation(
        _edited,
        (*QKV, "bias", "target_ids"),
        ("out",),
        (*QKV, "bias"),
        timings={"joint_edit": Timing(partial(products, count=2), _edit_rivals)},
    ),
}
