"""regulation_loss and regulate: against the textbook, the published loop on full logits, and each other's parts."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from attnctl_fast import ops, reference
from attnctl_fast.ops import TargetStatistics
from attnctl_fast.ops._objective import Objective
from attnctl_fast.ops.gaussian_bias import axis_basis, basis_axes, full_basis
from attnctl_fast.ops.regulate import descend
from bench.ops.inputs import SEED, attention_inputs, rand, randn
from tests.support.marks import full, pairs
from tests.support.numerics import DEVICE, FAST, IMPLS, widest

OBJECTIVES = ["official", "paper"]
# In the interpreter one, where the objectives are not what is tested.
EACH = [
    full(impl, objective) if (impl, objective) == ("triton", "official") else (impl, objective)
    for impl, objective in itertools.product(IMPLS, OBJECTIVES)
]
GRIDS = [((16, 16),), ((12, 20),), ((8, 8),)]
# Below these, a float32 loss or gradient is no longer told from rounding (MATH.md, Chaos).
SINGLE = {"atol": 1e-6, "rtol": 1e-5}


def statistics(heads=4, grid=(16, 16), ids=(5, 8), dtype=torch.float64, batch=2, sharp=3.0, width=16, impl="reference"):
    q, k, v = attention_inputs(batch, heads, grid[0] * grid[1], 20, width, dtype, sharp)
    return ops.target_statistics(q, k, v, ids, with_square=True, impl=impl)


def initial(stats, grid, seed=0, **how):
    return rand(*stats.logits.shape[:3], *ops.basis_shape(grid, **how), dtype=stats.logits.dtype, seed=seed)


def wider(stats):
    return TargetStatistics(*(x if x is None else x.double() for x in stats))


def narrower(stats):
    return TargetStatistics(*(x if x is None else x.float() for x in stats))


def assert_near(ours, truth, what):
    """By the largest element: a gradient's small ones are differences of large numbers."""
    off = (ours.double() - truth).abs().amax()
    assert off <= 1e-5 * truth.abs().amax(), f"{what} is off by {off} of {truth.abs().amax()}"


def full_loss(q, k, bias, theta, ids, objective):
    """The objective from full maps [B,H,M,N], as the equations are written."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    edited = logits.clone()
    edited[..., ids] += bias.mT
    before, after = logits.softmax(-1), edited.softmax(-1)
    maps = after[..., ids]
    loss = (torch.quantile(maps, 0.9, dim=-2) - 0.9).square().mean(-1)
    loss = loss + 80 * (maps.mean(-2) - min(1, 0.2 * len(ids)) / len(ids)).square().mean(-1)
    if objective == "paper":
        return loss + 0.1 * (after - before).square().sum((-1, -2)).sqrt()
    return loss + 0.09 * theta.square().mean((-1, -2, -3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_all_gradients_equal_the_full_maps(impl, objective):
    leaves = [
        *attention_inputs(2, 3, 63, 20, 16, widest(impl), 3.0),
        randn(2, 3, 2, 63, dtype=widest(impl), seed=5),
        randn(2, 3, 2, 12, dtype=widest(impl), seed=6).unflatten(-1, (3, 4)),
    ]
    q, k, v, bias, theta = leaves = [x.requires_grad_() for x in leaves]
    weight = torch.arange(1.0, 7.0, device=DEVICE).view(2, 3)
    stats = ops.target_statistics(q, k, v, [5, 8], with_square=True, impl=impl)
    loss = ops.regulation_loss(stats, bias, objective=objective, theta=theta, impl=impl)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = full_loss(wide[0], wide[1], *wide[3:], [5, 8], objective)
    of = [0, 1, 3, *([4] if objective == "official" else [])]
    ours = torch.autograd.grad((weight * loss).sum(), [leaves[i] for i in of])
    truth = torch.autograd.grad((weight * expected).sum(), [wide[i] for i in of])
    if impl == "triton":
        torch.testing.assert_close(loss.double(), expected, **SINGLE)
        for i, a, b in zip(of, ours, truth, strict=True):
            assert_near(a, b, f"the gradient of input {i}")
        return
    torch.testing.assert_close(loss, expected)
    for i, a, b in zip(of, ours, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8, msg=lambda m, i=i: f"gradient of input {i}: {m}")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_in_float32(impl, objective):
    wide = statistics(grid=(32, 32), ids=(3, 5, 8), batch=1)
    bias = 3 * randn(1, 4, 3, 1024, dtype=torch.float64, seed=5)

    def gradient(stats, bias, impl):
        bias = bias.requires_grad_()
        loss = ops.regulation_loss(stats, bias, objective=objective, impl=impl).sum()
        return torch.autograd.grad(loss, bias)[0]

    truth = gradient(wide, bias, "reference")
    assert_near(gradient(narrower(wide), bias.detach().float(), impl), truth, "the bias's gradient")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_settings_that_are_not_the_defaults(impl, objective):
    """Against the equations on full maps, and the solver against its own loss."""
    q, k, v = attention_inputs(2, 3, 64, 20, 16, widest(impl), 3.0)
    ids, grid = [5, 8], (8, 8)
    stats = ops.target_statistics(q, k, v, ids, with_square=True, impl=impl)
    theta = initial(stats, grid)
    how = {"quantile": 0.7, "level": 0.6, "mass": 0.11, "mass_weight": 30.0, "penalty": 0.5, "objective": objective}
    bias = 0.5 * ops.gaussian_bias(theta, grid, impl=impl)
    logits = q.double() @ k.double().mT / 4
    edited = logits.clone()
    edited[..., ids] += 0.5 * ops.gaussian_bias(theta.double(), grid, impl="reference").mT
    maps = edited.softmax(-1)[..., ids]
    expected = (torch.quantile(maps, 0.7, dim=-2) - 0.6).square().mean(-1)
    expected = expected + 30 * (maps.mean(-2) - 0.11).square().mean(-1)
    distance = (edited.softmax(-1) - logits.softmax(-1)).square().sum((-1, -2)).sqrt()
    squares = theta.double().square().mean((-1, -2, -3))
    expected = expected + 0.5 * (distance if objective == "paper" else squares)
    close = SINGLE if impl == "triton" else {}
    ours = ops.regulation_loss(stats, bias, theta=theta, impl=impl, **how)
    torch.testing.assert_close(ours.double(), expected, **close)
    found = ops.regulate(stats, grid, theta=theta, bias_scale=0.5, steps=2, step_size=3.0, impl=impl, **how)
    torch.testing.assert_close(found.losses[0].double(), expected, **close)
    leaf = theta.double().requires_grad_()
    loss = textbook_loss(stats, leaf, grid, 0.5, **how)
    moved = leaf - 3.0 * torch.autograd.grad(loss.sum(), leaf)[0]
    after = textbook_loss(stats, moved.detach(), grid, 0.5, **how)
    torch.testing.assert_close(found.losses[1].double(), after, **close)


def textbook_loss(stats, theta, grid, bias_scale=1.0, **how):
    """The reference's loss in float64 on the statistics as they are."""
    bias = bias_scale * ops.gaussian_bias(theta, grid, impl="reference")
    return ops.regulation_loss(wider(stats), bias, theta=theta, impl="reference", **how)


@pytest.mark.parametrize(("impl", "objective"), EACH)
def test_padded_targets_are_ignored(impl, objective):
    stats = statistics(2, ids=[[3, 5], [4, -1]], impl=impl, dtype=widest(impl))
    theta = initial(stats, (16, 16))
    bias = ops.gaussian_bias(theta, (16, 16), impl=impl)
    expected = ops.regulation_loss(stats, bias, theta=theta, objective=objective, impl=impl)
    solved = ops.regulate(stats, (16, 16), theta=theta, objective=objective, steps=3, impl=impl)
    for poison in (torch.nan, torch.inf):
        theta[1, :, 1], bias[1, :, 1] = poison, poison
        loss = ops.regulation_loss(stats, bias, theta=theta, objective=objective, impl=impl)
        torch.testing.assert_close(loss, expected)
        again = ops.regulate(stats, (16, 16), theta=theta, objective=objective, steps=3, impl=impl)
        assert torch.equal(again.bias, solved.bias) and torch.equal(again.losses, solved.losses)


@pytest.mark.parametrize(("impl", "objective"), EACH)
def test_the_bias_is_averaged_with_the_step_before(impl, objective):
    """EMA over S, as the released code does, from weights alone; only the bias knows of it."""
    stats = statistics(2, ids=[[3, 5], [4, -1]], impl=impl, dtype=widest(impl))
    theta, grid = initial(stats, (16, 16)), (16, 16)
    how = {"theta": theta, "objective": objective, "steps": 3, "bias_scale": 0.5, "impl": impl}
    plain = ops.regulate(stats, grid, **how)
    previous = torch.rand_like(theta)
    for given in (previous, None):
        found = ops.regulate(stats, grid, previous=given, ema=0.25, strength=0.9, **how)
        before = 0.5 * ops.gaussian_bias(theta if given is None else given, grid, impl=impl)
        before[1, :, 1] = 0.0
        torch.testing.assert_close(found.bias, 0.9 * (0.75 * plain.bias + 0.25 * before), **SINGLE)
        assert torch.equal(found.theta, plain.theta) and torch.equal(found.losses, plain.losses)
    previous[1, :, 1] = torch.nan
    again = ops.regulate(stats, grid, previous=previous, ema=0.25, **how)
    assert again.bias.isfinite().all() and (again.bias[1, :, 1] == 0).all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("impl", "targets"), [*((impl, 3) for impl in IMPLS), *(full(impl, 2) for impl in IMPLS)])
def test_strength_may_be_a_tensor(impl, targets):
    """Equal to a number; at zero nothing is descended."""
    ids = [[3, 5, 7][:targets], [4, -1, -1][:targets]]
    grid = (8, 8)
    stats = statistics(2, grid, ids, impl=impl, dtype=widest(impl))
    theta, previous = initial(stats, grid), initial(stats, grid) + 1
    how = {"theta": theta, "steps": 3, "ema": 0.25, "impl": impl}
    for given in (previous, None):
        for strength in (1.0, 0.5):
            ours = ops.regulate(stats, grid, previous=given, strength=torch.tensor(strength, device=DEVICE), **how)
            for a, b in zip(ours, ops.regulate(stats, grid, previous=given, strength=strength, **how), strict=True):
                torch.testing.assert_close(a, b, atol=0, rtol=1e-6)
        for zero in (torch.tensor(0.0, device=DEVICE), torch.tensor(-0.0, dtype=torch.bfloat16, device=DEVICE)):
            off = ops.regulate(stats, grid, previous=given, strength=zero, **how)
            start = (theta if given is None else given).clone()
            start[1, :, 1:] = 0.0
            assert (off.bias == 0).all() and (off.losses == 0).all() and torch.equal(off.theta, start)
            assert off.losses.shape == (3, 2, stats.logits.shape[1])


def test_an_accelerator_is_not_asked_for_the_strength():
    """There the eager form descends, and leaves out what it found."""
    module = importlib.import_module("attnctl_fast.ops.regulate")
    stats, grid = statistics(2, ids=[[3, 5], [4, -1]]), (16, 16)
    theta = initial(stats, grid)
    found = ops.regulate(stats, grid, theta=theta, steps=3)

    class Elsewhere:
        """The logits, as if they lay on an accelerator."""

        device, shape = torch.device("cuda"), stats.logits.shape

        def __eq__(self, other):
            return stats.logits == other

    def run(strength):
        return module._at_strength(lambda _: tuple(found), torch.tensor(strength), Elsewhere(), theta, None, 3)

    bias, kept, losses = run(0.5)
    assert torch.equal(bias, 0.5 * found.bias) and kept is not found.theta and torch.equal(kept, found.theta)
    assert torch.equal(losses, found.losses)
    bias, kept, losses = run(0.0)
    start = theta.clone()
    start[1, :, 1] = 0.0
    assert (bias == 0).all() and (losses == 0).all() and torch.equal(kept, start)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_serves_every_strength(impl):
    stats, grid = statistics(2, ids=[[3, 5], [4, 1]], impl=impl, dtype=widest(impl)), (16, 16)
    theta, graphs = initial(stats, grid), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(strength):
        return ops.regulate(stats, grid, theta=theta, steps=2, strength=strength, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    for strength in (1.0, 0.5, 0.0):
        given = torch.tensor(strength, device=DEVICE)
        torch.testing.assert_close(tuple(compiled(given)), tuple(run(given)))
    assert len(graphs) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_bias_cannot_be_averaged_with_is_an_error(impl):
    stats = statistics(impl=impl, dtype=widest(impl))
    theta = initial(stats, (16, 16))
    for how, message in (
        ({"previous": theta[..., :1]}, "previous has"),
        ({"previous": theta.half()}, "previous is torch.float16"),
        ({"ema": 1.5}, r"ema is 1.5; it must lie in \[0, 1\]"),
        ({"strength": torch.inf}, "strength is inf"),
        ({"strength": torch.ones(1, device=DEVICE)}, r"strength is torch.float32 of shape \(1,\); it must be a float"),
        ({"strength": torch.ones((), dtype=torch.int64, device=DEVICE)}, "strength is torch.int64"),
        ({"strength": torch.ones((), device="meta")}, "strength is on meta but the statistics are on"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.regulate(stats, (16, 16), theta=theta, impl=impl, **how)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_without_targets_has_finite_gradients(impl, objective):
    q, k, v = (x.requires_grad_() for x in attention_inputs(2, 2, 16, 9, 8, widest(impl)))
    bias = torch.zeros(2, 2, 1, 16, dtype=widest(impl), device=DEVICE, requires_grad=True)
    ids, pinned = [[3], [-1]], [[0], [0]]
    stats = ops.target_statistics(q, k, v, ids, pinned_ids=pinned, with_square=True, impl=impl)
    loss = ops.regulation_loss(stats, bias, objective=objective, impl=impl)
    out = ops.merge_targets(stats, v, ids, bias, pinned_ids=pinned, impl=impl)
    for gradient in torch.autograd.grad(loss.sum() + out.square().sum(), (q, k, v, bias)):
        assert gradient.isfinite().all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_step_with_nan_losses_is_never_kept(kind):
    module = importlib.import_module("attnctl_fast.ops.regulate")
    losses = torch.tensor([[[3.0]], [[torch.nan]], [[2.0]]])
    thetas = torch.arange(3.0).view(3, 1, 1)
    given = (losses.numpy(), thetas.numpy()) if kind == "numpy" else (losses, thetas)
    for select in ("sample", "batch"):
        assert float(module.keep_best(*given, select)[0, 0]) == 2.0
    assert int(reference.keep_best(losses, "sample")) == 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_descent_that_overflows_keeps_a_step_from_before(impl):
    stats, grid = statistics(2, dtype=widest(impl)), (16, 16)
    theta = initial(stats, grid)
    found = ops.regulate(stats, grid, theta=theta, steps=4, step_size=torch.finfo(theta.dtype).max ** 0.75, impl=impl)
    assert found.losses[0].isfinite().all() and found.losses[-1].isnan().all()
    assert found.theta.isfinite().all() and found.bias.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_without_theta_has_no_theta_term(impl):
    stats = statistics(dtype=widest(impl))
    bias, theta = torch.zeros_like(stats.logits), initial(stats, (16, 16))
    with_theta = ops.regulation_loss(stats, bias, theta=theta, impl=impl)
    expected = ops.regulation_loss(stats, bias, impl=impl) + 0.09 * theta.square().mean((-1, -2, -3))
    torch.testing.assert_close(with_theta, expected)


@pytest.mark.parametrize("size", [1, 2, 10, 11, 256, 1024])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_quantile_is_torchs(size, quantile, kind):
    from attnctl_fast.ops._objective import Terms, tensor

    maps = torch.rand(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    aim = Objective.checked("official", quantile, 0.9, None, None, None, None)
    measured = Terms(maps.numpy(), aim).measure(maps.numpy()) if kind == "numpy" else _on_torch(maps, aim)
    torch.testing.assert_close(tensor(measured.high), torch.quantile(maps, quantile, dim=-1))
    torch.testing.assert_close(tensor(measured.mean), maps.mean(-1))


def _on_torch(maps, aim):
    from attnctl_fast.ops._objective import Terms

    return Terms(maps, aim).measure(maps)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_share_the_quantiles_gradient(impl):
    logits = torch.zeros(1, 1, 1, 30, dtype=widest(impl), device=DEVICE)  # every element ties
    rest = torch.zeros_like(logits)[:, :, 0]
    stats = TargetStatistics(torch.zeros(1, 1, 30, 8, device=DEVICE), rest, logits, None, None)
    bias = torch.zeros_like(logits).requires_grad_()
    loss = ops.regulation_loss(stats, bias, mass_weight=0.0, impl=impl)
    close = SINGLE if impl == "triton" else {}
    torch.testing.assert_close(loss.item(), (0.5 - 0.9) ** 2, **close)
    loss.sum().backward()
    # d quantile / d bias sums to A'(1 - A') over the tied elements, whichever of them are named.
    torch.testing.assert_close(bias.grad.sum().item(), 2 * (0.5 - 0.9) * 0.25, **close)


@pytest.mark.parametrize(("objective", "centres", "grid"), pairs(OBJECTIVES, OBJECTIVES, GRIDS))
def test_eager_equals_the_textbook(objective, centres, grid):
    stats = statistics(grid=grid)
    theta = initial(stats, grid, centres=centres)
    how = {
        "theta": theta,
        "objective": objective,
        "centres": centres,
        "bias_scale": 0.5 if objective == "paper" else 1.0,
    }
    ours, textbook = (ops.regulate(stats, grid, impl=impl, **how) for impl in ("eager", "reference"))
    for name in ("losses", "theta", "bias"):
        torch.testing.assert_close(getattr(ours, name), getattr(textbook, name), atol=1e-8, rtol=1e-8)
    assert ours.losses.shape == (20, 2, 4)


def test_regulate_equals_the_published_loop_on_full_logits():
    q, k, v = attention_inputs(2, 3, 256, 20, 16, torch.float64, 3.0)
    ids, pinned = torch.tensor([5, 8], device=DEVICE), [0, 9]
    stats = ops.target_statistics(q, k, v, ids, pinned_ids=pinned, impl="eager")
    theta = initial(stats, (16, 16))
    basis = full_basis((16, 16), None, "official", theta)
    bias, kept, losses = reference.regulate_full_logits(q @ k.mT / 4, ids, theta, basis)
    ours = ops.regulate(stats, (16, 16), theta=theta, select="batch", impl="eager")
    torch.testing.assert_close(ours.losses, losses, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ours.theta, kept, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ours.bias, bias, atol=1e-8, rtol=1e-8)
    out = ops.merge_targets(stats, v, ids, ours.bias, pinned_ids=pinned, impl="eager")
    expected = reference.biased_attention(q, k, v, bias, ids, torch.tensor(pinned, device=DEVICE), 0.25)
    torch.testing.assert_close(out, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_step_is_a_gradient_step_in_float32(objective):
    """Per step, because trajectories part where ranks swap (MATH.md, Chaos)."""
    wide = statistics(grid=(32, 32), ids=(3, 5, 8), batch=1)
    narrow = narrower(wide)
    theta = initial(narrow, (32, 32))
    for _ in range(3):
        two = ops.regulate(narrow, (32, 32), theta=theta, objective=objective, steps=2, impl="eager")
        leaf = theta.double().requires_grad_()
        loss = textbook_loss(wide, leaf, (32, 32), objective=objective)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        torch.testing.assert_close(two.losses[0].double(), loss.detach(), **SINGLE)
        moved = _second_theta(narrow, theta, objective)
        taken = (theta.double() - moved.double()) / 100
        assert (taken - gradient).abs().amax() <= 1e-5 * gradient.abs().amax() + 1e-7 * theta.abs().amax()
        theta = moved


def _second_theta(stats, theta, objective):
    aim = Objective.checked(objective, 0.9, 0.9, None, None, None, stats.rest_square)
    square = stats.rest_square if objective == "paper" else None
    flat = [x if x is None else x.flatten(0, 1).cpu() for x in (stats.logits, stats.rest_lse, square, theta)]
    axis_y, axis_x, sigma_y, sigma_x = basis_axes((32, 32), None, "official")
    bases = axis_basis(32, axis_y, sigma_y, flat[3]).numpy(), axis_basis(32, axis_x, sigma_x, flat[3]).numpy()
    _, thetas = descend(*(x if x is None else x.numpy() for x in flat), bases, 1.0, 2, 100.0, aim)
    return torch.from_numpy(thetas[1]).view(theta.shape).to(DEVICE)


@pytest.mark.parametrize(("impl", "objective", "centres", "grid"), pairs(FAST, OBJECTIVES, OBJECTIVES, GRIDS))
def test_the_kept_theta_is_a_gradient_step_in_float32(impl, objective, centres, grid):
    """With two steps of a small size, which lowers the loss, what is kept is the second theta."""
    stats = statistics(grid=grid, heads=2, dtype=torch.float32)
    theta = initial(stats, grid, centres=centres)
    how = {"objective": objective, "centres": centres, "bias_scale": 0.5 if objective == "paper" else 1.0}
    found = ops.regulate(stats, grid, theta=theta, steps=2, step_size=0.25, impl=impl, **how)
    leaf = theta.double().requires_grad_()
    bias = how["bias_scale"] * ops.gaussian_bias(leaf, grid, centres=centres, impl="reference")
    loss = ops.regulation_loss(wider(stats), bias, theta=leaf, objective=objective, impl="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert (found.losses[1].mean(-1) < found.losses[0].mean(-1)).all(), "the case must improve"
    torch.testing.assert_close(found.losses[0].double(), loss.detach(), **SINGLE)
    taken = (theta.double() - found.theta.double()) / 0.25
    assert (taken - gradient).abs().amax() <= 1e-5 * gradient.abs().amax() + 4e-7 * theta.abs().amax()
    kept = how["bias_scale"] * ops.gaussian_bias(found.theta.double(), grid, centres=centres, impl="reference")
    torch.testing.assert_close(found.bias.double(), kept, **SINGLE)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_solver_runs_the_same_on_torch_tensors(objective):
    """On an accelerator the loop runs on torch tensors; here on the CPU's."""
    stats = statistics()
    theta = initial(stats, (16, 16))
    aim = Objective.checked(objective, 0.9, 0.9, None, None, None, stats.rest_square)
    square = stats.rest_square if objective == "paper" else None
    flat = [x if x is None else x.flatten(0, 1).cpu() for x in (stats.logits, stats.rest_lse, square, theta)]
    axis_y, axis_x, sigma_y, sigma_x = basis_axes((16, 16), None, "official")
    bases = axis_basis(16, axis_y, sigma_y, flat[3]), axis_basis(16, axis_x, sigma_x, flat[3])
    losses, thetas = descend(*flat, bases, 1.0, 20, 100.0, aim)
    arrays = [x if x is None else x.numpy() for x in flat]
    expected_losses, expected_thetas = descend(*arrays, tuple(x.numpy() for x in bases), 1.0, 20, 100.0, aim)
    torch.testing.assert_close(losses, torch.from_numpy(expected_losses), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(thetas, torch.from_numpy(expected_thetas), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("impl", FAST)
def test_float32_losses_end_where_the_textbooks_do(impl):
    wide = statistics(grid=(32, 32), ids=(3, 5, 8), batch=1, heads=2)
    theta = initial(wide, (32, 32))
    ours = ops.regulate(narrower(wide), (32, 32), theta=theta.float(), impl=impl).losses.mean(-1).amin()
    truth = ops.regulate(wide, (32, 32), theta=theta, impl="reference").losses.mean(-1).amin()
    assert abs(ours.double() - truth) <= 0.05 * truth


@pytest.mark.parametrize("impl", IMPLS)
def test_best_step_per_sample_or_batch(impl):
    stats, grid = statistics(2, batch=3, dtype=widest(impl)), (16, 16)
    how = {"theta": initial(stats, grid), "steps": 8, "impl": impl}
    close = SINGLE if impl == "triton" else {}
    sample = ops.regulate(stats, grid, **how)
    best = sample.losses.mean(-1).argmin(0)
    assert SEED or len(set(best.tolist())) > 1, "the case must tell samples apart"
    kept = ops.regulation_loss(stats, sample.bias, theta=sample.theta, impl=impl)
    torch.testing.assert_close(kept.mean(-1), sample.losses.mean(-1).amin(0), **close)
    batch = ops.regulate(stats, grid, select="batch", **how)
    kept = ops.regulation_loss(stats, batch.bias, theta=batch.theta, impl=impl)
    torch.testing.assert_close(kept, batch.losses[batch.losses.mean((-1, -2)).argmin()], **close)
    assert batch.losses.mean((-1, -2)).amin() < batch.losses[0].mean()


@pytest.mark.parametrize("impl", IMPLS)
def test_samples_do_not_depend_on_their_batch(impl):
    """In float64 without its padding; in float32, where another order of summation parts trajectories, with it and to
    the bit."""
    stats = statistics(batch=3, ids=[[3, 5], [8, -1], [1, 2]], dtype=widest(impl), heads=2)
    theta = initial(stats, (16, 16))
    together = ops.regulate(stats, (16, 16), theta=theta, impl=impl, steps=6)
    exact = impl == "triton"
    close = {"atol": 0, "rtol": 0} if exact else {"atol": 1e-10, "rtol": 1e-10}
    for i, real in enumerate([2, 1, 2]):
        ids = 2 if exact else real
        alone = TargetStatistics(
            stats.rest_out[i : i + 1], stats.rest_lse[i : i + 1], stats.logits[i : i + 1, :, :ids], None, None
        )
        one = ops.regulate(alone, (16, 16), theta=theta[i : i + 1, :, :ids], impl=impl, steps=6)
        torch.testing.assert_close(together.bias[i : i + 1, :, :ids], one.bias, **close)
        torch.testing.assert_close(together.losses[:, i : i + 1], one.losses, **close)
    assert (together.bias[1, :, 1] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_of_any_strides(impl, objective):
    """Image tokens first, heads last: nothing of it lies as the operations would lay it."""
    grid = (4, 6)
    stats = narrower(statistics(grid=grid, batch=1))

    def laid_out(x):
        last_first = list(range(x.ndim))[::-1]
        return x.permute(last_first).contiguous().permute(last_first)

    strided = TargetStatistics(*(x if x is None else laid_out(x) for x in stats))
    theta = initial(stats, grid).float()
    given = {"theta": theta, "steps": 3, "objective": objective, "impl": impl}
    found, expected = (ops.regulate(x, grid, **given) for x in (strided, stats))
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.bias, expected.bias, rtol=0, atol=1e-4)
    gradients = []
    for given in (strided, stats):
        bias = torch.zeros_like(stats.logits).requires_grad_()
        ops.regulation_loss(given, bias, objective=objective, impl=impl).sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", FAST)
def test_deterministic_under_a_generator(impl):
    stats = statistics(dtype=torch.float32, heads=2)

    def run(seed):
        return ops.regulate(stats, (16, 16), generator=torch.Generator(DEVICE).manual_seed(seed), steps=6, impl=impl)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.bias, again.bias) and torch.equal(first.losses, again.losses)
    assert not torch.equal(first.bias, other.bias)
    before = torch.get_rng_state()
    run(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_stay_as_they_were_and_inference_mode_works(impl):
    stats = statistics(dtype=torch.float32, heads=2)
    theta = initial(stats, (16, 16))
    copies = [x.clone() for x in (*stats[:4], theta)]
    how = {"theta": theta, "impl": impl, "objective": "paper", "steps": 6}
    with torch.inference_mode():
        inside = ops.regulate(stats, (16, 16), **how)
    for before, after in zip(copies, (*stats[:4], theta), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(inside.bias, ops.regulate(stats, (16, 16), **how).bias)


@pytest.mark.parametrize("impl", FAST)
def test_regulation_raises_the_targets_attention(impl):
    q, k, v = attention_inputs(1, 2, 256, 20, 16, torch.float32)
    stats = ops.target_statistics(q, k, v, [5, 8], impl=impl)
    regulation = ops.regulate(stats, (16, 16), theta=initial(stats, (16, 16)), impl=impl)
    before = (q @ k.mT / 4).softmax(-1)[..., [5, 8]]
    logits = q @ k.mT / 4
    logits[..., [5, 8]] += regulation.bias.mT
    after = logits.softmax(-1)[..., [5, 8]]
    assert torch.quantile(after, 0.9, dim=-2).mean() > torch.quantile(before, 0.9, dim=-2).mean() + 0.2
    assert (after.mean(-2) - 0.2).abs().mean() < (before.mean(-2) - 0.2).abs().mean()
