"""Running a file of pytest-benchmark measurements and keeping their result."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import RESULTS, append, git_state

from attnctl_fast._report import versions


def record(
    file: str, name: str, summary: Callable[[dict[str, Any]], list[dict[str, Any]]], table: Callable[[Any], str]
) -> None:
    """Run the measurements in `file`, append what `summary` makes of the report to bench/results/`name`, print it as a
    table.

    Raises:
        SystemExit: a measurement failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = pytest.main([file, "-q", "--no-header", f"--benchmark-json={report}"])
        if code:
            raise SystemExit(code)
        rows = summary(json.loads(report.read_text(encoding="utf-8")))
    run = {"date": time.strftime("%Y-%m-%d"), "git": git_state(), "versions": versions(), "shapes": rows}
    append(RESULTS / name, run)
    print(table(run))
