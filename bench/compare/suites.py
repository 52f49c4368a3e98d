"""The tests of an operation: a faster operation counts only while they pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# What the registry times as a whole.
PARTS = {
    "regulated_layer": ("target_statistics", "regulate", "merge_targets"),
    "joint_maps": ("attention", "maps_from_lse"),
    "joint_edit": ("target_statistics", "merge_targets"),
}


def functions(operation: str) -> tuple[str, ...]:
    """The functions of `attnctl_fast.ops` that an entry of the registry runs."""
    return PARTS.get(operation, (re.sub("_(all|edit)$|(?<=_maps)_guidance$", "", operation),))


def suites(root: Path, operation: str) -> list[Path]:
    """The files of operation tests in the checkout at `root` that call the operation or name it in their tables."""
    names = re.compile("|".join(rf"\bops\.{name}\b|\"{name}\"|\b{name}\(" for name in functions(operation)))
    files = sorted((root / "tests" / "ops").glob("test_*.py"))
    return [file for file in files if names.search(file.read_text(encoding="utf-8"))]


def refusal(root: Path, operation: str) -> str | None:
    """Why the operation's tests vouch for nothing, None where they pass."""
    files = suites(root, operation)
    if not files:
        return f"no file tests/ops/test_*.py names {functions(operation)[0]}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *map(str, files)]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"its tests fail: {said[0] if said else f'pytest ended with status {done.returncode}'}"
