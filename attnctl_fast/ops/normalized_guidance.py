"""Normalized attention guidance: attention to a prompt, moved away from that to a negative prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from .._impl import resolve
from .._validate import check_device, check_kernel_limits, check_key_bias, check_qkv, check_scale, wide_dtype
from ._library import differentiated, launcher, opaque
from .attention import attend, attend_only, attention


def check_guidance(scale: float, tau: float, alpha: float | Tensor, norm: int) -> None:
    """Raise ValueError unless these are the numbers of a guidance."""
    for name, value in (("scale", scale), ("tau", tau), ("alpha", alpha)):
        if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")
    if isinstance(alpha, Tensor) and alpha.ndim:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}; it must be one number, a 0-d tensor")
    if norm not in (1, 2):
        raise ValueError(f"norm is {norm!r}; it must be 1 (the paper's text) or 2 (the released code)")


def _check_shared(shared: tuple[Tensor, Tensor], q: Tensor) -> None:
    for name, x, shape in (("shared[0]", shared[0], q.shape), ("shared[1]", shared[1], q.shape[:3])):
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}: attention and logsumexp")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it there")


def _fake(positive: Tensor, *_: object) -> Tensor:
    return positive.new_empty(positive.shape)


def _fake_each(
    q: Tensor, ks: list[Tensor], vs: list[Tensor], key_biases: list[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(len(ks), *q.shape), q.new_empty(len(ks), *q.shape[:3], dtype=torch.float32)


_guided_op = opaque(
    "normalized_guidance_triton(Tensor positive, Tensor negative, Tensor[] lses, Tensor[] shared, Tensor? alpha_now, "
    "float scale, float tau, float alpha, int norm) -> Tensor",
    launcher("normalized_guidance", "normalized_guidance"),
    _fake,
)
_each_op = opaque(
    "attention_to_each_triton(Tensor q, Tensor[] ks, Tensor[] vs, Tensor[] key_biases, float scale) "
    "-> (Tensor, Tensor)",
    launcher("normalized_guidance", "attention_to_each"),
    _fake_each,
)


def _merged(out: Tensor, lse: Tensor, shared: tuple[Tensor, Tensor]) -> Tensor:
    """Return attention over the columns of both softmaxes, of which each has its logsumexp."""
    other, other_lse = (x.to(out.dtype) for x in shared)
    weights = torch.ops.aten._safe_softmax(torch.stack([lse, other_lse], -1), -1)
    return weights[..., :1] * out + weights[..., 1:] * other


def _kernels(positive: Tensor, negative: Tensor, lses: list[Tensor], shared: list[Tensor], *numbers: object) -> Tensor:
    scale, tau, alpha, norm = numbers
    now = alpha if isinstance(alpha, Tensor) else None
    return _guided_op(positive, negative, lses, shared, now, scale, tau, 0.0 if now is not None else alpha, norm)


def _guided(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float | Tensor, norm: int) -> Tensor:
    """Run `reference.guided`; where nothing is differentiated, in six passes over memory and not nine."""
    if differentiated(positive, negative):
        return reference.guided(positive, negative, scale, tau, alpha, norm)
    extended = (negative * (1 - scale)).add_(positive, alpha=scale)
    size, allowed = (torch.linalg.vector_norm(x, norm, (1, 3), keepdim=True) for x in (extended, positive))
    allowed = tau * allowed
    within = size <= allowed
    share = alpha * torch.where(within, 1.0, allowed / torch.where(within, 1.0, size))
    extended.mul_(share)
    kept = 1 - alpha
    return extended.add_(positive * kept) if isinstance(kept, Tensor) else extended.add_(positive, alpha=kept)


def guided(
    positive: Tensor,
    negative: Tensor,
    *,
    scale: float,
    tau: float,
    alpha: float | Tensor,
    norm: int,
    impl: str | None = None,
) -> Tensor:
    """Compute the second half of `normalized_guidance` from the attention to the prompt and to the negative prompt.

    Args:
        positive: attention to the prompt `[B,H,M,d]`, any strides.
        negative: attention to the negative prompt, likewise.
        scale: as for `normalized_guidance`.
        tau: likewise.
        alpha: likewise.
        norm: likewise.
        impl: likewise.

    Returns:
        out `[B,H,M,d]` in the dtype of positive.

    Raises:
        ValueError: a number out of range.
    """
    check_guidance(scale, tau, alpha, norm)
    check_device("alpha", alpha, "positive", positive.device)
    impl = resolve(impl, positive.device)
    if impl == "triton" and not differentiated(positive, negative):
        check_kernel_limits(positive)
        return _kernels(positive, negative, [], [], scale, tau, alpha, norm)
    wide = wide_dtype(positive.dtype)
    blend = reference.guided if impl == "reference" else _guided
    return blend(positive.to(wide), negative.to(wide), scale, tau, alpha, norm).to(positive.dtype)


def normalized_guidance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_negative: Tensor,
    v_negative: Tensor,
    *,
    scale: float,
    tau: float,
    alpha: float | Tensor,
    norm: int,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    key_bias_negative: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """Compute attention to a prompt, moved away from that to a negative prompt (arXiv 2505.21179, "NAG").

    With the attentions Z+ and Z-: G = scale Z+ - (scale - 1) Z-, shortened where its norm is more than tau times that
    of Z+, and out = alpha G + (1 - alpha) Z+. The norms are of an image token's features, of all heads together.
    Differentiable in q, in both texts' keys and values, and in `shared`; where a gradient is recorded, the kernels
    attend, and PyTorch's own operations blend.

    Args:
        q: queries `[B,H,M,d]`, any strides.
        k: the prompt's keys `[B,H,N,d]`.
        v: the prompt's values `[B,H,N,d]`.
        k_negative: the negative prompt's keys `[B,H,N',d]`.
        v_negative: its values `[B,H,N',d]`.
        scale: strength of the guidance; 1 is plain attention. (The factor of the logits is `softmax_scale`.)
        tau: the largest norm, as a multiple of that of the attention to the prompt.
        alpha: share of the guided attention; or a 0-d tensor, which is trusted, and under torch.compile may change
            without a new graph.
        norm: 1 (the paper's text) or 2 (the released code).
        softmax_scale: factor of the logits, 1/sqrt(d) by default.
        key_bias: what is added to the scaled logits of the prompt's columns `[B,N]`, -inf for a masked one: as for
            `attention`.
        key_bias_negative: the same of the negative prompt's columns `[B,N']`.
        shared: attention `[B,H,M,d]` to columns that both softmaxes have besides, and its logsumexp `[B,H,M]`: those of
            the image in joint attention, which are attended to once for both texts.
        impl: `"triton"`, `"eager"` or `"reference"`; None for the default.

    Returns:
        out `[B,H,M,d]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a number out of range.
    """
    grouped = check_qkv(q, k, v) | check_qkv(q, k_negative, v_negative)
    check_guidance(scale, tau, alpha, norm)
    check_device("alpha", alpha, "q", q.device)
    biases = [
        check_key_bias(key_bias, k),
        check_key_bias(key_bias_negative, k_negative, "key_bias_negative"),
    ]
    if shared is not None:
        _check_shared(shared, q)
    factor, impl = check_scale(softmax_scale, q.shape[3]), resolve(impl, q.device)
    texts = ((k, v, biases[0]), (k_negative, v_negative, biases[1]))
    parts = () if shared is None else shared
    if grouped:
        # The norms are those of all heads, so that groups cannot be samples.
        attended = []
        for keys, values, bias in texts:
            out, lse = attention(q, keys, values, scale=factor, key_bias=bias, return_lse=True, impl=impl)
            attended.append(out if shared is None else _merged(out.to(lse.dtype), lse, shared).to(q.dtype))
        positive, negative = attended
        return guided(positive, negative, scale=scale, tau=tau, alpha=alpha, norm=norm, impl=impl)
    if impl == "reference":
        found = reference.normalized_guidance(
            q, k, v, k_negative, v_negative, scale, tau, alpha, norm, factor, biases, shared
        )
        return found.to(q.dtype)
    if impl == "triton":
        check_kernel_limits(q)
        if not differentiated(q, k, v, k_negative, v_negative, *parts):
            given = [k.new_zeros(k.shape[::2], dtype=torch.float32) if x is None else x for k, _, x in texts]
            some = given if any(x is not None for x in biases) else []
            outs, lses = _each_op(q, [k, k_negative], [v, v_negative], some, factor)
            return _kernels(*outs.unbind(), list(lses.unbind()), list(parts), scale, tau, alpha, norm)
    wide = wide_dtype(q.dtype)
    attended = []
    for keys, values, bias in texts:
        if impl == "triton":
            out, lse = attention(q, keys, values, scale=factor, key_bias=bias, return_lse=True, impl=impl)
            out = out.to(wide)
        elif shared is None:
            attended.append(attend_only(q.to(wide), keys.to(wide), values.to(wide), None, None, factor, bias))
            continue
        else:
            out, lse = attend(q, keys, values, None, None, factor, bias)
        attended.append(out if shared is None else _merged(out, lse, shared))
    positive, negative = attended
    return _guided(positive, negative, scale, tau, alpha, norm).to(q.dtype)
