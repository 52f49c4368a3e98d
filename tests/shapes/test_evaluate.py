"""Paired evaluation: pairing, seeds, counting and McNemar's test, on stand-ins for the pipeline."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnctl_fast._impl import resolve
from attnctl_fast.shapes import Scene, Score, detect, evaluate, render, scene_for_seed, score
from attnctl_fast.shapes.evaluate import Arm, Comparison, Evaluation, compare, interleaved, mcnemar, regulation


class Draughtsman:
    """Draws what the prompts ask for, except the last object of every prompt whose first noise value is negative."""

    def __init__(self):
        self.calls = []
        self.controlled_by = ()
        self.set_progress_bar_config(desc="own")

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    def __call__(self, prompts, *, num_inference_steps, guidance_scale, generator):
        noise = [torch.randn(3, generator=each) for each in generator]
        self.calls.append(
            SimpleNamespace(
                prompts=prompts,
                noise=noise,
                steps=num_inference_steps,
                guidance_scale=guidance_scale,
                controlled_by=self.controlled_by,
                impl=resolve(None, torch.device("cpu")),
                bar=self._progress_bar_config,
            )
        )
        images = []
        for prompt, values in zip(prompts, noise, strict=True):
            objects = [tuple(words.split()[1:]) for words in prompt.split(" and ")]
            if values[0] < 0 and len(objects) > 1 and not self.controlled_by:
                objects.pop()
            images.append(render(Scene(objects), seed=len(self.calls)).image)
        return SimpleNamespace(images=images)


@pytest.fixture
def pipe(monkeypatch):
    @contextmanager
    def control(pipe, *methods):
        pipe.controlled_by = methods
        try:
            yield
        finally:
            pipe.controlled_by = ()

    monkeypatch.setattr(evaluate, "control", control)
    return Draughtsman()


def first_noise(seed):
    return torch.randn(3, generator=torch.Generator().manual_seed(seed))


def test_evaluate_draws_the_scene_of_every_seed_from_its_own_noise(pipe):
    result = evaluate.evaluate(
        pipe, range(10, 21), batch_size=4, num_inference_steps=7, guidance_scale=3.0, progress=False
    )
    assert [len(call.prompts) for call in pipe.calls] == result.batch_sizes == [4, 4, 3]
    assert result.seeds == list(range(10, 21))
    prompts = [prompt for call in pipe.calls for prompt in call.prompts]
    assert prompts == [scene_for_seed(seed).prompt for seed in range(10, 21)]
    for seed, noise in zip(result.seeds, (noise for call in pipe.calls for noise in call.noise), strict=True):
        assert torch.equal(noise, first_noise(seed))
    assert {(call.steps, call.guidance_scale) for call in pipe.calls} == {(7, 3.0)}


def test_evaluate_scores_what_the_detector_finds(pipe):
    result = evaluate.evaluate(pipe, range(12), progress=False)
    for seed, scene, image, found, marks in zip(
        result.seeds, result.scenes, result.images, result.detections, result.scores, strict=True
    ):
        assert scene == scene_for_seed(seed)
        assert found == detect(image)
        assert marks == score(scene, found)
        assert marks.strict == bool(first_noise(seed)[0] >= 0)
    assert 0 < result.hits("strict") < 12
    assert len(result.seconds) == len(result.seconds_per_image) == 2
    assert result.seconds_per_image[1] == result.seconds[1] / 4


@pytest.mark.parametrize("objects", [1, 3])
def test_evaluate_with_another_number_of_objects(pipe, objects):
    result = evaluate.evaluate(pipe, [5], objects=objects, progress=False)
    assert result.scenes == [scene_for_seed(5, objects)]


def test_methods_may_depend_on_the_scenes_of_the_batch(pipe):
    evaluate.evaluate(pipe, range(3), lambda scenes: [tuple(s.nouns for s in scenes)], batch_size=2, progress=False)
    nouns = [scene_for_seed(seed).nouns for seed in range(3)]
    assert [call.controlled_by for call in pipe.calls] == [((nouns[0], nouns[1]),), ((nouns[2],),)]
    evaluate.evaluate(pipe, [0], ["one", "two"], progress=False)
    assert pipe.calls[-1].controlled_by == ("one", "two")


def test_regulation_targets_the_nouns_in_the_layers_of_the_model():
    scenes = [scene_for_seed(seed) for seed in range(2)]
    (method,) = regulation()(scenes)
    assert [tuple(row) for row in method.targets] == [scene.nouns for scene in scenes]
    assert {name: getattr(method, name) for name in evaluate.TUNED} == evaluate.TUNED
    (method,) = regulation(strength=0.125, layers=["down_blocks.0"])(scenes)
    assert (tuple(method.layers), method.strength) == (("down_blocks.0",), 0.125)
    assert (method.mass, method.quantile) == (None, 0.9)


def test_arms_take_turns(pipe):
    arms = {"a": Arm(), "b": Arm(["b"]), "c": Arm(["c"], impl="reference", batches=1)}
    results = interleaved(pipe, range(6), arms, batch_size=2, progress=False)
    order = [call.controlled_by for call in pipe.calls]
    assert order == [(), ("b",), ("c",), ("b",), (), (), ("b",)]
    assert [call.impl for call in pipe.calls] == ["reference" if by == ("c",) else "eager" for by in order]
    assert results["a"].seeds == results["b"].seeds == list(range(6)) and results["c"].seeds == [0, 1]
    assert [len(results[name].seconds) for name in arms] == [3, 3, 1]


def test_warm_up_is_not_counted(pipe):
    results = interleaved(pipe, range(4), {"a": Arm(), "b": Arm(["b"])}, batch_size=2, warm_up=True, progress=False)
    # Of all steps, for a method may act in a late one only.
    assert {call.steps for call in pipe.calls} == {25}
    assert [len(call.prompts) for call in pipe.calls] == [1, 1, 2, 2, 2, 2]
    assert [len(result.images) for result in results.values()] == [4, 4]


def test_the_progress_bar_of_the_pipeline_is_off_meanwhile_and_restored(pipe, capsys):
    evaluate.evaluate(pipe, [0, 1])
    assert pipe.calls[0].bar == {"desc": "own", "disable": True}
    assert pipe._progress_bar_config == {"desc": "own"}
    assert "2/2" in capsys.readouterr().err
    evaluate.evaluate(pipe, [0, 1], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seeds", [[], [1, 2, 1]])
def test_seeds_must_be_distinct(pipe, seeds):
    with pytest.raises(ValueError, match="seeds must be distinct"):
        evaluate.evaluate(pipe, seeds)
    assert pipe.calls == []


def test_batch_size_must_be_positive(pipe):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate.evaluate(pipe, [1], batch_size=0)


def scored(marks, seeds=None):
    seeds = list(range(len(marks))) if seeds is None else seeds
    scores = [Score(strict, exact, colours) for strict, exact, colours in marks]
    return Evaluation(scores=scores, seeds=seeds, scenes=[scene_for_seed(seed) for seed in seeds])


def test_compare_counts_every_criterion_by_pairs():
    yes, no = True, False
    plain = scored([(no, no, no), (no, no, yes), (yes, yes, yes), (yes, no, yes), (no, no, no)])
    after = scored([(yes, no, yes), (yes, yes, yes), (no, no, yes), (yes, yes, no), (no, no, yes)])
    result = compare(plain, after)
    assert isinstance(result, Comparison) and result.count == 5
    strict, exact, colours = result.strict, result.exact, result.colours
    assert (strict.plain, strict.controlled, strict.gained, strict.lost) == (0.4, 0.6, 2, 1)
    assert (exact.plain, exact.controlled, exact.gained, exact.lost) == (0.2, 0.4, 2, 1)
    assert (colours.plain, colours.controlled, colours.gained, colours.lost) == (0.6, 0.8, 2, 1)
    assert strict.p_value == mcnemar(2, 1) == 1.0


def test_compare_refuses_what_is_not_paired():
    marks = [(True, True, True)] * 2
    with pytest.raises(ValueError, match="not pairs"):
        compare(scored(marks), scored(marks, seeds=[0, 2]))
    with pytest.raises(ValueError, match="not pairs"):
        compare(scored(marks), scored(marks[:1]))


def test_a_pipeline_that_forgets_objects_gains_from_one_that_does_not(pipe):
    plain = evaluate.evaluate(pipe, range(16), progress=False)
    after = evaluate.evaluate(pipe, range(16), ["better"], progress=False)
    change = compare(plain, after).strict
    forgotten = sum(bool(first_noise(seed)[0] < 0) for seed in range(16))
    assert (change.gained, change.lost, change.controlled) == (forgotten, 0, 1.0)


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(gained, lost, expected):
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_a_symmetric_probability(gained, lost):
    value = mcnemar(gained, lost)
    assert 0 < value <= 1
    assert value == mcnemar(lost, gained)
    if abs(gained - lost) <= 1:
        assert value == 1
    # Two-sided: twice the one tail, summed here from the other end.
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(max(gained, lost), changed + 1))
    assert value == pytest.approx(min(1.0, 2 * tail / 2**changed))
