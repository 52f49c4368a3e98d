"""Attention without control, by regions, and between groups."""

from __future__ import annotations

from functools import partial
from typing import Any

from attnctl_fast import ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.base import Operation, Rival, Timing, ours, plain, products
from bench.ops.inputs import Case, Tensors, qkv

QKV = ("q", "k", "v")
REGIONS = ("row_regions", "column_regions", "share")
GROUPS = ("row_groups", "column_groups", "allowed")


def _attention(case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"key_bias": t.get("key_bias"), "return_lse": case.more, "impl": impl}
    return partial(ops.attention, *qkv(t), **how)


def _region_attention(case: Case, t: Tensors, impl: str) -> Run:
    regions = t["row_regions"], t["column_regions"], t["share"]
    return partial(ops.region_attention, *qkv(t), *regions, key_bias=t.get("key_bias"), impl=impl)


def _grouped_attention(case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"key_bias": t.get("key_bias"), "return_lse": case.more, "impl": impl}
    return partial(ops.grouped_attention, *qkv(t), *(t[name] for name in GROUPS), **how)


def _entmax_attention(case: Case, t: Tensors, impl: str) -> Run:
    return partial(ops.entmax_attention, *qkv(t), weight=2.0, key_bias=t.get("key_bias"), impl=impl)


def _backends(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def sdpa(name: str) -> Rival:
        return Rival(lambda t: partial(rivals.sdpa, name, *qkv(t)))

    return {f"SDPA {name}": sdpa(name) for name in rivals.backends(case.device)}


def _sorted(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {
        "sorted": Rival(lambda t: partial(rivals.sorted_entmax_attention, *qkv(t), 2.0)),
        "plain attention": plain(case),
    }


def _in_memory(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def published(t: Tensors) -> Run:
        return partial(rivals.published_region_attention, *qkv(t), t["row_regions"], t["column_regions"], t["share"])

    def flex(t: Tensors) -> Run:
        return partial(rivals.flex_regions(compile, *(t[name] for name in REGIONS)), *qkv(t))

    found = {"published": Rival(published), "plain attention": plain(case)}
    # Of a CPU's FlexAttention nothing is to be learnt; the interpreter's runs show that this one is right.
    return found | ({"FlexAttention": Rival(flex, compiles=True)} if ours(case.device) == "triton" else {})


def _masked(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    groups = tuple(t[name] for name in GROUPS)
    mask = rivals.seen_by_groups(*groups).unsqueeze(1)

    def sdpa(name: str) -> Rival:
        return Rival(lambda t: partial(rivals.sdpa, name, *qkv(t), mask))

    # Flash attention takes no mask on a GPU.
    masked = [name for name in rivals.backends(case.device) if not (name == "flash" and case.device.type == "cuda")]
    flex = Rival(lambda t: partial(rivals.flex_grouped(compile, *groups), *qkv(t)), compiles=True)
    return {**{f"SDPA {name}, mask": sdpa(name) for name in masked}, "FlexAttention": flex}


def _seen(case: Case, count: int) -> int:
    """FLOPs of `count` products of the pairs that see each other."""
    seen = rivals.seen_by_groups(*case.tensors(GROUPS).values())
    return count * 2 * case.heads * case.d * int(seen.sum())


OPERATIONS = {
    "attention": Operation(
        _attention,
        (*QKV, "key_bias"),
        ("out", "lse"),
        QKV,
        timings={
            "attention": Timing(lambda case: products(case, 2), _backends, kernels=("attention_fwd",)),
            "attention_all": Timing(
                lambda case: products(case, 6), _backends, leaves=QKV, kernels=("attention_bwd_short",)
            ),
        },
    ),
    "region_attention": Operation(
        _region_attention,
        (*QKV, *REGIONS, "key_bias"),
        ("out",),
        more_leaves=(*QKV, "share"),
        timings={
            "region_attention": Timing(lambda case: products(case, 2), _in_memory, kernels=("region_attention_fwd",))
        },
    ),
    "grouped_attention": Operation(
        _grouped_attention,
        (*QKV, *GROUPS, "key_bias"),
        ("out", "lse"),
        QKV,
        timings={
            "grouped_attention": Timing(
                lambda case: _seen(case, 2), _masked, kernels=("grouped_attention_fwd", "group_tiles_fwd")
            ),
            "grouped_attention_all": Timing(
                lambda case: _seen(case, 6),
                _masked,
                leaves=QKV,
                kernels=("grouped_attention_bwd_rows", "grouped_attention_bwd_columns"),
            ),
        },
    ),
    "entmax_attention": Operation(
        _entmax_attention,
        (*QKV, "key_bias"),
        ("out",),
        more_leaves=QKV,
        timings={
            "entmax_attention": Timing(lambda case: products(case, 2), _sorted, kernels=("entmax_attention_fwd",))
        },
    ),
}
