"""The rule for errors on every operation whose kernels have one: what plain PyTorch gives, and what may be off."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.ops.attention import GROUPS
from bench.ops.base import upstream, wide
from bench.ops.inputs import Case, Tensors, fenced
from bench.ops.registry import ATTENTION, DECLARED, JUDGED, LOSSES, MAPS
from bench.ops.rivals import seen_by_groups
from tests.support.numerics import (
    DEVICE,
    Plain,
    assert_rows_close,
    carried_by_lse,
    carried_through_maps,
    carried_to_gradients,
    carried_to_maps,
    full_softmax_output,
    orders,
)
from tests.support.rounding import Shared

IMPL = "triton"
OPERATIONS = {name: DECLARED[name] for name in JUDGED}
IN_SINGLE = ("region_attention", "maps_from_lse")


def plain(name: str, case: Case, t: Tensors, parts: int = 1) -> Tensors:
    """The outputs in plain PyTorch, the attention itself in the inputs' dtype, its sums over the head width in `parts`
    that are added."""
    t = spread(t)
    outputs = OPERATIONS[name].run(case, "reference", t)
    # Half-precision logits of these would be judged by the rounding of what is added to them, or taken from them.
    if name not in ATTENTION or name in IN_SINGLE or t["q"].dtype in (torch.float32, torch.float64):
        return outputs
    if name == "target_statistics":
        gone = [set(row) for row in case.rows(case.ids)]
        kept = [[i for i in range(case.n) if i not in row] for row in gone]
        rest = [
            _attended(t["q"][i], t["k"][i, :, columns], t["v"][i, :, columns], _of_columns(t, i, columns), parts)
            for i, columns in enumerate(kept)
        ]
        return {**outputs, "rest_out": torch.stack(rest)}
    if name == "grouped_attention":
        return {**outputs, "out": _attended(t["q"], t["k"], t["v"], _of_groups(t), parts)}
    if name in ("attention", "attention_with_maps"):
        return {**outputs, "out": _attended(t["q"], t["k"], t["v"], _of_columns(t, None), parts)}
    bias = t["bias"] if name == "biased_attention" else ops.gaussian_bias(t["theta"], **case.basis, impl="reference")
    samples = []
    for i, (ids, pinned) in enumerate(zip(case.rows(case.ids), case.rows(case.pinned), strict=True)):
        real = [t for t, token in enumerate(ids) if token >= 0]
        inputs = (t["q"][i], t["k"][i], t["v"][i], bias[i][:, real], [ids[t] for t in real])
        pins = [token for token in pinned if token >= 0]
        samples.append(full_softmax_output(*inputs, pins, case.scale, _of_columns(t, i)))
    return {"out": torch.stack(samples)}


def spread(t: Tensors) -> Tensors:
    """The inputs with a head of k and v for each of q."""
    if "k" not in t or t["k"].shape[1] == t["q"].shape[1]:
        return t
    return t | {name: t[name].repeat_interleave(t["q"].shape[1] // t[name].shape[1], 1) for name in "kv"}


def _of_columns(t: Tensors, sample: int | None, columns: Sequence[int] | slice = slice(None)) -> Tensor | float:
    """The key_bias of one sample's columns, or as [B,1,1,N]; 0 where there is none."""
    if "key_bias" not in t:
        return 0.0
    return t["key_bias"][:, None, None, :] if sample is None else t["key_bias"][sample, columns]


def _of_groups(t: Tensors) -> Tensor:
    """The key_bias and which columns the row's group does not see, as a mask [B,1,M,N]."""
    seen = seen_by_groups(*(t[x] for x in GROUPS)).unsqueeze(1)
    return torch.where(seen, _of_columns(t, None), -torch.inf)


def _attended(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | float, parts: int) -> Tensor:
    logits = sum(a @ b.mT for a, b in zip(q.chunk(parts, -1), k.chunk(parts, -1), strict=True))
    weights = torch._safe_softmax((q.shape[-1] ** -0.5 * logits + key_bias).to(q.dtype), -1)
    return torch.cat([weights @ part for part in v.chunk(parts, -1)], -1)


def gradients(
    case: Case, t: Tensors, grads: Tensors, leaves: Sequence[str], run: Callable[[Case, Tensors], Tensors]
) -> Tensors:
    """The gradients of `leaves`, given those of the outputs of `run(case, tensors)`."""
    if not leaves:
        return {}
    inputs = {key: x.detach().requires_grad_(key in leaves) for key, x in t.items()}
    outputs = run(case, inputs)
    pairs = [(x, grads[key].to(x.dtype)) for key, x in outputs.items() if x.requires_grad]
    found = torch.autograd.grad([x for x, _ in pairs], [inputs[leaf] for leaf in leaves], [g for _, g in pairs])
    return dict(zip(leaves, found, strict=True))


def _permuted(t: Tensors, order: Tensor, names: Sequence[str]) -> Tensors:
    return {name: x[..., order] if name in names else x for name, x in t.items()}


def _mirrored(t: Tensors, grads: Tensors | None, evaluate: Callable[..., Tensors], case: Case) -> list[Tensors]:
    """What the mirrored maps give, mirrored back: the same sums in other orders. A square may be turned as well."""
    turns = (False, True) if case.grid[0] == case.grid[1] else (False,)
    runs = []
    for turned, axes in itertools.product(turns, ((), (-1,), (-2,), (-2, -1))):

        def there(x: Tensor, turned: bool = turned, axes: tuple[int, ...] = axes) -> Tensor:
            image = x.unflatten(-1, case.grid).flip(axes)
            return (image.mT if turned else image).flatten(-2)

        def back(x: Tensor, turned: bool = turned, axes: tuple[int, ...] = axes) -> Tensor:
            image = x.unflatten(-1, case.grid)
            return (image.mT if turned else image).flip(axes).flatten(-2)

        def moved(tensors: Tensors, how: Callable[[Tensor], Tensor]) -> Tensors:
            return {key: how(x) if key in ("maps", "smoothed") else x for key, x in tensors.items()}

        runs.append(moved(evaluate(moved(t, there), grads and moved(grads, there)), back))
    return runs


def _plain_runs(
    name: str, case: Case, t: Tensors, grads: Tensors | None, evaluate: Callable[..., Tensors]
) -> list[Tensors]:
    """Plain PyTorch's results with the head width in several orders, and but for the first in two halves: in half
    precision, a single row's sums are the same in any order."""
    if name in MAPS:
        return _mirrored(t, grads, evaluate, case)
    runs = []
    for parts, order in zip((1, 2, 2, 2, 2, 2, 2, 2), orders(t["q"].shape[-1]), strict=True):
        if name == "merge_targets":
            summed = ("rest_out", "v", "out")
            found = evaluate(_permuted(t, order, summed), grads and _permuted(grads, order, summed))
            runs.append(_permuted(found, order.argsort(), summed))
        elif name == "gaussian_bias":
            return [evaluate(t, grads)]
        else:
            wide = ("v", "out", "rest_out")
            moved = _permuted(t, order, ("q", "k", "v"))
            found = evaluate(moved, grads and _permuted(grads, order, wide), parts)
            runs.append(_permuted(found, order.argsort(), ("q", "k", "v") if grads else wide))
    return runs


def _by_lse(case: Case) -> bool:
    """Whether the kernels make maps from a logsumexp, not from the sums of the kernel that makes the output."""
    from attnctl_fast.kernels._launch import config

    sizes = {"d": case.d, "n": case.n, "m": case.m, "itemsize": case.dtype.itemsize}
    return case.dtype == torch.float32 or case.n > config("attention_maps_fwd", DEVICE, **sizes)["ON_CHIP_N"]


def _carried(name: str, case: Case, t: Tensors, grads: Tensors | None) -> Tensors:
    """What a logsumexp held in float32 adds to the error of the outputs or, given theirs, of the gradients."""
    found = _carried_to_heads(name, case, wide(spread(t)), grads)
    if grads is None or case.keys is None:
        return found
    # Heads that share keys and values have their gradients added.
    return {
        key: x.unflatten(1, (case.keys, -1)).sum(2) if key in ("k", "v") and isinstance(x, Tensor) else x
        for key, x in found.items()
    }


def _carried_to_heads(name: str, case: Case, t: Tensors, grads: Tensors | None) -> Tensors:
    if name == "merge_targets":
        real = [[token >= 0 for token in row] for row in case.rows(case.ids)]
        bias = t["bias"].masked_fill(~torch.tensor(real, device=DEVICE)[:, None, :, None], 0.0)
        joint = torch.cat([t["logits"] + bias, t["rest_lse"].unsqueeze(2)], 2)
        lse = joint.logsumexp(2)
        if grads is None:
            return {"out": carried_by_lse(lse, t["v"]).nan_to_num(posinf=0.0)}
        off = torch.finfo(torch.float32).eps * (lse.abs() * (t["rest_lse"] - lse).exp()).nan_to_num()
        return {"rest_out": off * grads["out"].double().abs().amax(-1)}
    if name == "attention_with_maps":
        inputs, rows = (t["q"], t["k"]), case.rows(case.ids)
        if grads is None:
            given = (rows, "mean", case.scale, t.get("key_bias"))
            return {"maps": carried_to_maps(*inputs, *given)} if _by_lse(case) else {}
        given = (grads["out"], grads["maps"], rows, case.scale, t.get("key_bias"))
        return carried_through_maps(*inputs, t["v"], *given)
    if name not in ATTENTION or name == "maps_from_lse" or grads is None:
        return {}
    grad_out = grads.get("out", grads.get("rest_out"))
    inputs = (t["q"], t["k"], t["v"], grad_out, case.scale)
    if name in ("attention", "target_statistics", "grouped_attention"):
        masked = _of_groups(t) if name == "grouped_attention" else t.get("key_bias")
        return carried_to_gradients(*inputs, key_bias=masked)
    bias = t["bias"] if name == "biased_attention" else ops.gaussian_bias(t["theta"], **case.basis, impl="reference")
    columns = torch.zeros(case.batch, bias.shape[2], case.n, dtype=torch.float64, device=DEVICE)
    for i, row in enumerate(case.rows(case.ids)):
        for slot, token in enumerate(row):
            if token >= 0:
                columns[i, slot, token] = 1
            else:
                bias[i, :, slot] = 0
    carried = carried_to_gradients(*inputs, bias.mT @ columns[:, None], t.get("key_bias"))
    off = (carried.pop("logits") @ columns.mT[:, None]).mT  # [B,H,T,M]
    if name == "biased_attention":
        return {**carried, "bias": off.amax(-1)}
    theta = t["theta"].nan_to_num().requires_grad_()
    span = ops.gaussian_bias(theta, **case.basis, impl="reference")
    (by_centre,) = torch.autograd.grad(span, theta, off)
    return {**carried, "theta": by_centre.flatten(-2).amax(-1)}


def assert_near(ours: Tensor, truth: Tensor, what: str) -> None:
    """The losses' rule (MATH.md, Chaos): within 1e-5 of the largest element."""
    off = (ours.double() - truth).abs().amax()
    assert off <= 1e-5 * truth.abs().amax() + 1e-9, f"{what} is off by {off} of {truth.abs().amax()}"


def assert_all_right(name: str, case: Case, ours: Tensors, tensors: Tensors, grads: Tensors | None = None) -> None:
    """`ours`, the outputs or, given theirs, the gradients, by the rule for errors in numerics.py."""

    def evaluate(t: Tensors, grads: Tensors | None, parts: int = 1) -> Tensors:
        if grads is None:
            return plain(name, case, t, parts)
        return gradients(case, t, grads, list(ours), lambda c, inputs: plain(name, c, inputs, parts))

    truth = evaluate(wide(tensors), grads)
    runs = [] if name in LOSSES else _plain_runs(name, case, tensors, grads, evaluate)
    carried, drawn = _carried(name, case, tensors, grads), Shared(lambda: evaluate(tensors, grads))
    for key, actual in ours.items():
        what = f"{name}: {'gradient of ' if grads else ''}{key}, {case}"
        infinite = truth[key].isneginf()
        assert torch.equal(actual.isneginf(), infinite), what
        if key == "rest_square":  # where every column is a target it is zero, whatever the rest is
            infinite = tensors["rest_lse"].isneginf()
        kept, expected = (x.masked_fill(infinite, 0.0) for x in (actual, truth[key]))
        if name in LOSSES:
            assert not kept.isnan().any(), what
            assert_near(kept, expected, what)
            continue

        def rows(x: Tensor, infinite: Tensor = infinite, key: str = key) -> Tensor:
            x = x.masked_fill(infinite, 0.0)
            return x.flatten(-2) if key == "theta" else x  # a row is one target's centres

        rounded = ("out", "rest_out", "q", "k", "v", *(["maps"] if grads else []))
        judged = case.dtype if key in rounded else torch.float32
        plains = Plain(truth[key], [run[key] for run in runs], drawn.of(key)).each(rows)
        assert_rows_close(rows(actual), plains, judged, what, carried.get(key, 0.0))


def run_triton(name: str, case: Case, tensors: Tensors | None = None, impl: str = IMPL) -> Tensors:
    """The kernels' outputs."""
    return OPERATIONS[name].run(case, impl, case.tensors() if tensors is None else tensors)


def triton_gradients(
    name: str, case: Case, tensors: Tensors, grads: Tensors, leaves: Sequence[str] | None = None, impl: str = IMPL
) -> Tensors:
    leaves = [x for x in OPERATIONS[name].leaves if x in tensors] if leaves is None else list(leaves)
    return gradients(case, tensors, grads, leaves, lambda c, t: OPERATIONS[name].run(c, impl, t))


def check(name: str, case: Case, backward: bool = True, impl: str = IMPL) -> None:
    """Outputs and all gradients of one operation by the rule."""
    tensors = case.tensors()
    with torch.no_grad():
        outputs = run_triton(name, case, tensors, impl)
    assert_all_right(name, case, outputs, tensors)
    if backward:
        grads = {key: fenced(x) for key, x in upstream(outputs).items()}
        found = triton_gradients(name, case, tensors, grads, impl=impl)
        assert_all_right(name, case, found, tensors, grads)
