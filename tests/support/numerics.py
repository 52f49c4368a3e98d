"""Inputs of every awkward kind, where they lie, and the rule that errors are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ops.inputs import default_device
from tests.support.rounding import Shared, floor

ULPS = 4
RUNS = 8
DEVICE = default_device()
TRITON = ["triton"] if find_spec("triton") else []  # there is none for macOS and Windows
FAST = ["eager", *TRITON]
IMPLS = ["reference", *FAST]


def widest(impl: str) -> torch.dtype:
    """The widest dtype that an implementation takes."""
    return torch.float32 if impl == "triton" else torch.float64


def orders(width: int) -> list[Tensor]:
    """Orders in which the head width may be summed: the same mathematics, other roundings."""
    generator = torch.Generator().manual_seed(0)
    return [torch.arange(width), *(torch.randperm(width, generator=generator) for _ in range(RUNS - 1))]


class Plain(NamedTuple):
    """Plain PyTorch's result [.., d]: in float64, and in the inputs' dtype in several orders of summing, which
    `compute` makes once more."""

    truth: Tensor
    runs: Sequence[Tensor]
    compute: Callable[[], Tensor]

    def each(self, change: Callable[[Tensor], Tensor]) -> Plain:
        return Plain(change(self.truth), [change(run) for run in self.runs], lambda: change(self.compute()))


def plain_results(function: Callable[..., Tensor], q: Tensor, k: Tensor, *others: Any) -> Plain:
    """Of function(q, k, *others), with the head width of q and k in every one of `orders`."""
    truth = function(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, *others)))
    runs = [function(q[..., order], k[..., order], *others) for order in orders(q.shape[-1])]
    return Plain(truth, runs, lambda: function(q, k, *others))


def plain_gradients(total: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Plain]:
    """Of the gradients of total(order, *leaves), a number, by those leaves that require one; `order` is one of the head
    width in which to sum the logits."""

    def evaluate(order: Tensor | slice, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        wanted = [x for x in inputs if x.requires_grad]
        return torch.autograd.grad(total(order, *inputs), wanted, materialize_grads=True)

    every = slice(None)
    truths = evaluate(every, [x.detach().double().requires_grad_(x.requires_grad) for x in leaves])
    runs = zip(*(evaluate(order, leaves) for order in orders(leaves[0].shape[-1])), strict=True)
    drawn = Shared(lambda: evaluate(every, leaves))
    return [Plain(truth, run, drawn.of(i)) for i, (truth, run) in enumerate(zip(truths, runs, strict=True))]


def carried_by_lse(lse: Tensor, values: Tensor) -> Tensor:
    """The error [B,H,M] of a merge through a logsumexp held in float32: its own rounding is a relative error of every
    weight. Largest over the head's values."""
    return torch.finfo(torch.float32).eps * lse.abs() * values.abs().amax((-1, -2)).unsqueeze(-1)


def carried_to_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    scale: float,
    added: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same for the gradients: dv = P^T dO and dl = P (dP - rowsum(P dP)) with every P off by that.

    `added` [B,H,M,N]: what an edit adds to the logits; with it come the logits' own errors, and both softmaxes count,
    that of the edited logits and that of the others, which pinned columns keep. `key_bias` [B,N], or a mask [B,1,M,N],
    is part of both.
    """
    q, k, v, grad_out = (x.detach().double() for x in (q, k, v, grad_out))
    logits = with_key_bias(scale * (q @ k.mT), key_bias)
    slope = 2 * (grad_out @ v.mT).abs().amax(-1, keepdim=True)
    off = sum(_off_by_lse(x) for x in ([logits] if added is None else [logits, logits + added]))
    off_logits = slope * off
    pairs = {
        "q": scale * off_logits @ k.abs(),
        "k": scale * off_logits.mT @ q.abs(),
        "v": off.mT @ grad_out.abs(),
    }
    errors = {name: error.amax(-1) for name, error in pairs.items()}
    return errors if added is None else {**errors, "logits": off_logits}


def with_key_bias(logits: Tensor, key_bias: Tensor | None) -> Tensor:
    """`logits` [B,H,M,N] with `key_bias` [B,N], or a mask [B,1,M,N], added, if there is one, in their dtype."""
    if key_bias is None:
        return logits
    return logits + (key_bias if key_bias.ndim == 4 else key_bias[:, None, None, :]).to(logits.dtype)


def _off_by_lse(logits: Tensor) -> Tensor:
    """The error of softmax(logits) that the rounding of the logsumexp makes; none where all are -inf."""
    off = torch.finfo(torch.float32).eps * logits.logsumexp(-1, keepdim=True).abs() * logits.softmax(-1)
    return off.nan_to_num()


def chosen_maps(probabilities: Tensor, rows: Sequence[Sequence[int]] | None, reduce: str) -> Tensor:
    """The maps [B,n,M], or with `reduce` "none" [B,H,n,M], of one row of token ids for each sample; None: of all."""
    maps = probabilities.mT
    if rows is not None:
        none = torch.zeros_like(maps[0, :, 0])
        samples = [[x[:, i] if i >= 0 else none for i in row] for x, row in zip(maps, rows, strict=True)]
        maps = torch.stack([torch.stack(sample, 1) for sample in samples])
    return maps.mean(1) if reduce == "mean" else maps


def carried_to_maps(
    q: Tensor,
    k: Tensor,
    rows: Sequence[Sequence[int]] | None,
    reduce: str,
    scale: float,
    key_bias: Tensor | None = None,
) -> Tensor:
    """`carried_by_lse` of probabilities that are made from a logsumexp."""
    logits = with_key_bias(scale * (q.double() @ k.double().mT), key_bias)
    return chosen_maps(_off_by_lse(logits), rows, reduce).amax(-1)


def carried_through_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor | None,
    grad_maps: Tensor | None,
    rows: Sequence[Sequence[int]] | None,
    scale: float,
    key_bias: Tensor | None = None,
) -> dict[str, Tensor | float]:
    """`carried_to_gradients` of attention and its maps, which are the output for values that are one-hot columns."""
    if grad_maps is None:
        return carried_to_gradients(q, k, v, grad_out, scale, key_bias=key_bias)
    (batch, heads), tokens = k.shape[:2], k.shape[2]
    ids = torch.tensor([range(tokens)] * batch if rows is None else rows, device=q.device)
    columns = (ids.unsqueeze(1) == torch.arange(tokens, device=q.device).unsqueeze(-1)).double()  # [B,N,n]
    if grad_maps.ndim == 3:
        grad_maps = grad_maps.unsqueeze(1).expand(-1, heads, -1, -1) / heads
    values, grads = [columns.unsqueeze(1).expand(-1, heads, -1, -1)], [grad_maps.mT.double()]
    if grad_out is not None:
        values, grads = [v.double(), *values], [grad_out.double(), *grads]
    carried = carried_to_gradients(q, k, torch.cat(values, -1), torch.cat(grads, -1), scale, key_bias=key_bias)
    # Only the gradient of the output reaches v.
    if grad_out is None:
        return {**carried, "v": 0.0}
    return {**carried, "v": carried_to_gradients(q, k, v, grad_out, scale, key_bias=key_bias)["v"]}


def _allowed(plain: Plain, error: Tensor, ulps: Tensor) -> Tensor:
    """Twice plain PyTorch's error, or what chance allows it, and the ulps; of a row of one number, whose error in all
    orders may be nearly zero, what chance allows alone."""
    twice = torch.zeros_like(error)
    if plain.truth.shape[-1] > 1:
        twice = 2 * torch.stack([(run.double() - plain.truth).abs().amax(-1) for run in plain.runs]).amax(0)
    if (error <= twice + ulps).all():
        return twice + ulps

    def enough(chance: Tensor) -> bool:
        return bool((error <= torch.maximum(twice, chance) + ulps).all())

    return torch.maximum(twice, floor(plain.compute, plain.truth.double(), enough)) + ulps


def assert_rows_close(
    actual: Tensor, plain: Plain, dtype: torch.dtype, what: str, carried: Tensor | float = 0.0
) -> None:
    """Per row, the error against float64 truth is at most twice that of plain PyTorch in the same dtype plus a few ulp.

    The ulp is that of the row's largest element. One rounding error may be nearly zero by luck, which every processor
    draws anew: plain PyTorch's is the largest of several runs that sum in another order, and twice that counts as no
    less than what its roundings may add up to by chance (`rounding.floor`; made only where it decides). For a row of
    one number that alone counts. `carried` is what the operation's float32 interface adds. The worst row is reported,
    never a mean over the tensor.
    """
    truth = plain.truth.double()
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert not actual.isnan().any(), f"{what}: NaN"
    error = (actual.double() - truth).abs().amax(-1)
    ulps = ULPS * torch.finfo(dtype).eps * truth.abs().amax(-1) + carried
    allowed = _allowed(plain, error, ulps)
    worst = int((error - allowed).argmax())
    found, limit = error.flatten()[worst], allowed.flatten()[worst]
    assert found <= limit, f"{what}: row {worst} is off by {found}, allowed {limit}"


def assert_right(
    actual: Tensor,
    plain: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    *others: Any,
    what: str = "out",
    carried: Tensor | float = 0.0,
) -> None:
    """`actual` is plain(q, k, *others): by torch.testing.assert_close in float64, else by `assert_rows_close`."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, plain(q, k, *others))
    else:
        assert_rows_close(actual, plain_results(plain, q, k, *others), actual.dtype, what, carried)


def full_softmax_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    ids: list[int],
    pinned: list[int],
    scale: float,
    key_bias: Tensor | float = 0.0,
) -> Tensor:
    """Plain PyTorch in the inputs' dtype: full logits, `key_bias` [N] added to all columns and `bias` to some, pinned
    columns put back; zeros where all are masked."""
    logits = (scale * (q @ k.mT) + key_bias).to(q.dtype)
    edited = logits.clone()
    edited[..., ids] += bias.mT.to(q.dtype)
    probabilities = torch._safe_softmax(edited, -1).clone()
    probabilities[..., pinned] = torch._safe_softmax(logits, -1)[..., pinned]
    return probabilities @ v
