"""Registers, spills, shared memory, largest loop and code of every kernel at its shipped configurations, without a GPU.

    python -m bench resources                   print the table
    python -m bench resources --check           fail on any spill, on shared memory over a target's limit, and on growth
                                                over bench/resources.json, by the Triton of that, beyond `MARGINS`
    python -m bench resources --update          rewrite bench/resources.json
    python -m bench resources --only NAME       kernels or cases whose name contains NAME
    python -m bench resources --script FILE     the launches that a Python file makes, instead of the shipped cases

Every case runs the public operations on CPU tensors with kernels/_launch.py recording, so what is compiled is what they
would launch: at the configurations of default.json for every target, at those of a <gpu>.json for that GPU's target.
A figure is known by the hash of all that it depends on: the sources of the kernel and of what it calls, its
specialisation, the configuration, the target, Triton's version. Only what neither the user's cache folder nor
resources.json knows is compiled; so an unchanged tree costs seconds, a change what it touches.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

import triton
from attnctl_fast.kernels import _launch

from bench.compile.cases import kernel_cases
from bench.compile.compiler import TARGETS, Cases, Job, Resources, in_parallel, recorded
from bench.harness import checkout

COMMITTED = checkout.ROOT / "bench" / "resources.json"
FIELDS = ["key", *(field.name for field in fields(Resources))]
# How far a figure may rise over the committed one of the same Triton version: a share of it, and at least so much.
MARGINS = {"registers": (0.10, 8), "shared": (0.10, 1024), "loop": (0.10, 64), "code": (0.25, 1024)}
# Target and name of a kernel at one configuration; its key and figures; the figures of many.
Place = tuple[str, str]
Entry = tuple[str, Resources]
Figures = dict[Place, Resources]


def shipped_tables() -> Iterator[tuple[str, _launch.Table | None, list[str]]]:
    """Name, rules and targets of every configuration table for a GPU: all targets for the default one, its own for one
    that `bench tune` wrote. What names no target (interpreter.json) is for no GPU."""
    yield "", None, list(TARGETS)
    for path in sorted(_launch.CONFIGS.glob("*.json")):
        target = json.loads(path.read_text(encoding="utf-8")).get("target")
        if target is not None and target not in TARGETS:
            raise ValueError(f"{path} is for {target}, which compiler.py does not know; add its limits")
        if target is not None:
            yield f" ({path.stem})", _launch.read_table(path.stem), [target]


def jobs(cases: Cases, targets: Sequence[str], only: str, errors: list[str]) -> dict[Place, Job]:
    """What has to be compiled, by target and name; a kernel that several cases share is named after the first."""
    found: dict[Place, Job] = {}
    seen = set()
    for suffix, table, table_targets in shipped_tables():
        chosen = [target for target in table_targets if target in targets]
        for name, launch in recorded(cases, table, errors):
            for target in chosen if only in name else ():
                job = Job(launch, TARGETS[target].gpu)
                if job.key in seen:
                    continue
                seen.add(job.key)
                place, number = (target, name + suffix), 2
                while place in found:
                    place, number = (target, f"{name}{suffix} #{number}"), number + 1
                found[place] = job
    return found


def measure(
    todo: dict[Place, Job], known: dict[str, Resources], processes: int, errors: list[str]
) -> tuple[Figures, int]:
    """The figures of `todo`, in its order, and how many were compiled. `known`: the committed ones by key."""
    figures = {place: known.get(job.key) or job.cached() for place, job in todo.items()}
    places = [place for place, found in figures.items() if found is None]
    for index, done in in_parallel([todo[place].measure for place in places], processes):
        if isinstance(done, Resources):
            figures[places[index]] = done
        else:
            errors.append(f"{' '.join(places[index])}: {done}")
    return {place: found for place, found in figures.items() if found is not None}, len(places)


def read_committed() -> tuple[str, dict[Place, Entry]]:
    """Triton's version and the entries of resources.json; none where it is missing or holds other figures."""
    content = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.is_file() else {}
    if content.get("fields") != FIELDS:
        return "", {}
    entries = {
        (target, name): (key, Resources(*figures))
        for target, kernels in content["kernels"].items()
        for name, (key, *figures) in kernels.items()
    }
    return content["triton"], entries


def write_committed(figures: Figures, todo: dict[Place, Job]) -> None:
    """Write resources.json, one kernel per line."""
    targets = []
    for target in TARGETS:
        lines = [
            f"   {json.dumps(name)}: {json.dumps([todo[target, name].key, *astuple(found)])}"
            for (where, name), found in sorted(figures.items())
            if where == target
        ]
        targets.append(f'  "{target}": {{\n' + ",\n".join(lines) + "\n  }")
    head = f'{{\n "triton": "{triton.__version__}",\n "fields": {json.dumps(FIELDS)},\n "kernels": {{\n'
    COMMITTED.write_text(head + ",\n".join(targets) + "\n }\n}\n", encoding="utf-8")


def over_limits(figures: Figures) -> Iterator[str]:
    """Spills, and shared memory over a target's limit."""
    for (target, name), found in figures.items():
        if found.spilled:
            yield f"{target} {name}: spills {found.spilled} bytes per thread"
        _, limit, source = TARGETS[target]
        if found.shared > limit:
            yield f"{target} {name}: {found.shared} bytes of shared memory, over the limit of {limit} ({source})"


def grown(figures: Figures, committed: dict[Place, Entry]) -> Iterator[str]:
    for place in figures.keys() ^ committed.keys():
        where = "only in" if place in committed else "missing from"
        yield f"{' '.join(place)}: {where} {COMMITTED.name}; run python -m bench resources --update"
    for place in figures.keys() & committed.keys():
        now, before = figures[place], committed[place][1]
        for field, (share, least) in MARGINS.items():
            was, found = getattr(before, field), getattr(now, field)
            if found > was + max(share * was, least):
                yield f"{' '.join(place)}: {field} grew from {was} to {found}"
        if before.matrix and not now.matrix:
            yield f"{' '.join(place)}: no tensor-core instruction any more, {before.matrix} before"


def rows(figures: Figures) -> Iterator[str]:
    """The figures as a text table, the targets of a kernel under each other."""
    width = max((len(name) for _, name in figures), default=0)
    yield f"{'':{width}} {'target':>9}" + "".join(f" {field:>9}" for field in FIELDS[1:])
    for shown in dict.fromkeys(name for _, name in figures):
        for (target, name), found in figures.items():
            if name == shown:
                yield f"{name:{width}} {target:>9}" + "".join(f" {number:>9}" for number in astuple(found))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true")
    made.add_argument("--update", action="store_true")
    made.add_argument("--only", default="", metavar="NAME")
    made.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    made.add_argument("--script", type=Path, metavar="FILE")
    made.add_argument("--processes", type=int, default=2)
    return made


def run(arguments: argparse.Namespace) -> int:
    """Return 1 where `--check` finds something wrong, or a kernel does not compile.

    Raises:
        ValueError: options that do not go together, or kernels that are interpreted.
    """
    if _launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, so the kernels cannot be compiled; unset it")
    part = arguments.only or arguments.script or len(arguments.targets) < len(TARGETS)
    if part and arguments.update:
        raise ValueError("--update takes no --only, --script or --targets")

    start = time.perf_counter()
    script = arguments.script
    cases = [(script.stem, lambda: runpy.run_path(str(script)))] if script else kernel_cases()
    errors: list[str] = []
    todo = jobs(cases, arguments.targets, arguments.only, errors)
    version, committed = read_committed()
    figures, compiled = measure(todo, dict(committed.values()), arguments.processes, errors)
    if not arguments.check:
        print("\n".join(rows(figures)))
    errors += over_limits(figures)
    if arguments.update:
        write_committed(figures, todo)
    elif not part and not version:
        errors.append(f"{COMMITTED.name} is missing or holds other figures; run python -m bench resources --update")
    elif not part and version == triton.__version__:
        errors += sorted(grown(figures, committed))
    for error in errors:
        print(error, file=sys.stderr)
    seconds = time.perf_counter() - start
    spilling = sum(found.spilled > 0 for found in figures.values())
    counts = f"{len(todo)} kernels, {compiled} compiled, {spilling} spill"
    print(f"{counts}, Triton {triton.__version__}, {seconds:.0f} s", file=sys.stderr)
    return 1 if errors else 0
