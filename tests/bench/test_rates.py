"""The measurement behind the README's rates, and the README's tables against the result files."""

import json
from pathlib import Path

import pytest

from attnctl_fast.shapes import load_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    from bench.quality import rates
    from bench.report import tables

    yield rates, tables


def change(plain, controlled, gained, lost, p_value):
    return {"plain": plain, "controlled": controlled, "gained": gained, "lost": lost, "p_value": p_value}


RUN = {
    "settings": {
        "count": 300,
        "seed_start": 0,
        "objects": 2,
        "steps": 25,
        "guidance_scale": 5.0,
        "batch_size": 8,
        "scheduler": "DDIMScheduler",
    },
    "versions": {"torch": "2.13.0", "gpus": "none", "processor": "A Processor", "threads": 2},
    "plain": {"strict": 0.5, "exact": 0.25, "colours": 0.75, "seconds_per_image": {"median": 0.25}},
    "rows": [
        {
            "method": "AttentionRegulation",
            "options": {"strength": 0.5, "layers": ["down_blocks.0", "up_blocks.2"]},
            "strict": change(0.5, 0.625, 50, 13, 3.1e-6),
            "exact": change(0.25, 0.3, 20, 5, 0.00408),
            "colours": change(0.75, 0.75, 3, 3, 1.0),
            "seconds_per_image": {"median": 0.2754},
            "overhead_percent": {"median": 9.6, "low": 8.0, "high": 11.0},
        }
    ],
}


def test_table_shows_rates_and_settings(bench):
    _, tables = bench
    lines = tables.rates_table(RUN).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == lines[3].count("|") == 7
    assert lines[2] == "| plain | 50.0 % | 25.0 % | 75.0 % | 0.250 |  |"
    assert lines[3] == (
        "| `AttentionRegulation`: strength 0.5, layers `down_blocks.0` and `up_blocks.2` | 62.5 % (+50 -13, p = 3e-06) "
        "| 30.0 % (+20 -5, p = 0.0041) | 75.0 % (+3 -3, p = 1) | 0.275 | +10 % |"
    )
    assert lines[5].startswith(
        "300 prompts of 2 objects, seeds 0 to 299, DDIM 25 steps, guidance 5, batches of 8 in turn; "
    )
    assert "A Processor, 2 threads" in lines[5]


def test_fill_replaces_what_stands_between_the_marks(bench, monkeypatch):
    _, tables = bench
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "1", "two": lambda: "2\n2"})
    text = "a\n<!-- table:one -->\nold\n<!-- /table -->\nb\n<!-- table:two -->\n<!-- /table -->\nc\n"
    filled = "a\n<!-- table:one -->\n1\n<!-- /table -->\nb\n<!-- table:two -->\n2\n2\n<!-- /table -->\nc\n"
    assert tables.fill(text) == filled == tables.fill(filled)
    with pytest.raises(ValueError, match="no table 'three'; the tables are one, two"):
        tables.fill("<!-- table:three -->\n<!-- /table -->")


def test_the_stated_rates_rest_on_enough_pairs_from_seed_zero_on(bench):
    _, tables = bench
    settings = tables.last_line(tables.RESULTS / "shapes_rates.jsonl")["settings"]
    assert settings["count"] >= 256 and settings["seed_start"] == 0


def test_every_run_is_appended(bench, untrained, tmp_path, capsys):
    rates, tables = bench
    path = tmp_path / "new" / "rates.jsonl"
    options = ["--weights", str(untrained), "--steps", "1", "--batch-size", "1", "--results", str(path)]
    rates.run(rates.parser().parse_args([*options, "--count", "2", "--strengths", "0.25", "1"]))
    rates.run(
        rates.parser().parse_args(
            [*options, "--count", "1", "--tune", "--layers", "down_blocks.0", "--option", "edit_steps=0.5,1"]
        )
    )
    rates.run(rates.parser().parse_args([*options, "--count", "1"]))
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert (first["settings"]["seed_start"], second["settings"]["seed_start"]) == (0, rates.pairs.TUNING_SEED)
    assert [entry["options"]["strength"] for entry in first["rows"]] == [0.25, 1.0]
    assert {tuple(entry["options"]["layers"]) for entry in first["rows"]} == {rates.LAYERS}
    assert len(second["rows"]) == 8
    assert {entry["options"]["edit_steps"] for entry in second["rows"]} == {0.5, 1.0}
    assert all(entry["options"]["layers"] == ["down_blocks.0"] for entry in second["rows"])
    assert [entry["options"]["strength"] for entry in third["rows"]] == [rates.TUNED["strength"], 1.0]
    assert {"run", "git", "versions", "plain"} <= first.keys()
    assert first["rows"][0]["count"] == 2
    assert tables.rates_table(first) in capsys.readouterr().out


def test_measure_counts_pairs(bench, untrained, monkeypatch):
    rates, _ = bench
    from attnctl_fast.shapes import Detection, evaluate, scene_for_seed

    hit = [Detection(colour, shape, (0, 0, 9, 9), 1.0) for colour, shape in scene_for_seed(4).objects]
    found = [[], hit]
    monkeypatch.setattr(evaluate, "detect", lambda image: found.pop(0))
    pipe = load_pipeline(weights=untrained)
    monkeypatch.setattr(rates.pairs, "seeds", lambda arguments: range(4, 5))
    arguments = rates.parser().parse_args(["--count", "1", "--steps", "1"])
    options = {"strength": 1.0}
    results = rates.pairs.drawn(pipe, arguments, [rates.Arm(), rates.Arm(rates.regulation(**options))])
    found = rates.pairs.rates([("AttentionRegulation", options)], results)
    assert found["plain"]["strict"] == 0
    (entry,) = found["rows"]
    assert (entry["strict"]["gained"], entry["strict"]["lost"], entry["strict"]["controlled"]) == (1, 0, 1.0)
