"""The step of a Bayesian context update, from what attention says of the keys back to the context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from .._impl import resolve
from .._validate import check_kernel_limits, check_key_bias, wide_dtype
from ._library import differentiated, launcher, opaque

CONVENTIONS = ("official", "paper")
KeyProjection: TypeAlias = Tensor | Callable[[Tensor], Tensor]

# The increment before its projection.
_pull_triton = opaque(
    "context_pull_triton(Tensor update, Tensor k, Tensor gamma_attn, Tensor gamma_norm, Tensor? token_weight, "
    "float alpha, bool halved) -> Tensor",
    launcher("context_update", "context_pull"),
    lambda update, k, *_: k.new_empty(k.shape[0], k.shape[2], k.shape[1] * k.shape[3]),
)


def flat_keys(k: Tensor) -> Tensor:
    """Return the keys of all heads side by side: [B,N,H*d], float32 at least."""
    return k.transpose(1, 2).flatten(2).to(wide_dtype(k.dtype))


def _check_number(name: str, value: float | Tensor, batch: int) -> None:
    if isinstance(value, Tensor):
        if value.shape not in ((), (batch,)):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be a number, a 0-d tensor or one number per sample "
                f"[{batch}]"
            )
    elif not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")


def _is_bare(to_k: KeyProjection) -> TypeGuard[torch.nn.Linear]:
    """Return whether calling the module is nothing but a product with its weight.

    Then that is taken: to differentiate a call costs the host more than all other work of an update.
    """
    if type(to_k) is not torch.nn.Linear or "forward" in to_k.__dict__:
        return False
    # A quantised weight is a tensor of another class, an offloaded one has no memory.
    own = type(to_k.weight) is torch.nn.Parameter and not to_k.weight.is_meta
    return own and not to_k._forward_hooks and not to_k._forward_pre_hooks


def _is_float8(parameter: Tensor | None) -> bool:
    """Return whether a projection's weight is only stored as it is; hooks cast it for every call."""
    return parameter is not None and parameter.dtype.is_floating_point and parameter.dtype.itemsize == 1


def _input_dtype(parameter: Tensor | None, keys: torch.dtype, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype to call a projection with.

    It is its parameter's, that of the keys that it made where the parameter is float8, and `otherwise` where that is no
    floating-point tensor (quantised) or there is none.
    """
    if parameter is None or not parameter.dtype.is_floating_point:
        return otherwise
    return keys if _is_float8(parameter) else parameter.dtype


def _by_functorch(parameter: Tensor | None) -> bool:
    """Return whether torch.func differentiates the projection.

    Dynamo traces nothing else, and nothing else takes weights made in inference mode. It crashes on float8, whose hooks
    Dynamo cannot trace in any case.
    """
    if torch.compiler.is_compiling():
        return not _is_float8(parameter)
    return parameter is not None and parameter.is_inference()


def project_back(pull: Tensor, to_k: KeyProjection, keys: torch.dtype) -> Tensor:
    """Return `pull` [B,N,H*d] times the weight of the key projection: [B,N,d_ctx].

    `keys`: the dtype of what it makes.

    A module is differentiated, not read, unless it is a bare linear one: the weight may be adapted (LoRA), quantised or
    offloaded.
    """
    if _is_bare(to_k):
        to_k = to_k.weight
    if isinstance(to_k, Tensor):
        return pull.to(to_k.dtype) @ to_k
    width = getattr(to_k, "in_features", None)
    if not isinstance(width, int):
        raise ValueError(
            f"to_k is {type(to_k).__name__}, which does not say its in_features; pass a linear module or its weight "
            "[H*d, d_ctx]"
        )
    parameter = next(to_k.parameters(), None) if isinstance(to_k, torch.nn.Module) else None
    # The projection is linear, so its derivative is the same at every context.
    origin = torch.zeros(*pull.shape[:2], width, dtype=_input_dtype(parameter, keys, pull.dtype), device=pull.device)
    if _by_functorch(parameter):
        out, pull_back = torch.func.vjp(to_k, origin)[:2]
        return pull_back(pull.to(out.dtype))[0]
    # Hooks may give a weight other memory after the call (casting, offloading): what is saved keeps that of the call.
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x)
    recorded = differentiated(pull)
    with torch.inference_mode(False), torch.enable_grad(), kept:
        origin = origin.clone().requires_grad_()
        out = to_k(origin)
        (found,) = torch.autograd.grad(out, origin, pull.to(out.dtype), create_graph=recorded)
    return found


def context_update(
    update: Tensor,
    k: Tensor,
    to_k: KeyProjection,
    *,
    gamma_attn: float | Tensor,
    gamma_norm: float | Tensor,
    token_weight: Tensor | None = None,
    alpha: float = 0.0,
    convention: str = "official",
    key_bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute the increment of the context: minus gamma times the gradient of the two energies (arXiv 2306.09869).

    (gamma_attn u_n (concat_h update_n - alpha k_n) - gamma_norm p_n k_n) W_K for every text token n, where p is the
    softmax over tokens of the squared norm of the keys, all heads together. Differentiable in
    update, k, the gammas and token_weight, and in the projection's weight where that is given as a tensor.

    Args:
        update: from `attention_with_context_gradient`, `[B,H,N,d]`.
        k: the layer's keys, `[B,H,N,d]`.
        to_k: the key projection, a linear module (called, not read, wherever it is more than its weight) or its
            weight `[H*d, d_ctx]`.
        gamma_attn: the step on the attention's energy: a float, a 0-d tensor or one number per sample `[B]`.
        gamma_norm: the step on the energy of the keys' norms, likewise.
        token_weight: u, how far each token may move on the attention's energy, `[N]` or `[B,N]`.
        alpha: weight of the squared norm in the attention's energy; the released code has none.
        convention: `"official"` (p = softmax ||k||^2) or `"paper"` (p = softmax ||k||^2 / 2, its energy's gradient).
        key_bias: `[B,N]`, as for the attention: columns that it masks by -inf have no part in p, and do not move.
        impl: `"triton"` (one kernel before the projection, where nothing is differentiated or masked), `"eager"` or
            `"reference"`, which are the same formula; None for the default.

    Returns:
        the increment `[B,N,d_ctx]`, in the dtype of the projection.

    Raises:
        ValueError: shapes or devices that do not fit, a gamma that is not finite (tensors are trusted), or an unknown
            convention.
    """
    if update.ndim != 4 or update.shape != k.shape:
        raise ValueError(
            f"update has shape {tuple(update.shape)} and k {tuple(k.shape)}; both must be [batch, heads, tokens, width]"
        )
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; it must be one of {', '.join(map(repr, CONVENTIONS))}")
    batch, heads, tokens, width = k.shape
    _check_number("gamma_attn", gamma_attn, batch)
    _check_number("gamma_norm", gamma_norm, batch)
    _check_number("alpha", alpha, batch)
    if isinstance(to_k, Tensor) and (to_k.ndim != 2 or to_k.shape[0] != heads * width):
        raise ValueError(f"to_k has shape {tuple(to_k.shape)}; it must be [H*d, d_ctx] with H*d = {heads * width}")
    if token_weight is not None:
        if token_weight.shape not in ((tokens,), (batch, tokens)):
            raise ValueError(
                f"token_weight has shape {tuple(token_weight.shape)}; it must be [{tokens}] or [{batch}, {tokens}]"
            )
        token_weight = token_weight.expand(batch, tokens)
    key_bias = check_key_bias(key_bias, k)
    halved = convention == "paper"
    named = {"update": update, "gamma_attn": gamma_attn, "gamma_norm": gamma_norm, "token_weight": token_weight}
    for name, x in named.items():
        if isinstance(x, Tensor) and x.device != k.device:
            raise ValueError(f"{name} is on {x.device} but k is on {k.device}; move it there")
    tensors = [x for x in (update, k, gamma_attn, gamma_norm, token_weight) if isinstance(x, Tensor)]
    if resolve(impl, k.device) == "triton" and key_bias is None and not differentiated(*tensors):
        check_kernel_limits(k)
        gammas = [x if isinstance(x, Tensor) else torch.full((), x, device=k.device) for x in (gamma_attn, gamma_norm)]
        pull = _pull_triton(update, k, *gammas, token_weight, float(alpha), halved)
    else:
        pull = _pull(update, k, gamma_attn, gamma_norm, token_weight, alpha, halved, key_bias)
    return project_back(pull, to_k, k.dtype)


def _pull(
    update: Tensor,
    k: Tensor,
    gamma_attn: float | Tensor,
    gamma_norm: float | Tensor,
    token_weight: Tensor | None,
    alpha: float,
    halved: bool,
    key_bias: Tensor | None,
) -> Tensor:
    """Return the increment before its projection, [B,N,H*d]."""
    gamma_attn, gamma_norm = (
        x[:, None, None] if isinstance(x, Tensor) and x.ndim else x for x in (gamma_attn, gamma_norm)
    )
    keys, pull = flat_keys(k), flat_keys(update)
    if alpha:
        pull = pull - alpha * keys
    pull = gamma_attn * pull
    if token_weight is not None:
        pull = pull * token_weight.unsqueeze(-1).to(pull.dtype)
    square = keys.square().sum(-1)
    energy = square / 2 if halved else square
    if key_bias is None:
        return pull - gamma_norm * energy.softmax(-1).unsqueeze(-1) * keys
    masked = key_bias.isneginf()
    # Zeros where everything is masked.
    share = torch.ops.aten._safe_softmax(energy.masked_fill(masked, -torch.inf), -1)
    return (pull - gamma_norm * share.unsqueeze(-1) * keys).masked_fill(masked.unsqueeze(-1), 0.0)
