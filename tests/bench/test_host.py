"""What the host does for an operation: kernels that are really compiled, and a driver that launches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_call_comes_to_the_driver(tmp_path: Path) -> None:
    """In a process of its own, for here kernels are interpreted."""
    pytest.importorskip("triton")
    results = tmp_path / "host.jsonl"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench", "host", "--samples", "2", "--results", str(results)]
    done = subprocess.run(
        [*command, "--only", "gaussian_bias"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["op"], row["launches"]) for row in rows] == [("gaussian_bias", 1), ("gaussian_bias_all", 2)]
    assert all(0 < row["q1"] <= row["median"] <= row["q3"] for row in rows)
    assert "2 launches" in done.stdout
    refused = subprocess.run([*command, "--only", "nothing"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "in the name of no operation" in refused.stderr
