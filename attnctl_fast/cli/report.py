"""Reports of commands: settings and versions as JSON, times, tables, reasons of errors."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._impl import resolve


def check_absent(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raise FileExistsError if one of the files is there and may not be overwritten."""
    present = next((path for path in paths if path.exists()), None)
    if present is not None and not overwrite:
        raise FileExistsError(f"{present} is there already; choose another --out, or replace it with --overwrite")


def write_report(path: Path, pipe: Any, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write as JSON how pictures were drawn and what came of it."""
    report = {
        "settings": settings | {"device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch.")},
        "pipeline": type(pipe).__name__,
        **results,
        "versions": versions(),
    }
    # The cells of a mask.
    text = json.dumps(report, indent=1, default=lambda data: hashlib.sha256(data).hexdigest())
    path.write_text(text + "\n", encoding="utf-8")
    print(path)


def versions() -> dict[str, Any]:
    """Return the versions of what computes, the processor and the threads; None for what is not installed."""
    report: dict[str, Any] = {"attnctl-fast": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "numpy"):
        try:
            report[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            report[name] = None
    report["platform"] = f"{platform.system()} {platform.machine()}"
    report["processor"] = _processor()
    report["cores"] = os.cpu_count()
    report["threads"] = torch.get_num_threads()
    report["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    report["implementation"] = resolve(None, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return report


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and quartiles of a sample, as `median`, `low`, `high`."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table as lines of text; the first row is its head, with a rule below."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def overhead(plain: Sequence[float], controlled: Sequence[float]) -> dict[str, float]:
    """Return the cost over plain sampling in percent, over pairs measured one after the other, as `spread` does."""
    pairs = zip(plain, controlled, strict=False)
    return spread([100 * (after / before - 1) for before, after in pairs])


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
