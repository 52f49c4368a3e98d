"""Checks of arguments that several operations share. Each error names the value and the remedy."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._observed import observed

TokenIds: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether k and v have fewer heads than q.

    Raises:
        ValueError: q is not [B,H,M,d], k and v are not [B,H,N,d] or [B,K,N,d] with a K that divides H, any is empty, or
            they are not of one float dtype and on one device.
    """
    dtype, device = q.dtype, q.device
    if not dtype.is_floating_point:
        raise ValueError(f"q has dtype {dtype}; it must be a floating-point tensor")
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = x.shape
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {tuple(shape)}; it must be [batch, heads, tokens, head width]")
        if x.dtype != dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {dtype}; cast them to one dtype")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} but q is on {device}; move them to one device")
        if 0 in shape:
            raise ValueError(f"{name} has shape {tuple(shape)}: every dimension must be at least 1")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be the same")
    (batch, heads, _, width), (batch_k, heads_k, _, width_k) = q.shape, k.shape
    if batch != batch_k or heads % heads_k or width != width_k:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, heads and head width, or k have so many "
            "heads that each is that of as many of q's"
        )
    return bool(heads != heads_k)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_scale(scale: float | None, width: int) -> float:
    """Return the factor of the logits: `scale`, or 1/sqrt(head width)."""
    if scale is None:
        return width**-0.5
    if not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")
    return float(scale)


def _check_row(name: str, row: Sequence[int], tokens: int, padded: bool) -> None:
    real = [i for i in row if i != -1] if padded else row
    if not real or (min(real) >= 0 and max(real) < tokens and len({*real}) == len(real)):
        return
    for i in real:
        if not 0 <= i < tokens:
            hint = "; -1 pads only the [batch, T] form" if i == -1 else ""
            raise ValueError(f"{name} holds {i}, but the context has tokens 0..{tokens - 1}{hint}")
    double = next(i for i in real if real.count(i) > 1)
    raise ValueError(f"{name} holds {double} more than once: {list(row)}; every token may be named once")


def _integers(name: str, ids: Any, depth: int = 0) -> list[Any]:
    """Return a sequence of ints, or of such sequences, as lists; arrays and tensors are sequences as well."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if depth > 1 or isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"{name} is {ids!r}; it must be token ids (ints), [T] or one list per sample")
    out: list[Any] = []
    for item in ids:
        item = item.tolist() if hasattr(item, "tolist") else item
        if isinstance(item, int) and not isinstance(item, bool):
            out.append(item)
        elif isinstance(item, (bool, float, str)) or item is None:
            raise ValueError(f"{name} holds {item!r}; token ids are ints, the positions of tokens in the context")
        else:
            out.append(_integers(name, item, depth + 1))
    return out


def _on_device(rows: list[Any], device: torch.device) -> Tensor:
    """Return ids as an int64 tensor on `device`, made once: to move them there waits for all that it has to do."""
    if observed():
        return torch.tensor(rows, dtype=torch.int64, device=device)
    key = tuple(tuple(row) if isinstance(row, list) else row for row in rows), device
    kept = _kept(*key)
    if _capturing(device):
        _captured[key] = kept
    return kept


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# What CUDA graphs read: their replays would find other numbers in memory that was given back.
_captured: dict[tuple[Any, ...], Tensor] = {}


@functools.lru_cache(maxsize=1024)
def _kept(rows: tuple[Any, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int64, device=device)


def _check_token_ids(
    name: str, ids: TokenIds, batch: int, tokens: int, device: torch.device
) -> tuple[Tensor, list[list[int]] | None]:
    """Return `ids` as an int64 tensor on `device`, and as one row per sample.

    The tensor is [T] (all samples) or [B,T] (padded with -1).

    Values are read and checked where that costs no synchronisation: sequences and CPU tensors, outside of tracing.

    Raises:
        ValueError: wrong shape or dtype, an id out of range, or the same id twice.
    """
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {ids.dtype}; it must be torch.int64")
        readable = ids.is_cpu and not torch.compiler.is_compiling() and not isinstance(ids, FakeTensor)
        tensor, rows = ids, ids.tolist() if readable and ids.ndim in (1, 2) else None
    else:
        rows = _integers(name, ids)
        nested = [isinstance(row, list) for row in rows]
        if any(nested) and not all(nested):
            raise ValueError(f"{name} mixes ids and lists of ids: {rows}")
        if nested and all(nested):
            longest = max(len(row) for row in rows)
            rows = [row + [-1] * (longest - len(row)) for row in rows]
        tensor = _on_device(rows, device)
    shape = tensor.shape
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != batch):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [T] or [batch, T] with batch {batch}")
    if shape[-1] > tokens:
        raise ValueError(f"{name} names {tensor.shape[-1]} tokens, but the context has only {tokens}")
    moved = tensor.device != device
    if rows is None:
        return tensor.to(device) if moved else tensor, None
    padded = len(shape) == 2
    for row in rows if padded else [rows]:
        _check_row(name, row, tokens, padded)
    return _on_device(rows, device) if moved else tensor, rows if padded else [rows] * batch


def check_targets(target_ids: TokenIds, pinned_ids: TokenIds, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return target and pinned ids as tensors; at least one target, none of them pinned as well."""
    batch, tokens = k.shape[0], k.shape[2]
    targets, rows = _check_token_ids("target_ids", target_ids, batch, tokens, k.device)
    pinned, pinned_rows = _check_token_ids("pinned_ids", pinned_ids, batch, tokens, k.device)
    if targets.shape[-1] == 0:
        raise ValueError("target_ids is empty; name at least one target token")
    if rows is not None and pinned_rows is not None:
        for row, pins in zip(rows, pinned_rows, strict=True):
            both = {*row}.intersection(pins) - {-1}
            if both:
                raise ValueError(
                    f"token {min(both)} is both in target_ids and in pinned_ids; leave it out of one of them"
                )
    return targets, pinned


def check_tokens(token_ids: TokenIds | None, k: Tensor) -> Tensor | None:
    """Return `token_ids` as a tensor, at least one; None stands for all."""
    if token_ids is None:
        return None
    ids, _ = _check_token_ids("token_ids", token_ids, k.shape[0], k.shape[2], k.device)
    if ids.shape[-1] == 0:
        raise ValueError("token_ids is empty; name at least one token, or pass None for all")
    return ids


def check_columns(token_ids: TokenIds, k: Tensor) -> Tensor:
    """Return `token_ids` as a tensor of at least one; None, which would be all, is an error."""
    if token_ids is None:
        raise ValueError("token_ids is None; name the columns of k whose maps are wanted, such as those of text tokens")
    ids, _ = _check_token_ids("token_ids", token_ids, k.shape[0], k.shape[2], k.device)
    if ids.shape[-1] == 0:
        raise ValueError("token_ids is empty; name at least one column of k")
    return ids


REDUCTIONS = ("mean", "none")


def check_reduce(reduce: str) -> None:
    """Raise ValueError unless `reduce` says what becomes of the heads' maps."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}; it must be 'mean', over the heads, or 'none'")


def check_lse(lse: Tensor, q: Tensor) -> Tensor:
    """Return `lse`; raise ValueError unless it is [B,H,M], on q's device and as wide as the computation."""
    wide, shape = wide_dtype(q.dtype), q.shape[:3]
    if lse.shape != shape:
        raise ValueError(
            f"lse has shape {tuple(lse.shape)}; it must be [batch, heads, image tokens] = {list(shape)}, one number "
            "for every row of q"
        )
    if lse.dtype != wide:
        raise ValueError(f"lse has dtype {lse.dtype}; with q in {q.dtype} it must be {wide}, as attention returns it")
    if lse.device != q.device:
        raise ValueError(f"lse is on {lse.device} but q is on {q.device}; move it there")
    return lse


def check_device(name: str, x: Tensor | float | None, whose: str, device: torch.device) -> None:
    """Raise ValueError where `x` is a tensor elsewhere: a kernel would take its address for one on its own device."""
    if isinstance(x, Tensor) and x.device != device:
        raise ValueError(f"{name} is on {x.device} but {whose} is on {device}; move it there")


def check_dtype(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`; raise ValueError where that would lose digits."""
    if x.dtype == dtype:
        return x
    if torch.promote_types(x.dtype, dtype) != dtype:
        raise ValueError(f"{name} is {x.dtype} but the computation is {dtype}; cast it, or the inputs to {x.dtype}")
    return x.to(dtype)


def check_key_bias(key_bias: Tensor | None, k: Tensor, name: str = "key_bias") -> Tensor | None:
    """Return `key_bias` [B,N] in float32, or float64 for float64 keys [B,H,N,d].

    Values are read and checked where that costs no synchronisation: on a CPU, outside of tracing.

    Raises:
        ValueError: another shape or device, no floating-point tensor, NaN or +inf, or one that requires a gradient.
    """
    if key_bias is None:
        return None
    shape = (k.shape[0], k.shape[2])
    if tuple(key_bias.shape) != shape or not key_bias.dtype.is_floating_point:
        raise ValueError(
            f"{name} is {key_bias.dtype} of shape {tuple(key_bias.shape)}; it must be a float tensor "
            f"[batch, text tokens] = {list(shape)}, added to the logits: 0 keeps a column, -inf masks it"
        )
    if key_bias.device != k.device:
        raise ValueError(f"{name} is on {key_bias.device} but k is on {k.device}; move it there")
    if key_bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but is a constant; pass {name}.detach()")
    readable = key_bias.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not isinstance(key_bias, FakeTensor) and not (key_bias < torch.inf).all():
        raise ValueError(f"{name} holds NaN or +inf; every number must be finite, or -inf to mask its column")
    return key_bias.to(wide_dtype(k.dtype))


def check_grid(grid: tuple[int, int], image_tokens: int | None = None) -> tuple[int, int]:
    """Return (height, width) as two positive ints, with height*width == image_tokens where that is given."""
    try:
        height, width = (operator.index(side) for side in grid)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f"grid is {grid}; it must be (height, width), two ints of at least 1")
    if image_tokens is not None and height * width != image_tokens:
        raise ValueError(
            f"grid {height}x{width} has {height * width} cells, but there are {image_tokens} image tokens; "
            "pass the (height, width) of this layer"
        )
    return height, width


KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_WIDTHS = (8, 256)
KERNEL_COLUMNS = 64


def check_kernel_dtype(x: Tensor) -> None:
    """Raise ValueError unless the Triton kernels take tensors of x's dtype."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"the Triton kernels take float16, bfloat16 and float32, not {x.dtype}; cast, or use impl='eager'"
        )


def check_kernel_limits(q: Tensor, columns: int = 0) -> None:
    """Raise ValueError where the Triton kernels cannot run: dtype, head width, number of target and pinned columns."""
    check_kernel_dtype(q)
    elsewhere = "use impl='eager'"
    least, most = KERNEL_WIDTHS
    if not least <= q.shape[-1] <= most:
        raise ValueError(f"the Triton kernels take head widths {least} to {most}, not {q.shape[-1]}; {elsewhere}")
    if columns > KERNEL_COLUMNS:
        raise ValueError(
            f"the Triton kernels take at most {KERNEL_COLUMNS} target and pinned tokens together, not {columns}; "
            f"name fewer, or {elsewhere}"
        )
