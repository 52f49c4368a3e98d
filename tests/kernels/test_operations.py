"""Every operation's kernels, forward and backward, over the input families that DESIGN.md names.

Uninitialised memory is NaN here, and every input lies in storage that is NaN around it. Without a GPU this runs in
Triton's interpreter; `-m full` has every size of image, context and head.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl_fast import ops
from bench.ops.base import upstream
from bench.ops.inputs import Case, fenced
from bench.ops.registry import ATTENTION, LOSSES, MAPS
from tests.support.kernel_cases import OPERATIONS, check, gradients, run_triton, triton_gradients
from tests.support.marks import full_pairs, pairs
from tests.support.numerics import DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF, BFLOAT = torch.float16, torch.bfloat16
ALONE = {"ids": ((0,),), "pinned": ((),)}
# Every size that matters at least once, in few programs.
SAMPLE = [
    Case(1, 1, 8, sigma=0.25, **ALONE),
    # Of the targets' logits, plain PyTorch's are lucky in all orders.
    Case(1, 154, 64, dtype=HALF, sigma=0.25),
    Case(63, 77, 40, dtype=HALF, sharp=4.0),
    Case(64, 120, 80, dtype=BFLOAT, strided=True),
    Case(63, 154, 64, dtype=HALF, strided=True, heads=1),
    Case(64, 333, 128, dtype=BFLOAT, heads=1),
    Case(64, 77, 160, heads=1),
    Case(16, 512, 250, heads=1),
    Case(256, 77, 40, dtype=HALF, heads=1, strided=True),
]
# What is about numbers has one head.
FAMILIES = {
    "sharp": Case(63, 77, 40, sharp=7.0, heads=1),
    "sharp in half": Case(63, 77, 40, dtype=HALF, sharp=7.0, heads=1),
    "large biases": Case(sharp=3.0, raised=1e3, heads=1),
    "targets hold the row": Case(n=9, ids=((3, 5, 7),), pinned=((0,),), raised=0.0, sharp=3.0, heads=1),
    "every column is a target": Case(n=3, ids=((2, 0, 1),), pinned=((),), heads=1),
    "every column is a target or pinned": Case(n=4, ids=((2, 1),), pinned=((0, 3),), heads=1),
    "one target": Case(ids=((19,),), pinned=((),), heads=1),
    "many targets": Case(n=77, ids=(tuple(range(40, 57)),), pinned=((0, 76),), raised=1.0, heads=1),
    "targets of their own": Case(batch=3, ids=((3, 6), (5, -1), (-1, -1)), pinned=((0, 9), (0, -1), (-1, -1))),
    "a target that holds the row": Case(n=20, raised=20.0, sharp=2.0, heads=1),
    "rows and heads of no power of two": Case(240, 21, 24, heads=3, dtype=BFLOAT),
    "grouped heads": Case(16, 20, 24, batch=2, heads=4, keys=2, strided=True),
    "grouped heads in half": Case(16, 77, 40, dtype=HALF, heads=2, keys=1),
    "key bias": Case(16, 20, 24, batch=3, ids=((3, 7), (5, -1), (2, 4)), pinned=((0, 2), (0, -1), (1, 3)), keyed=True),
    "key bias in half": Case(63, 77, 40, dtype=HALF, batch=3, heads=1, strided=True, keyed=True),
    "key bias, two pieces": Case(16, 154, 80, dtype=BFLOAT, batch=2, heads=1, keyed=True),
    "key bias, several tiles": Case(16, 333, 64, dtype=HALF, batch=3, heads=1, keyed=True),
}
# What of a case the inputs of an operation depend on.
EVERYTHING = tuple(field.name for field in dataclasses.fields(Case))
READ = {"maps": ("m", "dtype", "batch", "sharp", "strided"), "gaussian_bias": ("m", "ids", "batch", "heads", "raised")}
SMALL = Case(16, 9, 8, ids=((3, 5),), pinned=((0,),))

IMAGE_TOKENS, TOKENS = (1, 63, 64, 256, 1024, 4096), (1, 77, 120, 154, 333, 512)
WIDTHS, DTYPES = (8, 40, 64, 80, 128, 160, 250), (torch.float32, HALF, BFLOAT)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: f"{c.m}-{c.n}-{c.d}")
def test_shapes(name, case):
    check(name, case)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(("m", "n", "d", "dtype"), full_pairs(IMAGE_TOKENS, TOKENS, WIDTHS, DTYPES))
def test_any_size(name, m, n, d, dtype):
    named = ALONE if n == 1 else {"ids": ((5, 9),), "pinned": ((0, 12),)}
    check(name, Case(m, n, d, dtype=dtype, sigma=0.25 if m == 1 else None, **named))


def families():
    """Every operation with every family, once where it does not read what tells two families apart."""
    seen = set()
    for name, (family, case) in itertools.product(OPERATIONS, FAMILIES.items()):
        # These know no ids, so no padded targets.
        if name == "gaussian_bias" and min(map(min, case.rows(case.ids))) < 0:
            continue
        # And these no keys.
        if case.keys is not None and name not in (*ATTENTION, "merge_targets"):
            continue
        key = (name, *(getattr(case, field) for field in READ.get(name, READ["maps"] if name in MAPS else EVERYTHING)))
        if key not in seen:
            seen.add(key)
            yield pytest.param(name, family, id=f"{family}-{name}")


@pytest.mark.parametrize(("name", "family"), list(families()))
def test_families(name, family):
    check(name, FAMILIES[family])


@pytest.mark.parametrize("name", [*LOSSES, "merge_targets"])
@pytest.mark.parametrize("m", [1, 63, 256, 1024, pytest.param(4096, marks=pytest.mark.full)])
def test_statistics_of_any_size(name, m):
    check(name, Case(m, sharp=3.0, sigma=0.25 if m == 1 else None))


@pytest.mark.parametrize("objective", ["official", "paper"])
def test_rank_ties(objective):
    """The gradient of the quantile goes to two of the tied elements: which ones is open, their sum is not."""
    case = Case(64)
    tied = {key: fenced(x.round() if x.is_floating_point() else x) for key, x in case.tensors().items()}

    def gradient(impl, tensors):
        run = OPERATIONS[f"regulation_loss_{objective}"].run
        one = {"loss": torch.ones(1, 2, device=DEVICE)}
        return gradients(case, tensors, one, ["bias"], lambda c, t: run(c, impl, t))["bias"].double().sum(-1)

    truth = gradient("reference", {key: x.double() for key, x in tied.items()})
    torch.testing.assert_close(gradient("triton", tied), truth, atol=1e-6, rtol=1e-5)


class _Backward(TorchDispatchMode):
    """Collects the shapes of what backward operations make."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "attnctl_fast" and "backward" in function.name():
            made = out if isinstance(out, (tuple, list)) else (out,)
            self.shapes += [tuple(x.shape) for x in made if x is not None and x.numel()]
        return out


def _named(x):
    return x if isinstance(x, str) else "-".join(x)


def subsets(name):
    """All of them where one kernel makes several gradients, one at a time elsewhere."""
    leaves = OPERATIONS[name].leaves
    sizes = range(1, len(leaves) + 1) if name in ("attention", "biased_attention") else (1,)
    return itertools.chain.from_iterable(itertools.combinations(leaves, size) for size in sizes)


@functools.cache
def everything(name):
    """The inputs of an operation, gradients of its outputs, and all gradients of its inputs."""
    t = SMALL.tensors()
    with torch.no_grad():
        grads = upstream(run_triton(name, SMALL, t))
    return t, grads, triton_gradients(name, SMALL, t, grads)


@pytest.mark.parametrize(
    ("name", "leaves"),
    [(n, s) for n in OPERATIONS for s in subsets(n)],
    ids=_named,
)
def test_only_the_gradients_asked_for_are_made(name, leaves):
    t, grads, every = everything(name)
    with _Backward() as backward:
        some = triton_gradients(name, SMALL, t, grads, leaves)
    for leaf in leaves:
        torch.testing.assert_close(some[leaf], every[leaf])
    wanted = [tuple(t[leaf].shape) for leaf in leaves]
    unwanted = [tuple(t[leaf].shape) for leaf in OPERATIONS[name].leaves if leaf not in leaves]
    assert backward.shapes, "no backward operation ran"
    for shape in unwanted:
        assert backward.shapes.count(shape) <= wanted.count(shape), f"{shape} was made and not asked for"


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_runs_are_bit_equal(name):
    case = Case(64, 20, 24, batch=2, dtype=HALF)
    t = case.tensors()
    with torch.no_grad():
        first, second = run_triton(name, case, t), run_triton(name, case, t)
    grads = upstream(first)
    runs = [{**o, **triton_gradients(name, case, t, grads)} for o in (first, second)]
    for key in runs[0]:
        assert torch.equal(*(r[key].nan_to_num(1.5) for r in runs)), key


@pytest.mark.parametrize(("m", "targets", "objective"), pairs([1, 63, 256], [1, 2, 5, 8], ["official", "paper"]))
def test_regulate(objective, m, targets):
    """Losses and bias of the first steps against the textbook in float64, from the same statistics."""
    case = Case(m, sharp=2.0, ids=(tuple(range(3, 3 + targets)),), sigma=0.25 if m == 1 else None)
    t = case.tensors()
    stats = ops.TargetStatistics(*(t.get(name) for name in ops.TargetStatistics._fields))
    wide = ops.TargetStatistics(*(x if x is None else x.double() for x in stats))
    # With a small step, ranks hardly swap: three of them stay where the textbook's do.
    how = {**case.basis, "objective": objective, "steps": 3, "step_size": 0.1, "ema": 0.25, "strength": 0.9}
    previous = torch.rand_like(t["theta"])
    ours = ops.regulate(stats, theta=t["theta"], previous=previous, impl="triton", **how)
    truth = ops.regulate(wide, theta=t["theta"].double(), previous=previous.double(), impl="reference", **how)
    torch.testing.assert_close(ours.losses.double(), truth.losses, atol=1e-6, rtol=2e-5)
    torch.testing.assert_close(ours.theta.double(), truth.theta, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.bias.double(), truth.bias, atol=1e-4, rtol=1e-4)


def test_regulate_with_targets_of_their_own():
    case = FAMILIES["targets of their own"]
    t = case.tensors()
    stats = ops.TargetStatistics(*(t.get(name) for name in ops.TargetStatistics._fields))
    found = ops.regulate(stats, theta=t["theta"], **case.basis, steps=3, impl="triton")
    expected = ops.regulate(stats, theta=t["theta"], **case.basis, steps=3, impl="reference")
    for key in ("losses", "bias", "theta"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key), atol=1e-4, rtol=1e-4)
    assert (found.bias[1, :, 1] == 0).all() and (found.theta[2] == 0).all() and (found.bias[2] == 0).all()
