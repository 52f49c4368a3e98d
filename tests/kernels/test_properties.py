"""What must hold of the kernels for any input, on random sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from attnctl_fast import ops
from attnctl_fast.ops import TargetStatistics
from bench.ops.inputs import Case, fenced, rand, randn
from bench.ops.regulation import statistics_of
from tests.support.numerics import DEVICE, carried_by_lse

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")
KERNELS = {"impl": "triton"}

# Derandomised, and without shrinking: in the interpreter an example takes about a second.
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def cases(draw, **fixed):
    n = draw(st.integers(6, 90))
    drawn = draw(st.permutations(range(n)))
    targets, pinned = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    made = {
        "m": draw(st.sampled_from([16, 63, 64])),
        "n": n,
        "d": draw(st.integers(8, 96)),
        "ids": (tuple(drawn[:targets]),),
        "pinned": (tuple(drawn[targets : targets + pinned]),),
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, 2)),
        "sharp": draw(st.sampled_from([0.3, 1.0, 4.0])),
        "raised": draw(st.sampled_from([0.0, 3.0, 30.0])),
    }
    return Case(**{**made, **fixed})


def biased(case, t, **replaced):
    t = {**t, **replaced}
    return ops.biased_attention(t["q"], t["k"], t["v"], t["bias"], **case.edit, **KERNELS)


def by_lse(t):
    """The larger of two roundings of the float32 logsumexp, as a relative error of every weight."""
    lse = torch.cat([t["logits"] + t["bias"], t["rest_lse"].unsqueeze(2)], 2).abs().amax(2)
    return 2 * carried_by_lse(lse.double(), t["v"].double()).amax() + 1e-6


@few
@given(cases())
def test_merged_statistics_are_biased_attention(case):
    t = case.tensors()
    stats = ops.target_statistics(t["q"], t["k"], t["v"], **case.edit, **KERNELS)
    merged = ops.merge_targets(stats, t["v"], bias=t["bias"], **case.edit, **KERNELS)
    torch.testing.assert_close(merged, biased(case, t), atol=float(by_lse(t)), rtol=1e-5)


@few
@given(cases())
def test_merged_without_a_bias_they_are_plain_attention(case):
    t = case.tensors()
    stats = ops.target_statistics(t["q"], t["k"], t["v"], **case.edit, **KERNELS)
    merged = ops.merge_targets(stats, t["v"], **case.edit, **KERNELS)
    plain = ops.attention(t["q"], t["k"], t["v"], **KERNELS)
    t["bias"] = torch.zeros_like(t["bias"])
    torch.testing.assert_close(merged, plain, atol=float(by_lse(t)), rtol=1e-5)


@few
@given(cases(m=64))
def test_regulated_attention_is_biased_by_its_gaussians(case):
    t = case.tensors()
    inputs = (t["q"], t["k"], t["v"], t["theta"])
    ours = ops.regulated_attention(*inputs, **case.edit, **case.basis, **KERNELS)
    bias = ops.gaussian_bias(t["theta"], **case.basis, **KERNELS)
    t["bias"] = bias
    torch.testing.assert_close(ours, biased(case, t), atol=float(by_lse(t)), rtol=1e-5)


@few
@given(cases(), st.integers(0, 2**16))
def test_the_order_of_columns_does_not_matter(case, seed):
    t = case.tensors()
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(seed))
    where = order.argsort().tolist()
    moved = {name: fenced(t[name][:, :, order.to(DEVICE)]) for name in "kv"}
    ids, pinned = ([where[i] for i in row] for row in (case.ids[0], case.pinned[0]))
    ours = ops.biased_attention(t["q"], moved["k"], moved["v"], t["bias"], ids, pinned_ids=pinned, **KERNELS)
    torch.testing.assert_close(ours, biased(case, t), atol=float(by_lse(t)), rtol=1e-5)


@few
@given(cases(sharp=1.0, raised=3.0), st.floats(-10, 10))
def test_a_constant_on_all_logits_of_a_row_does_not_matter(case, constant):
    """One more dimension of the head, in which every key is 1, adds q there to every logit of the row."""
    t = case.tensors()
    widths = (*t["q"].shape[:2], case.m, 1), (*t["q"].shape[:2], case.n, 1)
    ones = torch.ones(widths[1], device=DEVICE)
    q = torch.cat([t["q"], constant * randn(*widths[0], dtype=torch.float32, seed=9) / case.scale], -1)
    k, v = torch.cat([t["k"], ones], -1), torch.cat([t["v"], 0 * ones], -1)
    how = {**case.edit, "scale": case.scale, **KERNELS}
    ours = ops.biased_attention(q, k, v, t["bias"], **how)[..., :-1]
    torch.testing.assert_close(ours, biased(case, t), atol=1e-4, rtol=1e-4)


@few
@given(cases(batch=3), st.integers(0, 2))
def test_samples_are_independent(case, kept):
    t = case.tensors()
    t["bias"] = t["bias"].clone()
    together = biased(case, t)
    others = [i for i in range(3) if i != kept]
    changed = {name: t[name].clone() for name in ("q", "k", "v", "bias")}
    for x in changed.values():
        x[others] = torch.nan
    assert torch.equal(biased(case, t, **changed)[kept], together[kept])


@few
@given(st.integers(1, 400), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**16))
def test_the_quantile_is_torchs(size, levels, quantile, seed):
    """With one target, no mass term and level 0 the loss is the quantile squared; few levels make ties."""
    maps = (1 + (levels * rand(1, 2, 1, size, dtype=torch.float64, seed=seed)).floor()) / (levels + 2)
    logits = (maps / (1 - maps)).log().float()
    rest = torch.zeros(1, 2, size, device=DEVICE)
    stats = TargetStatistics(rest.unsqueeze(-1).expand(-1, -1, -1, 8), rest, fenced(logits), None, None)
    how = {"quantile": quantile, "level": 0.0, "mass_weight": 0.0}
    loss = ops.regulation_loss(stats, torch.zeros_like(logits), **how, **KERNELS)
    expected = torch.quantile(logits.double().sigmoid(), quantile, dim=-1)[..., 0]
    torch.testing.assert_close(loss.double().sqrt(), expected, atol=1e-6, rtol=2e-6)


@few
@given(cases(), st.sampled_from(["official", "paper"]), st.floats(0.05, 0.95))
def test_the_first_losses_are_those_of_regulation_loss(case, objective, quantile):
    t = case.tensors()
    stats, how = statistics_of(t), {"objective": objective, "quantile": quantile, **KERNELS}
    found = ops.regulate(stats, theta=t["theta"], **case.basis, steps=2, **how)
    bias = ops.gaussian_bias(t["theta"], **case.basis, **KERNELS)
    loss = ops.regulation_loss(stats, bias, theta=t["theta"], **how)
    torch.testing.assert_close(found.losses[0], loss, atol=1e-6, rtol=1e-5)


@few
@given(
    st.sampled_from([(4, 4), (7, 9), (12, 20), (16, 16)]), st.sampled_from(["official", "paper"]), st.integers(0, 99)
)
def test_the_bias_is_linear_in_theta(grid, centres, seed):
    shape = ops.basis_shape(grid, centres=centres)
    a, b = (rand(1, 2, 2, *shape, seed=seed + i) for i in (0, 1))
    spanned = [ops.gaussian_bias(fenced(theta), grid, centres=centres, **KERNELS) for theta in (a, b, a + 2 * b)]
    torch.testing.assert_close(spanned[2], spanned[0] + 2 * spanned[1], atol=1e-5, rtol=1e-5)
