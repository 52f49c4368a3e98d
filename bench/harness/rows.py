"""Rows of measurements: what every one carries, and a file that they are added to one by one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from attnctl_fast.cli.report import versions
from bench.harness.checkout import git_state

Row = dict[str, Any]


def stamp(device: torch.device | str = "cpu") -> Row:
    """What every row carries: run, versions, commit, whether tracked files differ from it, device and threads."""
    state = git_state()
    device = torch.device(device)
    report = versions()
    return {
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "git": state and state.removesuffix("-dirty"),
        "dirty": state is not None and state.endswith("-dirty"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else report["processor"],
        "threads": torch.get_num_threads(),
        "versions": report,
    }


class Log:
    """The rows of one run, each in the file as soon as it is written, so that an interrupted run keeps what it has."""

    def __init__(self, path: Path | None, common: Row) -> None:
        """`path`: the file to append to, None for none; `common`: what every row starts with.

        Raises:
            OSError: the file cannot be written.
        """
        self.path, self.common = path, common
        self.rows: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                # A kill may have cut off the last row.
                if file.tell() and file.seek(-1, os.SEEK_END) is not None and file.read() != b"\n":
                    file.write(b"\n")

    def write(self, row: Row) -> None:
        self.rows.append({**self.common, **row})
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, the oldest first, without those that a kill cut off."""
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def device(row: Row) -> str:
    """Of a row of the suite or of `gpu.py`."""
    return row["gpu"] if "gpu" in row else row["device"]


def on_gpu(row: Row) -> bool:
    return device(row) in row["versions"].get("gpus", "").split(", ")


def moment(row: Row) -> str:
    """When a row's run began."""
    return row["date"] if "date" in row else row["run"]
