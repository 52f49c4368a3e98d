"""Attention with a bias on the targets' columns, and the Gaussians that make one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from attnctl_fast import ops
from bench.harness.timing import Run
from bench.ops import rivals
from bench.ops.attention import QKV
from bench.ops.base import EDIT, Operation, Rival, Timing, products, spanning
from bench.ops.inputs import Case, Tensors, qkv

# No rival has pinned columns.
UNPINNED: dict[str, Any] = {"pinned": ((),)}


def _gaussian_bias(case: Case, t: Tensors, impl: str) -> Run:
    return partial(ops.gaussian_bias, t["theta"], **case.basis, impl=impl)


def _how(t: Tensors, impl: str) -> dict[str, Any]:
    return {**{name: t[name] for name in EDIT}, "key_bias": t.get("key_bias"), "impl": impl}


def _biased(case: Case, t: Tensors, impl: str) -> Run:
    how = _how(t, impl)
    return lambda: ops.biased_attention(*qkv(t), t["bias"], **how)


def _regulated(case: Case, t: Tensors, impl: str) -> Run:
    how = {**case.basis, **_how(t, impl)}
    return lambda: ops.regulated_attention(*qkv(t), t["theta"], **how)


def _two_products(case: Case, t: Tensors, compile: rivals.Compile) -> dict[str, Rival]:
    axes = rivals.axes(case.grid, t["theta"])
    return {"two products": Rival(lambda t: partial(rivals.span, t["theta"], _like(axes, t["theta"])))}


def _like(axes: tuple[Tensor, Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    return axes[0].to(theta.dtype), axes[1].to(theta.dtype)


def stock_rivals(
    bias: Callable[[Case, Tensors], Callable[[Tensors], Tensor]],
    differentiated: bool,
    case: Case,
    t: Tensors,
    compile: rivals.Compile,
) -> dict[str, Rival]:
    """Stock PyTorch for attention with a bias on columns. bias: makes of the case what makes the bias of the tensors;
    differentiated: by the bias too."""
    columns, biased = rivals.Columns.of(t["target_ids"], t["k"]), bias(case, t)
    # Flash attention takes no mask on a GPU, and none that needs a gradient on a CPU. What does not fuse gains nothing
    # from a lower rank.
    maskless = case.device.type == "cuda" or differentiated
    masked = [name for name in rivals.backends(case.device) if not (name == "flash" and maskless)]
    fused = [name for name in rivals.backends(case.device) if name != "math"]
    forms = {
        **{f"SDPA {name}, mask": partial(rivals.masked_sdpa, name) for name in masked},
        **{f"SDPA {name}, low rank": partial(rivals.low_rank_sdpa, name) for name in fused},
    }

    def bind(attend: Callable[..., Tensor]) -> Callable[[Tensors], Run]:
        return lambda t: lambda: attend(*qkv(t), biased(t), columns)

    found = {name: Rival(bind(attend)) for name, attend in forms.items()}
    return {**found, "FlexAttention": Rival(lambda t: bind(rivals.flex(compile))(t), compiles=True)}


def given_bias(case: Case, t: Tensors) -> Callable[[Tensors], Tensor]:
    return lambda t: t["bias"]


def _spanned(case: Case, t: Tensors) -> Callable[[Tensors], Tensor]:
    axes = rivals.axes(case.grid, t["theta"])
    return lambda t: rivals.span(t["theta"], axes)


def _training(op: str, edit: str, extra: Callable[[Case], int]) -> dict[str, Timing]:
    """Forward, and forward and backward: to the edit alone, or to q, k and v as well. To the edit alone it takes its
    columns of dO V^T; to everything, dV, dP, dQ and dK."""
    stock = partial(stock_rivals, given_bias if edit == "bias" else _spanned)
    how: dict[str, Any] = {"options": UNPINNED}
    trained: dict[str, Any] = {"rivals": partial(stock, True), **how}
    kernels = ("attention_bwd_rows", "attention_bwd_columns", "attention_bwd_special") if edit == "theta" else ()
    return {
        op: Timing(
            lambda case: products(case, 2) + extra(case),
            partial(stock, False),
            kernels=("attention_fwd",) if edit == "theta" else (),
            **how,
        ),
        f"{op}_edit": Timing(
            lambda case: products(case, 2) + products(case, columns=len(case.ids[0])) + 2 * extra(case),
            leaves=(edit,),
            **trained,
        ),
        f"{op}_all": Timing(
            lambda case: products(case, 6) + 2 * extra(case), leaves=(*QKV, edit), kernels=kernels, **trained
        ),
    }


OPERATIONS = {
    "biased_attention": Operation(
        _biased,
        (*QKV, "bias", *EDIT, "key_bias"),
        ("out",),
        (*QKV, "bias"),
        timings=_training("biased_attention", "bias", lambda case: 0),
    ),
    "regulated_attention": Operation(
        _regulated,
        (*QKV, "theta", *EDIT, "key_bias"),
        ("out",),
        (*QKV, "theta"),
        timings=_training("regulated_attention", "theta", spanning),
    ),
    "gaussian_bias": Operation(
        _gaussian_bias,
        ("theta",),
        ("bias",),
        ("theta",),
        timings={
            "gaussian_bias": Timing(spanning, _two_products, kernels=("gaussian_bias_fwd",)),
            "gaussian_bias_all": Timing(
                lambda case: 2 * spanning(case), _two_products, leaves=("theta",), kernels=("gaussian_bias_bwd",)
            ),
        },
    ),
}
