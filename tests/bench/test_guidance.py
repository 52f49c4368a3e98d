"""The measurements of guidance: on a UNet a thousandth of the size, and on a few pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "sample_size": 16,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "block_out_channels": (8, 8, 16, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_guidance_against_diffusers(
    bench: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import architectures
    import guidance

    monkeypatch.setitem(architectures.CONFIGS, "sd15", SMALL)
    monkeypatch.setattr(guidance, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["guidance.py", "--side", "16", "--turns", "2"])
    guidance.main()
    (line,) = (tmp_path / "cpu_guidance.jsonl").read_text().splitlines()
    run = json.loads(line)
    assert set(run["iteration"]) == {"diffusers", "ours", "ours, whole UNet, trainable weights"}
    assert all(times["median"] > 0 for times in run["iteration"].values())
    table = capsys.readouterr().out
    assert "| diffusers |" in table
    assert "128x128 pixels" in table


def test_every_method_on_the_shapes_model(bench: None) -> None:
    import methods
    from tables import methods_table

    choices = {name: (methods.SHOWN[name][0], [{**options, "steps": 1}]) for name, options in OPTIONS.items()}
    found, results = methods.measure(methods.load_pipeline(), choices, range(2), 2, 2)
    assert [row["method"] for row in found["rows"]] == list(OPTIONS)
    assert list(results) == ["plain", *(f"{name} {i}" for i, name in enumerate(OPTIONS))]
    settings = {"count": 2, "seed_start": 0, "steps": 2, "guidance_scale": 5.0, "batch_size": 2}
    versions = {"torch": "2.0", "processor": "this"}
    table = methods_table({"settings": settings, "versions": versions, **found})
    assert "| `SynGen`: scale 1, steps 1 |" in table
    assert methods.picture(results, 1).width > 500


OPTIONS: dict[str, dict[str, Any]] = {
    "AttendAndExcite": {"scale": 2.0, "thresholds": {}},
    "SynGen": {"scale": 1.0},
    "CONFORM": {"scale": 1.0, "refinement": {}},
}
