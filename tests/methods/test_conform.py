"""CONFORM: its loss against loops over pairs, its memory, its groups, bad input."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.methods.conform import contrastive_loss
from tests.support import guided

PROMPTS = ("a red bag and a blue octopus", "a cat and a dog")
GROUPS = [[("red", "bag"), ("blue", "octopus")], [("cat",), ("dog",)]]


def nt_xent(maps: np.ndarray, labels: list[int], temperature: float) -> float:
    """Of one sample: the mean over all ordered pairs of a class."""

    def like(a: int, b: int) -> float:
        x, y = (guided.smoothed(maps[i]).ravel() for i in (a, b))
        return float(x @ y / math.sqrt(float(x @ x) * float(y @ y))) / temperature

    count, losses = len(labels), []
    for a in range(count):
        for p in range(count):
            if a == p or labels[a] != labels[p]:
                continue
            below = math.exp(like(a, p))
            for n in range(count):
                if labels[n] != labels[a]:
                    below += math.exp(like(a, n))
            losses.append(-math.log(math.exp(like(a, p)) / below))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("remembered", [False, True])
def test_loss_is_nt_xent(temperature: float, remembered: bool) -> None:
    method = ac.CONFORM(GROUPS, temperature=temperature)
    context = guided.started(method, guided.call(*PROMPTS, images=2))
    maps, before = guided.maps_for(context), guided.maps_for(context, seed=1)
    if remembered:
        method.after_step(before, context)
    found = method.loss(maps, context)
    labels = [[0, 0, 1, 1, 1], [0, 1]]
    for sample, loss in enumerate(found.tolist()):
        own = labels[sample // 2]
        rows = [maps[sample, : len(own)].numpy()] + [before[sample, : len(own)].numpy()] * remembered
        assert loss == pytest.approx(nt_xent(np.concatenate(rows), own * (1 + remembered), temperature), rel=1e-12)


def test_gradient() -> None:
    torch.manual_seed(0)
    maps, previous = (torch.rand(2, 4, 20, dtype=torch.float64) for _ in range(2))
    groups = torch.tensor([[0, 0, 1, 2], [0, 1, -1, -1]])

    def loss(maps: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(maps, groups, guided.GRID, previous=previous)

    torch.autograd.gradcheck(loss, maps.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_in_a_batch_is_the_sample_alone(dtype: torch.dtype) -> None:
    method = ac.CONFORM(GROUPS)
    batch = guided.started(method, guided.call(*PROMPTS))
    maps = guided.maps_for(batch, dtype=dtype)
    method.after_step(maps.flip(2), batch)
    loss, gradient = guided.gradient(method, maps, batch)
    assert loss.dtype == dtype
    for index, groups in enumerate(GROUPS):
        alone = ac.CONFORM(groups)
        context = guided.started(alone, guided.call(PROMPTS[index]))
        own = maps[index : index + 1, : context.token_ids.shape[1]]
        alone.after_step(own.flip(2), context)
        one, one_gradient = guided.gradient(alone, own, context)
        tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
        torch.testing.assert_close(loss[index : index + 1], one, **tolerance)
        torch.testing.assert_close(gradient[index : index + 1, : own.shape[1]], one_gradient, **tolerance)
        assert not gradient[index, own.shape[1] :].any()


def test_zero_maps_have_finite_gradients() -> None:
    method = ac.CONFORM(GROUPS)
    context = guided.started(method, guided.call(*PROMPTS))
    maps = guided.maps_for(context)
    maps[0, 1] = 0
    maps[1] = 0
    method.after_step(torch.zeros_like(maps), context)
    loss, gradient = guided.gradient(method, maps, context)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_single_words_attract_only_their_maps_of_the_step_before() -> None:
    method = ac.CONFORM([("cat",), ("dog",)])
    context = guided.started(method, guided.call("a cat and a dog"))
    maps = guided.maps_for(context)
    loss, gradient = guided.gradient(method, maps, context)
    assert loss.item() == 0 and not gradient.any()
    method.after_step(maps, context)
    assert guided.gradient(method, maps, context)[0].item() > 0
    forgetful = ac.CONFORM([("cat",), ("dog",)], remember=False)
    context = guided.started(forgetful, guided.call("a cat and a dog"))
    forgetful.after_step(maps, context)
    assert context.prepared.maps is None


def test_words_that_the_prompt_repeats() -> None:
    text = "a red bag and a red cat and a bag"
    # 1 a, 2 red, 3 bag, 4 and, 5 a, 6 red, 7 cat, 8 and, 9 a, 10 bag
    prompts = guided.call(text).prompts
    assert ac.CONFORM([("red", "cat"), ("red", "bag")]).tokens(prompts) == [[6, 7, 2, 3]]
    assert ac.CONFORM([("bag",), ("bag",)]).tokens(prompts) == [[3, 10]]
    assert ac.CONFORM([(10,), ("red bag",)]).tokens(prompts) == [[10, 2, 3]]


def test_words_that_the_second_prompt_repeats_elsewhere() -> None:
    prompts = guided.call("a red bag and a red cat", second=["a red bag and a blue cat"]).prompts
    assert ac.CONFORM([("red", "cat"), ("bag",)]).tokens(prompts) == [[2, 7, 3]]


def test_with_embeddings_token_ids_will_do() -> None:
    one = guided.embedded(2)
    assert ac.CONFORM([(2, 3), (6,)]).tokens(one.prompts) == [[2, 3, 6]] * 2
    with pytest.raises(ValueError, match="'cat', but the pipeline was given prompt_embeds"):
        ac.CONFORM([("cat",), (6,)]).tokens(one.prompts)


BAD_CALLS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "not in the prompt": ([("cat",), ("bag",)], ("a cat",), "groups holds 'bag', which is not in the prompt 'a cat'"),
    "in two groups": ([("cat",), ("red", 2)], ("a cat, red",), "names token 2 in two groups"),
    "twice in a group": ([("cat", 2), ("dog",)], ("a cat and a dog",), "names token 2 more than once"),
    "id out of range": ([(1,), (99,)], ("a cat",), "token id 99, but the context has tokens 0..15"),
    "too few lists": (
        [[("a",), ("cat",)]],
        ("a cat", "a cat"),
        "holds 1 lists of groups, but there are 2 prompts",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_groups_that_do_not_fit_the_prompt(case: str) -> None:
    groups, texts, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.CONFORM(groups).tokens(guided.call(*texts).prompts)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "one group": ({"groups": [("red", "bag")]}, "has 1 groups in [('red', 'bag')]; name at least 2"),
    "one group of a prompt": ({"groups": [GROUPS[0], [("cat",)]]}, "has 1 groups in [('cat',)]"),
    "words": ({"groups": ["red", "bag"]}, "pass a list of groups such as"),
    "a mix": ({"groups": [("red", "bag"), [("cat",)]]}, "a mix of both"),
    "none": ({"groups": []}, "pass a list of groups such as"),
    "an empty group": ({"groups": [("red",), ()]}, "has the group (); name at least 1 words"),
    "a number": ({"groups": [("red",), (1.5,)]}, "groups holds 1.5; targets are words"),
    "a word twice": ({"groups": [("red",), ("bag", "Bag")]}, "groups holds 'bag' more than once"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
    "kernel": ({"kernel_size": 2}, "kernel_size is 2; it must be odd"),
    "sigma": ({"sigma": -1}, "sigma is -1; it must be a number above 0"),
    "refinement": ({"refinement": {-1: 0.5}}, "a step of refinement is -1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_construction(case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        ac.CONFORM(**({"groups": [("red",), ("bag",)]} | arguments))


def test_presets_and_refinement() -> None:
    method = ac.CONFORM.official(GROUPS)
    assert method == ac.CONFORM(GROUPS) and len({method, ac.CONFORM(GROUPS, temperature=0.1)}) == 2
    assert (method.steps, method.scale, method.max_refinements) == (30, 20.0, 20)
    assert method.schedule == ac.schedules.root(0.5)
    assert method.bounds(50) == {0: None, 10: None, 20: None}
    assert method.bounds(15) == {0: None, 10: None}
    with pytest.raises(ValueError, match="refinement names step 9, but the call runs steps 0..4"):
        ac.CONFORM(GROUPS, refinement={9: 0.1}).bounds(5)
