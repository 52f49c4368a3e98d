"""Contexts that layers move on, and several contexts in one layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.attention import QKV
from bench.ops.base import Operation, Rival, Timing, plain, products
from bench.ops.inputs import Case, Tensors, qkv

WEIGHTS = [1.0, 1.3, -0.4]
# Of a bound that some rows of random inputs reach.
GUIDANCE: dict[str, Any] = {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "norm": 2}


def _with_context_gradient(case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"key_bias": t.get("key_bias"), "query_weight": t.get("share"), "impl": impl}
    return partial(ops.attention_with_context_gradient, *qkv(t), **how)


def _energy(case: Case, t: Tensors, impl: str) -> Run:
    def run() -> tuple[Tensor, ...]:
        return tuple(ops.context_energy(t["q"], t["k"], key_bias=t.get("key_bias"), impl=impl))

    return run


def _update(convention: str, case: Case, t: Tensors, impl: str) -> Run:
    """With gammas as a method has them: tensors."""
    update, (attn, norm) = t["v"].to(torch.promote_types(t["v"].dtype, torch.float32)).contiguous(), t["gammas"]
    how: dict[str, Any] = {"token_weight": t.get("token_weight"), "convention": convention, "impl": impl}
    return partial(ops.context_update, update, t["k"], t["projection"], gamma_attn=attn, gamma_norm=norm, **how)


def _contexts(case: Case, t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The prompt and two edits, one of them negated, and one shorter where a case has more of everything."""
    lengths = (case.n, max(case.n - 4, 1) if case.more else case.n, case.n)
    ks, vs = ([t[x].roll(i, 2)[:, :, :length] for i, length in enumerate(lengths)] for x in "kv")
    return ks, vs


def _composed(case: Case, t: Tensors, impl: str) -> Run:
    ks, vs = _contexts(case, t)
    how: dict[str, Any] = {"impl": impl}
    if "key_bias" in t:
        how["key_bias"] = [t["key_bias"], None, None]
    return partial(ops.composed_attention, t["q"], ks, vs, WEIGHTS, **how)


def _away(case: Case, t: Tensors) -> tuple[Tensor, Tensor]:
    """Keys and values of a negative prompt, shorter where a case has more of everything."""
    k, v = (t[x].roll(1, 2)[:, :, : max(case.n - 4, 1) if case.more else case.n] for x in "kv")
    return k, v


def _guided(case: Case, t: Tensors, impl: str) -> Run:
    shared = (t["rest_out"], t["rest_lse"]) if "rest_out" in t else None
    how = {**GUIDANCE, "key_bias": t.get("key_bias"), "shared": shared, "impl": impl}
    return partial(ops.normalized_guidance, t["q"], t["k"], t["v"], *_away(case, t), **how)


def _twice(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def pair(name: str) -> Rival:
        return Rival(lambda t: partial(rivals.sdpa_pair, name, *qkv(t)))

    found = {f"SDPA {name}, twice": pair(name) for name in rivals.backends(case.device)}
    published = Rival(lambda t: partial(rivals.published_context_gradient, *qkv(t)))
    return {**found, "published": published, "plain attention": plain(case)}


def _each(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def each(name: str) -> Rival:
        return Rival(lambda t: partial(rivals.sdpa_each, name, t["q"], *_contexts(case, t), WEIGHTS))

    return {f"SDPA {name}, each": each(name) for name in rivals.backends(case.device)}


def _apart(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def each(name: str, compiled: bool = False) -> Rival:
        run = partial(rivals.sdpa_guided, name, compile if compiled else rivals.uncompiled, GUIDANCE)
        return Rival(lambda t: partial(run, *qkv(t), *_away(case, t)), compiles=compiled)

    names = rivals.backends(case.device)
    found = {f"SDPA {name}, each": each(name) for name in names}
    found |= {f"SDPA {name}, each, compiled": each(name, True) for name in names if name != "math"}
    return {**found, "plain attention": plain(case)}


def _kept(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {"logits in memory": Rival(lambda t: partial(rivals.kept_energy, t["q"], t["k"]))}


def _compiled(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {"torch.compile": Rival(lambda t: compile(_update("official", case, t, "eager")), compiles=True)}


def _projecting(case: Case) -> int:
    return 2 * case.batch * case.n * (case.heads * case.d) ** 2


UPDATE = ("v", "k", "projection", "gammas")
OPERATIONS = {
    "attention_with_context_gradient": Operation(
        _with_context_gradient,
        (*QKV, "key_bias"),
        ("out", "update"),
        QKV,
        timings={
            "attention_with_context_gradient": Timing(
                lambda case: products(case, 3), _twice, kernels=("context_gradient_fwd", "context_gradient_merge")
            )
        },
    ),
    "attention_with_context_gradient_weighted": Operation(
        _with_context_gradient, (*QKV, "key_bias", "share"), ("out", "update"), (*QKV, "share")
    ),
    "context_energy": Operation(
        _energy,
        ("q", "k", "key_bias"),
        ("attention", "context"),
        ("q", "k"),
        timings={"context_energy": Timing(products, _kept)},
    ),
    "context_update": Operation(
        partial(_update, "official"),
        UPDATE,
        ("increment",),
        more_leaves=UPDATE,
        timings={"context_update": Timing(_projecting, _compiled, kernels=("context_pull_fwd",))},
    ),
    "context_update_paper": Operation(
        partial(_update, "paper"),
        (*UPDATE, "token_weight"),
        ("increment",),
        more_leaves=(*UPDATE, "token_weight"),
    ),
    "composed_attention": Operation(
        _composed,
        (*QKV, "key_bias"),
        ("out",),
        QKV,
        timings={
            "composed_attention": Timing(
                lambda case: products(case, 2 * len(WEIGHTS)), _each, kernels=("composed_attention_fwd",)
            )
        },
    ),
    "normalized_guidance": Operation(
        _guided,
        (*QKV, "key_bias"),
        ("out",),
        QKV,
        timings={
            "normalized_guidance": Timing(lambda case: products(case, 4), _apart, kernels=("normalized_guidance_fwd",))
        },
    ),
    "normalized_guidance_shared": Operation(
        _guided, (*QKV, "rest_out", "rest_lse", "key_bias"), ("out",), (*QKV, "rest_out", "rest_lse")
    ),
}
