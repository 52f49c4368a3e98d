"""FOCUS: its loss against the paper's formula, and what it takes of users."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.methods.focus import divergence_loss
from tests.support.guided import GRID, call, gradient, maps_for, started

PROMPT, OTHER = "a red bag and a blue apple", "the black cat of two dog"
GROUPS, OTHER_GROUPS = [("red", "bag"), ("blue", "apple")], [("cat",), ("two", "dog"), ("black",)]


def jensen_shannon(maps: np.ndarray) -> float:
    """Of cubed maps `[T,M]` as shares, over ln T."""
    shares = maps**3 / (maps**3).sum(1, keepdims=True)
    mean = shares.mean(0)
    divergence = (shares * (np.log(shares + 1e-10) - np.log(mean + 1e-10))).sum(1).mean()
    return float(divergence / math.log(len(maps)))


def by_hand(maps: np.ndarray, groups: list[list[int]]) -> float:
    """The loss of one sample's maps `[n,M]`, blurred by 3x3 of a Gaussian of one cell."""
    weights = np.exp(-(np.arange(-1.0, 2.0) ** 2) / 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    around = np.pad(maps.reshape(-1, *GRID), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    height, width = GRID
    blurred = sum(kernel[y, x] * around[:, y : y + height, x : x + width] for y in range(3) for x in range(3)).reshape(
        len(maps), -1
    )  # type: ignore[union-attr]
    within = [jensen_shannon(blurred[group]) for group in groups if len(group) > 1]
    between = jensen_shannon(np.stack([blurred[group].mean(0) for group in groups]))
    return (float(np.mean(within)) + 1 - between) / 2


def test_loss_is_the_papers() -> None:
    """Of two prompts with other numbers of groups and words."""
    method = ac.FOCUS([GROUPS, OTHER_GROUPS])
    context = started(method, call(PROMPT, OTHER))
    maps = maps_for(context)
    loss = method.loss(maps, context)
    expected = [by_hand(maps[0].numpy(), [[0, 1], [2, 3]]), by_hand(maps[1, :4].numpy(), [[0], [1, 2], [3]])]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    # A factor of all maps, as joint attention's, changes nothing, in single precision either.
    small = method.loss((maps * 1e-6).float(), context)
    torch.testing.assert_close(small.double(), loss, rtol=0, atol=1e-5)


def test_bounds_and_gradient() -> None:
    """Apart and alike is 0, alike but in one place 1/2; the gradient is the differences'."""
    apart = torch.zeros(1, 4, GRID[0] * GRID[1], dtype=torch.float64)
    apart[0, :2, 3], apart[0, 2:, 16] = 1.0, 1.0
    groups = torch.tensor([[0, 0, 1, 1]])
    assert float(divergence_loss(apart, groups, GRID, kernel_size=1)) == pytest.approx(0.0, abs=1e-8)
    assert float(divergence_loss(apart[:, [0, 0, 0, 0]], groups, GRID)) == pytest.approx(0.5)
    maps = torch.rand(1, 4, GRID[0] * GRID[1], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence_loss(x, groups, GRID), maps)


def test_a_sample_in_a_batch_is_the_sample_alone() -> None:
    method = ac.FOCUS([GROUPS, OTHER_GROUPS])
    context = started(method, call(PROMPT, OTHER, images=2))
    maps = maps_for(context)
    loss, found = gradient(method, maps, context)
    assert found.isfinite().all()
    for prompt, groups, index in ((PROMPT, GROUPS, 1), (OTHER, OTHER_GROUPS, 2)):
        alone = ac.FOCUS(groups)
        one = started(alone, call(prompt))
        n = one.token_ids.shape[1]
        its_loss, its_gradient = gradient(alone, maps[index : index + 1, :n], one)
        torch.testing.assert_close(loss[index : index + 1], its_loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[index : index + 1, :n], its_gradient, rtol=0, atol=1e-12)


BAD: dict[str, tuple[Any, str]] = {
    "one group": ([("red", "bag")], "name at least 2"),
    "not groups": (["red", "bag"], "pass a list of groups"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_groups(case: str) -> None:
    groups, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ac.FOCUS(groups)


def test_groups_that_do_not_fit_the_prompt() -> None:
    with pytest.raises(ValueError, match="in two groups of a prompt"):
        ac.FOCUS([("red", "bag"), ("red", "apple")]).tokens(call(PROMPT).prompts)
    with pytest.raises(ValueError, match="2 lists of groups, but there are 1 prompts"):
        ac.FOCUS([GROUPS, GROUPS]).tokens(call(PROMPT).prompts)
    with pytest.raises(ValueError, match="kernel_size is 2"):
        ac.FOCUS(GROUPS, kernel_size=2)
