"""Registration: opcheck, gradcheck, torch.compile(fullgraph=True), fake tensors, inference mode."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck

from attnctl_fast import ops
from attnctl_fast.ops.attention_with_maps import slot_table
from attnctl_fast.ops.gaussian_bias import kernel_axes
from tests.support.marks import full
from tests.support.numerics import DEVICE, FAST, TRITON, attention_inputs, rand, randn, widest

GRID = (4, 6)


def inputs(dtype=torch.float32, grad=False, strided=True):
    q, k, v = attention_inputs(2, 2, 24, 9, 8, dtype, strided=strided)
    bias = randn(2, 2, 2, 24, dtype=dtype, seed=5)
    theta = randn(2, 2, 2, 2, dtype=dtype, seed=6).reshape(2, 2, 2, 1, 2)
    return [x.requires_grad_(grad) for x in (q, k, v, bias, theta)]


ids = torch.tensor([[3, 5], [4, -1]], device=DEVICE)
real_ids = torch.tensor([[3, 5], [4, 1]], device=DEVICE)
pins = torch.tensor([0, 8], device=DEVICE)
none = torch.empty(0, dtype=torch.int64, device=DEVICE)

LOSS = ("official", 0.9, 0.9, None, 80.0, 0.09)
# The similarities of maps [2,4,24]: grid, taps; and with the variant and weight of their loss.
SMOOTH = (list(GRID), [0.2, 0.6, 0.2])
SIMILAR = (*SMOOTH, "cosine", 0.2)
SOLVER = (list(GRID), [1.0, 1.0], "official", 1.0, 0.25, 0.9, 3, 100.0, "sample")


def map_inputs(bias):
    """Maps [2,4,24], what they are compared with, and their tokens' numbers."""
    maps = bias.detach().flatten(1, 2)
    return maps, maps[..., :4].abs().expand(2, 4, 4), torch.tensor([4, 3], device=DEVICE)


def regions(q, k):
    """Two regions, whose rows and columns differ from sample to sample."""
    return [1 + (x.detach()[:, 0, :, 0] > 0).int() for x in (q, k)]


def key_bias(dtype=torch.float32):
    """Of the context's 9 tokens: two masked in one sample, targets among the others."""
    bias = randn(1, 1, 2, 9, dtype=dtype, seed=8)[0, 0]
    bias[0, 6:8] = -torch.inf
    return bias


def registered(grad: bool, strided: bool = True):
    """(operation, arguments) for everything in torch.ops.attnctl_fast."""
    q, k, v, bias, theta = inputs(grad=grad, strided=strided)
    with torch.no_grad():
        stats = ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=True, impl="eager")
        after = ops.attention(q, k, v, return_lse=True, impl="eager")
    rest_out, rest_lse, logits, square, pinned = (x.requires_grad_(grad) for x in stats)
    given = [x.detach() for x in (q, k, v)]
    kept = (given[0] @ given[1].mT).softmax(-1)
    merge = (rest_out, rest_lse, logits, pinned, v, bias, ids, pins)
    basis = (list(GRID), [2.0], [2.0, 4.0], [1.0, 1.0])
    ones = torch.ones(2, 2, 24, device=DEVICE)
    paper = ("paper", *LOSS[1:])
    solver = (logits.detach(), rest_lse.detach())
    maps, text, lengths = map_inputs(bias)
    region = (q, k, v, *regions(q, k), bias[:, 0, 0], 0.3)
    keyed = key_bias()
    return {
        "attention": [
            (*given, *columns, x, 0.3)
            for columns in ((None, None), (None, ids), (bias.detach(), ids), (bias.detach(), pins))
            for x in (None, keyed)
        ],
        "attention_reference": [(q, k, v, ids, 0.3, None), (q, k, v, ids, 0.3, keyed)],
        "attention_backward": [
            (torch.ones_like(q), g, *given, x, ids, y, 0.3, *after, needed)
            for g, x, y, needed in (
                (None, None, None, [True, True, True, False]),
                (ones, None, keyed, [True, False, True, False]),
                (ones, bias.detach(), keyed, [True, True, True, True]),
                (None, bias.detach(), None, [False, False, False, True]),
            )
        ],
        "attention_with_context_gradient": [
            (*(x.detach() for x in (q, k, v)), weight, x, 0.3) for weight, x in ((None, None), (rand(2, 24), keyed))
        ],
        "attention_with_context_gradient_reference": [
            (q, k, v, None, 0.3, None),
            (q, k, v, rand(2, 24), 0.3, keyed),
        ],
        "attention_with_maps": [
            (*given, tokens, x, per_head, 0.3, keep)
            for tokens, x, per_head, keep in (
                (ids, None, False, True),
                (pins, keyed, True, False),
                (None, keyed, False, False),
            )
        ],
        "attention_with_maps_backward": [
            (torch.ones_like(q), None, *given, None, keyed, False, 0.3, q.new_empty(0), [True, True, True]),
            (None, ones, *given, ids, None, False, 0.3, kept, [True, False, False]),
        ],
        "attention_with_maps_reference": [
            (q, k, v, tokens, per_head, 0.3, x) for tokens, per_head, x in ((ids, False, None), (None, True, keyed))
        ],
        "target_logits": [(q, k, ids, 0.3, None), (q, k, pins, 0.3, keyed)],
        "target_logits_reference": [(q, k, ids, 0.3, keyed)],
        "rest_square_reference": [(q, k, ids, 0.3, keyed)],
        "merge_targets": [merge],
        "merge_targets_reference": [merge],
        "biased_attention": [(q, k, v, bias, ids, pins, 0.3, x) for x in (None, keyed)],
        "biased_attention_reference": [(q, k, v, bias, ids, pins, 0.3, x) for x in (None, keyed)],
        "gaussian_bias": [(theta.detach(), *basis)],
        "gaussian_bias_backward": [(bias.detach(), theta.detach(), *basis, [True])],
        "gaussian_bias_reference": [(theta, rand(1, 2, 4, 6))],
        "region_attention": [(*region, x) for x in (None, keyed)],
        "region_attention_reference": [(*region, x) for x in (None, keyed)],
        "regulation_loss": [
            (*(t if t is None else t.detach() for t in arguments), *terms)
            for arguments, terms in (
                ((logits, rest_lse, None, bias, theta), LOSS),
                ((logits, rest_lse, square, bias, None), paper),
            )
        ],
        "regulation_loss_reference": [(logits, rest_lse, square, bias, theta, *paper)],
        "regulation_loss_backward": [
            (ones[..., 0], *(t if t is None else t.detach() for t in arguments), *terms, needed)
            for arguments, terms, needed in (
                ((logits, rest_lse, None, bias, theta), LOSS, [False, False, False, True, True]),
                ((logits, rest_lse, square, bias, None), paper, [False, False, False, True, False]),
                ((logits, rest_lse, square, bias, None), paper, [True, True, True, True, False]),
            )
        ],
        "regulate": [
            (*solver, None, theta.detach(), None, None, *SOLVER, *LOSS),
            (*solver, square.detach(), theta.detach(), theta.detach(), ones[0, 0, 0], *SOLVER, *paper),
            (*solver, None, theta.detach(), None, 0 * ones[0, 0, 0], *SOLVER, *LOSS),
        ],
        "regulate_reference": [(*solver, None, theta.detach(), None, None, *SOLVER, *LOSS)],
        "smooth_maps": [(maps, *SMOOTH), (maps, list(GRID), [1.0])],
        "smooth_maps_backward": [(maps, maps, *SMOOTH, [True])],
        "smooth_maps_reference": [(bias.flatten(1, 2), *SMOOTH)],
        "map_similarity": [(maps,)],
        "map_similarity_backward": [(text, maps, text, maps[..., 0], [True])],
        "map_similarity_reference": [(bias.flatten(1, 2),)],
        "similarity_loss": [
            (maps, text, None, *SIMILAR, False),
            (maps, text, lengths, *SIMILAR, True),
            (maps.mT.contiguous().mT, text, None, list(GRID), [1.0], "cosine", 0.2, True),
        ],
        "similarity_loss_backward": [(maps[:, 0, 0], maps, text, None, *SIMILAR, maps, text, [True])],
        "similarity_loss_reference": [(bias.flatten(1, 2), text, lengths, *SIMILAR)],
    }


def kernels(strided: bool = True):
    """(operation, arguments) for the kernels' operations, which have no derivative of their own."""
    q, k, v, bias, theta = inputs(strided=strided)
    halves = [x.half() for x in (q, k, v)]
    stats = ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=True, impl="eager")
    rest_out, rest_lse, logits, square, pinned = (x.contiguous() for x in stats)
    merge = (rest_out, rest_lse, logits, pinned, v.half(), bias, ids, pins)
    axes = kernel_axes(GRID, 1.0, "official")
    keyed = key_bias()
    out, empty = halves[0].contiguous(), bias.new_empty(0)
    spanned, given = (bias, ids, pins, None), (0.3, 1.0, 0, [])
    by_theta, gaussians = (theta, ids, pins, keyed), (0.3, 0.5, GRID[1], axes)
    paper, official = (logits, rest_lse, square, bias, None), (logits, rest_lse, None, bias, theta)
    terms, paper_terms = LOSS, ("paper", *LOSS[1:])
    solver = (list(GRID), axes, *SOLVER[3:])
    upstream = (rest_out, rest_lse, logits.nan_to_num(neginf=0.0), square, pinned)
    maps, similar, lengths = map_inputs(bias)
    ones, ones_of_maps = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2, 24, device=DEVICE)
    return {
        "attention_triton": [(q, k, v, None, 0.3), (*halves, keyed, 0.3)],
        "attention_triton_backward": [
            (out, None, *halves, None, 0.3, rest_lse, [True, True, True]),
            (None, rest_lse, *halves, keyed, 0.3, rest_lse, [False, True, False]),
        ],
        "attention_with_context_gradient_triton": [
            (*halves, None, None, 0.3),
            (q, k, v, rand(2, 24), keyed, 0.3),
        ],
        "attention_with_maps_triton": [
            (*halves, ids, slot_table(ids, 9), None, False, 0.3),
            (q, k, v, pins, slot_table(pins, 9), keyed, True, 0.3),
            (*halves, None, None, keyed, False, 0.3),
        ],
        "attention_with_context_gradient_triton_backward": [
            (q, k, q, k, v, rand(2, 24), keyed, 0.3, rest_lse, k[..., 0].contiguous(), [True] * 4),
            (None, k, *halves, None, None, 0.3, rest_lse, k[..., 0].contiguous(), [True, False, True, False]),
        ],
        "attention_with_maps_triton_backward": [
            (out, None, *halves, None, None, None, False, 0.3, rest_lse, [True, True, True]),
            (None, ones_of_maps, *halves, ids, slot_table(ids, 9), keyed, False, 0.3, rest_lse, [True, True, False]),
        ],
        "context_pull_triton": [
            (k.float(), k, ones[0, 0], ones[0], rand(2, k.shape[2]), 0.1, True),
            (k.float(), k, ones[0, 0], ones[0, 1], None, 0.0, False),
        ],
        "composed_attention_triton": [
            (*halves[:1], halves[1:2] * 2, halves[2:] * 2, x, [0.7, 0.3], 0.3) for x in ([], [keyed] * 2)
        ],
        "region_attention_triton": [
            (*x, *regions(*x[:2]), bias[:, 0, 0], y, 0.3) for x, y in ((halves, None), ((q, k, v), keyed))
        ],
        "target_statistics_triton": [
            (*halves, ids, pins, None, 0.3, True),
            (q, k, v, ids, none, keyed, 0.3, False),
        ],
        "target_statistics_triton_backward": [
            (*upstream, *halves, ids, pins, keyed, 0.3, True, rest_lse, logits, square, [True, True, True]),
            (
                None,
                rest_lse,
                *[None] * 3,
                *halves,
                ids,
                none,
                None,
                0.3,
                False,
                rest_lse,
                logits,
                empty,
                [True, False, False],
            ),
        ],
        "biased_attention_triton": [
            (*halves, *spanned, *given, True),
            (*halves, *by_theta, *gaussians, False),
            (q, k, v, theta, ids, none, None, *gaussians, True),
        ],
        "biased_attention_triton_backward": [
            (out, *halves, *spanned, *given, rest_lse, rest_lse, [True, False, False, True]),
            (out, *halves, bias, ids, none, keyed, *given, rest_lse, empty, [False, False, False, True]),
            (out, *halves, *by_theta, *gaussians, rest_lse, rest_lse, [True] * 4),
        ],
        "gaussian_bias_triton": [(theta, list(GRID), axes), (theta.half(), list(GRID), axes)],
        "gaussian_bias_triton_backward": [(bias, theta, list(GRID), axes, [True])],
        "merge_targets_triton": [merge, (*merge[:3], logits[:, :, :0], v, None, ids, none)],
        "merge_targets_triton_backward": [
            (out, *merge, [True] * 6),
            (out, *merge, [False, True, False, False, True, False]),
        ],
        "regulation_loss_triton": [(*official, *terms), (*paper, *paper_terms)],
        "regulation_loss_triton_backward": [
            (ones, *official, *terms, [False, False, False, True, True]),
            (ones, *paper, *paper_terms, [True, True, True, True, False]),
        ],
        "regulate_triton": [
            (logits, rest_lse, None, theta, None, None, *solver, *terms),
            (logits, rest_lse, square, theta, theta, ones[0, 0], *solver, *paper_terms),
        ],
        "smooth_maps_triton": [(maps, *SMOOTH), (maps.half(), *SMOOTH)],
        "smooth_maps_triton_backward": [(maps, maps.half(), *SMOOTH, [True])],
        "map_similarity_triton": [(maps,), (maps.half(),)],
        "map_similarity_triton_backward": [
            (similar, maps.half(), similar.contiguous(), maps[..., 0].contiguous(), [True])
        ],
        "similarity_loss_triton": [
            (maps, similar, None, *SIMILAR, False),
            (maps.half(), similar, lengths, *SMOOTH, "absolute", 1.0, True),
        ],
        "similarity_loss_triton_backward": [
            (maps[:, 0, 0], maps.half(), similar, None, *SIMILAR, maps, similar.contiguous(), [True]),
        ],
    }


KERNELS = sorted(kernels()) if TRITON else []
NAMES = sorted(registered(False))


def test_every_registered_operation_is_checked():
    names = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("attnctl_fast::")
    }
    assert names - set(KERNELS) == set(NAMES)
    assert not TRITON or set(KERNELS) <= names


def is_composite(name):
    """PyTorch itself makes the fake and the derivative of such a one."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"attnctl_fast::{name}", "CompositeImplicitAutograd")


# What a composite can be wrong in by itself, and a kernel's operation for tensors that lie otherwise.
DECLARED = ("test_schema", "test_faketensor")
COMPOSITE = [name for name in NAMES if is_composite(name)]
OWN = [name for name in NAMES if not is_composite(name)]


@pytest.mark.parametrize(("grad", "strided"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", OWN)
def test_opcheck(name, grad, strided):
    for arguments in registered(grad, strided)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), arguments)


@pytest.mark.parametrize("name", COMPOSITE)
def test_opcheck_of_composites(name):
    opcheck(getattr(torch.ops.attnctl_fast, name), registered(True)[name][-1], test_utils=DECLARED)


@pytest.mark.full
@pytest.mark.parametrize(("grad", "strided"), [(False, False), (True, True)])
@pytest.mark.parametrize("name", COMPOSITE)
def test_everything_that_opcheck_knows_of_composites(name, grad, strided):
    for arguments in registered(grad, strided)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), arguments)


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck_of_kernels(name):
    for arguments in kernels(False)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), arguments)
    for arguments in kernels(True)[name]:
        opcheck(getattr(torch.ops.attnctl_fast, name), arguments, test_utils=DECLARED)


KEYED = key_bias(torch.float64)


def public(impl, ids=ids, pins=pins, key_bias=KEYED):
    """name -> function of (q, k, v, bias, theta), all differentiable but regulate."""

    def statistics(q, k, v, square=False):
        return ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=square, impl=impl)

    def merged(q, k, v, bias, theta):
        return ops.merge_targets(statistics(q, k, v), v, ids, bias, pinned_ids=pins, impl=impl)

    def context(q, k, v, bias, theta):
        out, update = ops.attention_with_context_gradient(q, k, v, impl=impl)
        gammas = {"gamma_attn": 0.3, "gamma_norm": 0.7}
        return out, ops.context_update(update, k, bias[0, 0, :, :16].mT, convention="paper", **gammas)

    def rest_square(q, k, v, bias, theta):
        return statistics(q, k, v, True).rest_square

    def keyed(function, *others, **how):
        """`function` of q, k and v with a key_bias; `others` choose its further arguments from bias and theta."""

        def run(q, k, v, bias, theta):
            chosen = (choose(bias, theta) for choose in others)
            return function(q, k, v, *chosen, key_bias=key_bias, impl=impl, **how)

        return run

    def keyed_statistics(q, k, v, ids, **how):
        return tuple(ops.target_statistics(q, k, v, ids, pinned_ids=pins, with_square=True, **how))

    def keyed_composition(q, k, v, key_bias, **how):
        return ops.composed_attention(q, [k, k], [v, v], [1.0, -0.4], key_bias=[key_bias, None], **how)

    def keyed_region(q, k, v, bias, **how):
        return ops.region_attention(q, k, v, *regions(q, k), bias[:, 0, 0], **how)

    def loss(objective):
        def run(q, k, v, bias, theta):
            stats = statistics(q, k, v, True)
            return ops.regulation_loss(stats, bias, objective=objective, theta=theta, impl=impl)

        return run

    def regulated(q, k, v, bias, theta):
        return ops.regulated_attention(q, k, v, theta, ids, GRID, pinned_ids=pins, bias_inside_scale=True, impl=impl)

    def solve(q, k, v, bias, theta):
        return ops.regulate(statistics(q, k, v, True), GRID, theta=theta, objective="paper", steps=3, impl=impl)

    def compared(q, k, v, bias, theta):
        text = torch.arange(16.0, dtype=bias.dtype, device=bias.device).view(4, 4)
        return ops.similarity_loss(bias.flatten(1, 2), text, GRID, impl=impl)

    def region(q, k, v, bias, theta):
        return ops.region_attention(q, k, v, *regions(q, k), bias[:, 0, 0], impl=impl)

    return {
        "attention": lambda q, k, v, bias, theta: ops.attention(q, k, v, return_lse=True, impl=impl),
        "attention, keyed": keyed(ops.attention, return_lse=True),
        "attention_with_maps, keyed": keyed(ops.attention_with_maps, lambda *_: ids),
        "attention_with_context_gradient, keyed": keyed(ops.attention_with_context_gradient),
        "biased_attention, keyed": keyed(ops.biased_attention, lambda bias, _: bias, lambda *_: ids, pinned_ids=pins),
        "composed_attention, keyed": keyed(keyed_composition),
        "context_energy, keyed": keyed(lambda q, k, v, **how: tuple(ops.context_energy(q, k, **how))),
        "region_attention, keyed": keyed(keyed_region, lambda bias, _: bias),
        "regulated_attention, keyed": keyed(
            ops.regulated_attention, lambda _, theta: theta, lambda *_: ids, grid=GRID, pinned_ids=pins
        ),
        "target_statistics, keyed": keyed(keyed_statistics, lambda *_: ids),
        "attention_with_context_gradient": lambda q, k, v, bias, theta: ops.attention_with_context_gradient(
            q, k, v, query_weight=bias[:, 0, 0], impl=impl
        ),
        "attention_with_maps": lambda q, k, v, bias, theta: ops.attention_with_maps(q, k, v, ids, impl=impl),
        "attention_with_all_maps": lambda q, k, v, bias, theta: ops.attention_with_maps(
            q, k, v, reduce="none", impl=impl
        ),
        "composed_attention": lambda q, k, v, bias, theta: ops.composed_attention(
            q, [k, k[:, :, :5], k], [v, v[:, :, :5], v], [1.0, -0.4, 0.3], impl=impl
        ),
        "context_energy": lambda q, k, v, bias, theta: tuple(ops.context_energy(q, k, alpha=0.1, impl=impl)),
        "context_update": context,
        "biased_attention": lambda q, k, v, bias, theta: ops.biased_attention(
            q, k, v, bias, ids, pinned_ids=pins, impl=impl
        ),
        "gaussian_bias": lambda q, k, v, bias, theta: ops.gaussian_bias(theta, GRID, impl=impl),
        "map_similarity": lambda q, k, v, bias, theta: ops.map_similarity(bias.flatten(1, 2), impl=impl),
        "merge_targets": merged,
        "region_attention": region,
        "regulate": solve,
        "regulated_attention": regulated,
        "regulation_loss": loss("official"),
        "regulation_loss_paper": loss("paper"),
        "rest_square": rest_square,
        "similarity_loss": compared,
        "smooth_maps": lambda q, k, v, bias, theta: ops.smooth_maps(bias.flatten(1, 2), GRID, impl=impl),
        "target_statistics": lambda q, k, v, bias, theta: tuple(x for x in statistics(q, k, v) if x is not None),
    }


PUBLIC = sorted(public("eager"))
FORWARD_ONLY = [
    ("reference", "regulate"),
    ("eager", "regulate"),
    ("triton", "regulate"),
    ("triton", "region_attention"),
    ("triton", "region_attention, keyed"),
]


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "regulate"])
def test_gradcheck(name, impl):
    # No sample has padding here: -inf logits have no finite differences.
    function = public(impl, real_ids)[name]
    arguments = [x.detach().contiguous().requires_grad_() for x in inputs(torch.float64)]
    assert gradcheck(function, arguments, fast_mode=True)


def _grads(function, arguments):
    out = function(*arguments)
    total = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad)
    return out, torch.autograd.grad(total, arguments, allow_unused=True) if torch.is_tensor(total) else ()


@pytest.mark.parametrize("impl", [full("reference"), *FAST])
@pytest.mark.parametrize("name", PUBLIC)
def test_one_graph_under_compile(name, impl):
    function = public(impl, real_ids)[name]
    arguments = inputs(widest(impl), grad=(impl, name) not in FORWARD_ONLY)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(_grads(compiled, arguments), _grads(function, arguments), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "regulate"])
def test_second_derivatives_are_right_or_an_error(name, impl):
    """Never those of a gradient that is taken for a constant."""
    function = public(impl, real_ids)[name]

    def second(function, arguments):
        found = function(*arguments)
        total = sum(x.square().sum() for x in (found if isinstance(found, tuple) else (found,)))
        first = torch.autograd.grad(total, arguments, create_graph=True, allow_unused=True)
        first = [x for x in first if x is not None]
        total = total + sum(x.square().sum() for x in first)
        return torch.autograd.grad(total, arguments, allow_unused=True)

    if (impl, name) in FORWARD_ONLY:
        pytest.skip("has no gradient")
    arguments = inputs(widest(impl), grad=True)
    expected = second(public("reference", real_ids)[name], inputs(widest(impl), grad=True))
    try:
        ours = second(function, arguments)
    except RuntimeError as error:
        assert "derivative of their own" in str(error) or "no autograd formula" in str(error), error
    else:
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("strided", [False, True])
def test_compiled_with_inductor(impl, strided):
    q, k, v, bias, _ = inputs(strided=strided)

    def function(q, k, v, bias):
        edited = ops.biased_attention(q, k, v, bias, ids, pinned_ids=pins, impl=impl)
        return edited + 2 * ops.attention(q, k, v, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, bias), function(q, k, v, bias))


@pytest.mark.parametrize("impl", FAST)
def test_compile_takes_ids_as_a_sequence(impl):
    def function(*x):
        return ops.biased_attention(*x, [3, 5], pinned_ids=[0], impl=impl)

    arguments = inputs()[:4]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.parametrize(("impl", "strided"), [full("reference", True), *itertools.product(FAST, [False, True])])
@pytest.mark.parametrize("name", PUBLIC)
def test_fake_tensors_have_the_real_shapes(name, impl, strided):
    arguments = inputs(strided=strided)
    real = public(impl)[name](*arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in arguments]
        function = public(impl, *map(mode.from_tensor, (ids, pins, KEYED)))[name]
        fake = function(*fakes)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (fake, real)), strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
