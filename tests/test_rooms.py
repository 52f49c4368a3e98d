"""Imports run downwards, without a cycle, those of types included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "attnctl_fast"
# What a room may import, of the others.
BELOW = {
    "cli": {"attach", "methods", "ops", "shapes"},
    "evaluate": {"cli", "attach", "methods", "ops", "shapes"},
    "methods": {"attach", "ops"},
    "attach": {"ops"},
    "ops": set(),
    "shapes": {"methods", "ops"},
}


def modules() -> dict[str, ast.Module]:
    paths = {path: path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py")}
    names = {path: ".".join(part for part in short.parts if part != "__init__") for path, short in paths.items()}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def imported(name: str, tree: ast.Module, known: set[str], *, lazily: bool) -> set[str]:
    """The modules of the package that a module imports, at its top level and for types, or within functions as well."""
    package = (ROOT / name.replace(".", "/")).is_dir()
    found = set()
    top = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]
    nodes = ast.walk(tree) if lazily else (node for body in top for node in body)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".") if name else []
            base = parts[: len(parts) - node.level + package]
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for one in node.names:
                whole = f"{source}.{one.name}".strip(".")
                found.add(whole if whole in known else source)
    return {one for one in found if one and one != name}


def test_no_cycle() -> None:
    trees = modules()
    # The package itself imports nothing but lazily, and `ops/__init__` all operations.
    graph = {name: imported(name, tree, set(trees), lazily=False) for name, tree in trees.items() if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_rooms_import_only_what_lies_below() -> None:
    trees = modules()
    for name, tree in trees.items():
        room = name.partition(".")[0]
        if room not in BELOW:
            continue
        rooms = {one.partition(".")[0] for one in imported(name, tree, set(trees), lazily=True)} & set(BELOW)
        assert rooms - {room} <= BELOW[room], f"{name} imports {sorted(rooms - {room} - BELOW[room])}"


def test_attach_names_no_method() -> None:
    from attnctl_fast import methods

    names = {name for name in methods.__all__ if name not in ("Edited", "Method", "Run")}
    for path in (ROOT / "attach").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & names, f"{path.name} names {used & names}"
