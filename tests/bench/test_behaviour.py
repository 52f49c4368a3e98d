"""The measurement of what the methods on contexts do to pictures of the trained shapes model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from attnctl_fast.shapes import Scene, detect, load_pipeline


def test_behaviour_is_measured_in_pairs() -> None:
    """Every task on two seeds and two steps: the rates are those of its question, the pictures are drawn."""
    from bench.quality import behaviour
    from bench.report import tables

    arguments = behaviour.parser().parse_args(["--count", "2", "--steps", "2", "--batch-size", "2"])
    run: dict[str, Any] = behaviour.pairs.line(arguments, {"tasks": {}})
    pipe, rows = load_pipeline(), []
    for name, task in behaviour.TASKS.items():
        quick = replace(task, settings=task.settings[:1])
        run["tasks"][name], results = behaviour.run_task(pipe, quick, arguments, progress=False)
        for arm, rate in ((results[0], "plain"), (results[1], "rows")):
            answers = [
                task.counts(scene, [(seen.colour, seen.shape) for seen in found])
                for scene, found in zip(arm.scenes, arm.detections, strict=True)
            ]
            entry = run["tasks"][name][rate]
            assert (entry if rate == "plain" else entry[0])["rate"] == sum(answers) / 2
        assert any(
            (np.asarray(a) != np.asarray(b)).any() for a, b in zip(results[0].images, results[1].images, strict=True)
        )
        rows += behaviour.strips_of(name, task, results, 2)
    json.dumps(run)
    assert len(rows) == 2 * len(behaviour.TASKS)
    shown = tables.behaviour_table(run).splitlines()
    assert len(shown) == 2 + len(behaviour.TASKS) + 2
    assert len({line.count("|") for line in shown if line.startswith("|")}) == 1


RED = Scene((("red", "circle"),))


def test_questions_about_pictures() -> None:
    from bench.quality import behaviour

    scene = Scene((("red", "circle"), ("blue", "star")))
    red, blue, ring = ("red", "circle"), ("blue", "star"), ("cyan", "ring")
    assert behaviour.both(scene, [blue, ring, red]) and not behaviour.both(scene, [red])
    assert behaviour.only_first(scene, [red, ring]) and not behaviour.only_first(scene, [red, blue])
    (other,) = behaviour.recoloured(RED).objects
    assert other != red and other[1] == "circle"
    assert behaviour.only_recoloured(RED, [other]) and not behaviour.only_recoloured(RED, [other, ring])
    erased = behaviour.erased([scene], [3])
    pixels, mask = np.asarray(erased["image"][0]), np.asarray(erased["mask_image"][0])
    assert (pixels[mask > 0] == pixels[0, 0]).all() and 0 < (mask > 0).mean() < 0.5
    assert [(seen.colour, seen.shape) for seen in detect(erased["image"][0])] == [red]
