"""The published guidance methods on pipelines: equal to their loop by hand, and per sample; their losses are tested
where they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctl_fast as ac
from attnctl_fast.attach.call import Call
from attnctl_fast.attach.prompts import padded
from attnctl_fast.methods import GuidanceContext
from tests.support import tiny
from tests.support.guidance_walk import sample
from tests.support.guided import prompts as read_prompts
from tests.support.pipelines import KINDS, LAYERS, call, guided

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROMPT, OTHER = "a red bag and a blue apple", "the black cat of two dog"
EXACT = {"rtol": 0, "atol": 1e-9}  # in float64
COMMON: dict[str, Any] = {"layers": ac.by_downsampling(2), "steps": 2, "schedule": ac.schedules.constant()}
METHODS: dict[str, Any] = {
    "AttendAndExcite": lambda pairs, **more: ac.AttendAndExcite(
        [[word for _, word in row] for row in pairs], scale=20.0, thresholds={1: 0.9}, **COMMON, **more
    ),
    "TSAM": lambda pairs, **more: ac.TSAM(scale=30.0, refinement={1: None}, **COMMON, **more),
    "SynGen": lambda pairs, **more: ac.SynGen(pairs, scale=5.0, refinement={1: None}, **COMMON, **more),
    "CONFORM": lambda pairs, **more: ac.CONFORM(pairs, scale=5.0, refinement={1: None}, **COMMON, **more),
}
PAIRS, OTHER_PAIRS = [("red", "bag"), ("blue", "apple")], [("black", "cat"), ("two", "dog")]


@pytest.mark.parametrize("name", METHODS)
def test_equal_to_the_loop_by_hand(name: str) -> None:
    """Two steps, two moves of refinement; without CONFORM's memory, which the loop does not have."""
    pipe = tiny.pipeline().to(torch.float64)
    more = {"remember": False} if name == "CONFORM" else {}
    method = METHODS[name]([PAIRS], max_refinements=2, **more)
    ours = guided(pipe, method, prompt=PROMPT)
    assert (ours - call(pipe, prompt=PROMPT)).abs().max() > 0.02

    prompts = read_prompts(pipe, [PROMPT])
    at: Any = Call(pipe, prompts, 1, None, latents=(32, 32))  # type: ignore[arg-type]
    tokens = method.tokens(prompts)
    rows = [list(range(tiny.LENGTH))] if tokens is None else tokens
    with torch.no_grad():
        context = GuidanceContext(at, padded(rows), (16, 16), method.prepare(at))
    bound = method.bounds(4)[1]
    theirs, losses = sample(
        pipe,
        PROMPT,
        tiny.latents(),
        layers=LAYERS,
        loss=lambda maps: method.loss(maps[:, rows[0]], context).sum(),
        sizes=[method.scale] * 2,
        steps=4,
        bounds={1: -1e9 if bound is None else bound},
        max_refinements=2,
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert len(losses) == 4


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_each_alone(name: str, kind: str) -> None:
    pipe = tiny.pipeline(**KINDS[kind][0]).to(torch.float64)
    batch = guided(
        pipe,
        METHODS[name]([PAIRS, OTHER_PAIRS], max_refinements=1),
        prompt=[PROMPT, OTHER],
        count=2,
        num_inference_steps=2,
    )
    for index, (prompt, pairs) in enumerate(((PROMPT, PAIRS), (OTHER, OTHER_PAIRS))):
        alone = guided(
            pipe,
            METHODS[name]([pairs], max_refinements=1),
            prompt=prompt,
            latents=tiny.latents(1, seed=index),
            num_inference_steps=2,
        )
        torch.testing.assert_close(batch[index], alone[0], **EXACT)


def test_conform_remembers_the_step_before() -> None:
    """One-word groups move nothing at first, and from the second step on do."""
    pipe = tiny.pipeline().to(torch.float64)
    groups = [[("red",), ("blue",)]]
    options: dict[str, Any] = {"scale": 20.0, "refinement": {}, **COMMON}
    first = ac.CONFORM(groups, **{**options, "steps": 1})
    torch.testing.assert_close(guided(pipe, first, prompt=PROMPT), call(pipe, prompt=PROMPT), **EXACT)
    second = guided(pipe, ac.CONFORM(groups, **options), prompt=PROMPT)
    assert (second - call(pipe, prompt=PROMPT)).abs().max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_in_inference_mode(name: str) -> None:
    pipe = tiny.pipeline()
    method = METHODS[name]([PAIRS], max_refinements=1)
    expected = guided(pipe, method, prompt=PROMPT, num_inference_steps=2)
    with torch.inference_mode():
        assert torch.equal(guided(pipe, method, prompt=PROMPT, num_inference_steps=2), expected)
