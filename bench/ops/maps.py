"""Attention that returns its maps, and what losses make of maps."""

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

# Losses read the maps that attention returns, which are in float32.
SINGLE: dict[str, Any] = {"dtype": torch.float32}


def _with_maps(reduce: str, case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"key_bias": t.get("key_bias"), "reduce": reduce, "impl": impl}
    return partial(ops.attention_with_maps, *qkv(t), t.get("target_ids"), **how)


def _from_lse(reduce: str, case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"key_bias": t.get("key_bias"), "reduce": reduce, "impl": impl}
    return partial(ops.maps_from_lse, t["q"], t["k"], t["lse"], t["target_ids"], **how)


def _real(case: Case, t: Tensors) -> Tensor:
    """Zeros for padded tokens, where an operation knows no lengths."""
    return t["maps"].nan_to_num() if "lengths" in t else t["maps"]


def _smooth_maps(case: Case, t: Tensors, impl: str) -> Run:
    return lambda: ops.smooth_maps(_real(case, t), **case.smoothing, impl=impl)


def _map_similarity(case: Case, t: Tensors, impl: str) -> Run:
    return lambda: ops.map_similarity(_real(case, t), impl=impl)


def _similarity_loss(variant: str, case: Case, t: Tensors, impl: str) -> Run:
    how: dict[str, Any] = {"variant": variant, "lengths": t.get("lengths"), "impl": impl}
    return partial(ops.similarity_loss, t["maps"], t["text"], **case.smoothing, **how)


def one_hot_rivals(case: Case, t: Tensors) -> dict[str, Rival]:
    """Return every backend of stock attention, with one-hot columns of values that give the maps."""
    columns = rivals.Columns.of(t["target_ids"], t["k"])

    def one_hot(name: str) -> Rival:
        attend = partial(rivals.sdpa, name)
        return Rival(lambda t: lambda: rivals.one_hot_maps(attend, *qkv(t), columns.one_hot))

    return {f"SDPA {name}, one-hot": one_hot(name) for name in rivals.backends(case.device)}


def _map_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    published = Rival(lambda t: lambda: rivals.kept_maps(*qkv(t), t["target_ids"]))
    return {**one_hot_rivals(case, t), "published": published}


def _forward_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {**_map_rivals(case, t, compile), "plain attention": plain(case)}


def _by_exp(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def rival(maps: Any, **how: Any) -> Rival:
        return Rival(lambda t: partial(maps(), t["q"], t["k"], t["lse"], t["target_ids"]), **how)

    return {
        "closed form": rival(lambda: rivals.columns_by_exp),
        "torch.compile": rival(lambda: compile(rivals.columns_by_exp), compiles=True),
    }


def _column_rivals(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    columns = rivals.Columns.of(t["target_ids"], t["k"])

    def one_hot(name: str) -> Rival:
        attend = partial(rivals.sdpa, name)
        return Rival(lambda t: partial(rivals.one_hot_columns, attend, t["q"], t["k"], columns.one_hot))

    found = {f"SDPA {name}, one-hot": one_hot(name) for name in rivals.backends(case.device)}
    return {**_by_exp(case, t, compile), **found}


def _unnamed(case: Case) -> int:
    """Bytes of the keys that are not those of a target."""
    return case.batch * case.heads * (case.n - len(case.ids[0])) * case.d * case.dtype.itemsize


def _convolution(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    reference = Rival(lambda t: _smooth_maps(case, t, "reference"))
    return {"reference": reference, "conv2d": Rival(lambda t: partial(rivals.convolved, t["maps"], case.grid))}


def _cosines(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    return {"closed form": Rival(lambda t: partial(rivals.plain_similarity, t["maps"]))}


def _losses(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    def rival(loss: Any, **how: Any) -> Rival:
        return Rival(lambda t: partial(loss(), t["maps"], t["text"], case.grid), **how)

    return {
        "closed form": rival(lambda: rivals.plain_similarity_loss),
        "torch.compile": rival(lambda: compile(rivals.plain_similarity_loss), compiles=True),
        "published": rival(lambda: rivals.published_similarity_loss),
    }


def _cells(case: Case) -> int:
    return case.batch * case.map_tokens * case.m


def _smoothing(case: Case) -> int:
    """FLOPs of a kernel of three cells along both axes."""
    return 2 * 2 * 3 * _cells(case)


def _comparing(case: Case) -> int:
    """FLOPs of all similarities."""
    return 2 * _cells(case) * case.map_tokens


QK_LSE = ("q", "k", "lse")
MAPS = ("maps", "lengths")
COMPARED = ("maps", "text", "lengths")
KERNELS = ("similarity_products_fwd", "similarity_fwd", "similarity_bwd")
OPERATIONS = {
    "attention_with_maps": Operation(
        partial(_with_maps, "mean"),
        (*QKV, "target_ids", "key_bias"),
        ("out", "maps"),
        QKV,
        timings={
            "attention_with_maps": Timing(
                lambda case: products(case, 2), _forward_rivals, kernels=("attention_maps_fwd",)
            ),
            # As in the last layer that a loss of the maps reads.
            "attention_with_maps_guidance": Timing(
                lambda case: products(case, 3), _map_rivals, leaves=("q",), outputs=("maps",)
            ),
        },
    ),
    "attention_with_all_maps": Operation(partial(_with_maps, "mean"), (*QKV, "key_bias"), ("out", "maps"), QKV),
    "attention_with_maps_of_heads": Operation(
        partial(_with_maps, "none"), (*QKV, "target_ids", "key_bias"), ("out", "maps"), QKV
    ),
    "maps_from_lse": Operation(
        partial(_from_lse, "mean"),
        (*QK_LSE, "target_ids", "key_bias"),
        ("maps",),
        QK_LSE,
        timings={
            "maps_from_lse": Timing(
                lambda case: products(case, 1, len(case.ids[0])),
                _column_rivals,
                unread=_unnamed,
                kernels=("maps_from_lse_fwd",),
            ),
            # No attention by one-hot columns has the logsumexp's gradient apart.
            "maps_from_lse_all": Timing(
                lambda case: products(case, 3, len(case.ids[0])),
                _by_exp,
                leaves=QK_LSE,
                unread=_unnamed,
                kernels=tuple(f"maps_from_lse_bwd_{name}" for name in ("rows", "columns", "merge")),
            ),
        },
    ),
    "maps_from_lse_of_heads": Operation(
        partial(_from_lse, "none"), (*QK_LSE, "target_ids", "key_bias"), ("maps",), QK_LSE
    ),
    "smooth_maps": Operation(
        _smooth_maps,
        MAPS,
        ("smoothed",),
        ("maps",),
        timings={"smooth_maps": Timing(_smoothing, _convolution, options=SINGLE, kernels=("smooth_maps_fwd",))},
    ),
    "map_similarity": Operation(
        _map_similarity,
        MAPS,
        ("similarity",),
        ("maps",),
        timings={
            "map_similarity": Timing(lambda case: 2 * _comparing(case), _cosines, leaves=("maps",), options=SINGLE)
        },
    ),
    "similarity_loss_cosine": Operation(
        partial(_similarity_loss, "cosine"),
        COMPARED,
        ("loss",),
        ("maps",),
        timings={
            "similarity_loss": Timing(
                lambda case: 2 * (_smoothing(case) + _comparing(case)),
                _losses,
                leaves=("maps",),
                options=SINGLE,
                kernels=KERNELS,
            )
        },
    ),
    **{
        f"similarity_loss_{variant}": Operation(partial(_similarity_loss, variant), COMPARED, ("loss",), ("maps",))
        for variant in ("normalised_cosine", "absolute")
    },
}
