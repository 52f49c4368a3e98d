"""The tables of README.md, docs/measurements.md and kernels/README.md, made from the result files.

    python -m bench report [--check]

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says what makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bench.harness.checkout import RESULTS, ROOT
from bench.harness.rows import read
from bench.pictures.overhead_rows import select_overhead
from bench.report.host_table import host_table
from bench.report.markdown import table as markdown
from bench.report.overhead_table import overhead_table, speed_table

RESOURCES = ROOT / "bench" / "resources.json"
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "benchmarks.md", DOCS / "measurements.md", ROOT / "kernels" / "README.md")
# The operations of a method, each family in a table of its own; the others are together in the table `ops`.
FAMILIES = {
    "regulate": ("regulated_layer",),
    "context": ("attention_with_context_gradient", "composed_attention"),
    "maps": ("attention_with_maps_guidance",),
    "similarity": ("similarity_loss",),
}
# Layers whose cost is what they add to the attention alone.
JOINT = ("joint_maps", "joint_edit")
# By operation, model, shape and dtype, the rows of its forms.
Cases: TypeAlias = dict[tuple[str, str, str, str], dict[str, dict[str, Any]]]
CRITERIA = ("strict", "exact", "colours")


def last_line(path: Path) -> dict[str, Any]:
    """The newest result of a JSON-lines file."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def rates_table(run: dict[str, Any]) -> str:
    """A line of `bench rates` or `bench methods`."""
    settings, versions, plain = run["settings"], run["versions"], run["plain"]
    rows = [["plain", *(_percent(plain[name]) for name in CRITERIA), f"{plain['seconds_per_image']['median']:.3f}", ""]]
    for row in run["rows"]:
        title = f"`{row['method']}`" + (f": {_options(row['options'])}" if row["options"] else "")
        rates = [f"{_percent(row[name]['controlled'])} ({_pairs(row[name])})" for name in CRITERIA]
        seconds, cost = row["seconds_per_image"]["median"], row["overhead_percent"]["median"]
        rows.append([title, *rates, f"{seconds:.3f}", f"{cost:+.0f} %"])
    header = ["method", "strict", "exact", "all colours", "s per image", "overhead"]
    below = (
        f"{settings['count']} prompts of {settings['objects']} objects, {_seeds(settings)}, "
        f"{settings['scheduler'].removesuffix('Scheduler')} {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, batches of {settings['batch_size']} in turn; torch {versions['torch']}, "
        f"{versions['gpus'] if versions['gpus'] != 'none' else versions['processor']}, {versions['threads']} threads. "
        "Times are medians over batches. Strict: every prompted object is there; exact: and no other; all colours: "
        f"each colour, on whichever shape. {PAIRS}"
    )
    return markdown(header, rows, below, left=1)


def behaviour_table(run: dict[str, Any]) -> str:
    """A line of `bench behaviour`."""
    settings, versions = run["settings"], run["versions"]
    rows = [
        [
            f"{name}: {_options(row['options'])}",
            f"{task['question']} (without: {task['base']})",
            _percent(task["plain"]["rate"]),
            f"{_percent(row['rate'])} ({_pairs(row)})",
            f"{row['overhead_percent']['median']:+.0f} %",
        ]
        for name, task in run["tasks"].items()
        for row in task["rows"]
    ]
    below = (
        f"{settings['count']} pairs each, {_seeds(settings)}, DDIM {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}; torch {versions['torch']}, {versions['processor']}. {PAIRS}"
    )
    return markdown(["", "question", "without", "with", "overhead"], rows, below)


PAIRS = "In brackets the pairs gained and lost and McNemar's exact p."


def _pairs(row: dict[str, Any]) -> str:
    value = row["p_value"]
    return f"+{row['gained']} -{row['lost']}, p = {value:{'.2g' if value >= 1e-4 else '.0e'}}"


def _seeds(settings: dict[str, Any]) -> str:
    return f"seeds {settings['seed_start']} to {settings['seed_start'] + settings['count'] - 1}"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in options.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} {value['value']:g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return " and ".join(f"`{one}`" for one in value)
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def operations_table(path: Path, family: str | None) -> str:
    """Of a file of `bench ops`, the operations of a family as a Markdown table with its settings below; None: those of
    no family."""
    named = {name for names in (*FAMILIES.values(), JOINT) for name in names}
    cases = {
        case: forms
        for case, forms in _cases(path).items()
        if "eager" in forms and (case[0] in FAMILIES[family] if family else case[0] not in named)
    }
    header = ["", "shape", "eager, ms", "stock PyTorch's best, ms", "ratio", "as published, ms", "ratio"]
    rows = []
    for (op, model, shape, dtype), forms in cases.items():
        times = _times(forms)
        where = f"{model} {shape}" + (f" {dtype}" if dtype != "float32" else "")
        cells = [f"`{op}`", where, str(times["eager"]), *_best(_stock(times), times["eager"])]
        rows.append(cells + _best({"": times["published"]} if "published" in times else {}, times["eager"]))
    return markdown(header, rows, _how_measured(cases))


def joint_table(path: Path) -> str:
    """Of a file of `bench ops`, layers of joint attention as a Markdown table, beside stock attention alone."""
    cases = {case: forms for case, forms in _cases(path).items() if case[0] in JOINT and "eager" in forms}
    header = ["", "shape", "eager, ms", "attention alone, ms", "added", "stock PyTorch's best, ms", "ratio"]
    rows = []
    for (op, model, shape, _), forms in cases.items():
        times = _times(forms)
        ours, alone = times["eager"], min(times[name] for name in times if name.startswith("plain"))
        added = f"{100 * (ours.middle / alone.middle - 1):+.1f} %"
        rows.append([f"`{op}`", f"{model} {shape}", str(ours), str(alone), added, *_best(_stock(times), ours)])
    return markdown(header, rows, _how_measured(cases))


def _how_measured(cases: Cases) -> str:
    """Return what a table of `bench ops` says of its figures."""
    shown = [row for forms in cases.values() for row in forms.values()]
    compiled = any(row["impl"] in ("torch.compile", "FlexAttention") for row in shown)
    places = dict.fromkeys(
        f"torch {row['versions']['torch']}, {row['device']}, commit {row['git']}"
        + ("-dirty" if row["dirty"] else "")
        + (", a quick run" if row["quick"] else "")
        for row in shown
    )
    return (
        "float32 where nothing else is said, medians and quartiles, each form at its better of 1 and 2 threads; ratios "
        f"are to eager's median, and stock PyTorch is {'with' if compiled else 'without'} torch.compile; "
        f"{'; '.join(places)}."
    )


def _cases(path: Path) -> Cases:
    """By operation, model, shape and dtype the timed forms of the newest run with that case, of those that were not
    quick if there is one."""
    best: dict[tuple[str, str, str, str], tuple[bool, str]] = {}
    found: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for row in read(path):
        if "median" not in row:
            continue
        case, run = (row["op"], row["model"], row["shape"], row["dtype"]), (not row["quick"], row["run"])
        if run > best.get(case, (False, "")):
            best[case], found[case] = run, {}
        if run == best[case]:
            found[case][row["impl"]] = row
    return found


class Times(NamedTuple):
    """A median and what it lies between."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3g} ({self.low:.3g} to {self.high:.3g})"


def _times(forms: Mapping[str, Mapping[str, Any]]) -> dict[str, Times]:
    return {name: Times(row["median"], row["q1"], row["q3"]) for name, row in forms.items()}


def _stock(forms: Mapping[str, Times]) -> dict[str, Times]:
    """Those of a GPU's or a CPU's forms that an expert may write in PyTorch, on a CPU beside ours."""
    others = ("published", "plain", "reference", "eager" if "triton" not in forms else "triton")
    return {name: times for name, times in forms.items() if not name.startswith(others)}


def _best(rivals: Mapping[str, Times], ours: Times, digits: int = 2) -> list[str]:
    """The fastest rival and the ratio of its time to ours; empty where there is none."""
    if not rivals:
        return ["", ""]
    name = min(rivals, key=lambda name: rivals[name].middle)
    return [f"{rivals[name]} {name}".rstrip(), f"{rivals[name].middle / ours.middle:.{digits}f}"]


def gpu_table(folder: Path) -> str:
    """The last run of `bench gpu` on every GPU, float16, each as a Markdown table with its settings below."""
    runs = (_last_gpu_run(path) for path in sorted(folder.glob("*.jsonl")))
    found = [_gpu_run(run) for run in runs if run]
    if not found:
        return "No GPU was at hand yet, so there is no figure for one; `python -m bench gpu` measures them."
    return "\n\n".join(found)


def _last_gpu_run(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the last run in a file of `bench gpu` that timed anything; none of another file."""
    rows = [row for row in read(path) if "gpu" in row]
    last = max((row["date"] for row in rows if row["kind"] == "time"), default=None)
    return [row for row in rows if row["date"] == last]


def _gpu_run(run: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for line in run:
        # What was timed again with the tuned configurations comes later.
        if line["kind"] == "time" and line.get("dtype") == "float16" and "p50" in line:
            groups.setdefault((line["op"], line["model"], line["shape"]), {})[line["impl"]] = line
    header = ["", "shape", "kernels, us", "launched, us", "stock PyTorch's best, us", "ratio"]
    header += ["as published, us", "ratio"]
    rows = []
    for (op, model, shape), impls in groups.items():
        if "triton" not in impls:
            continue
        fastest = {name: min(_microseconds(x) for x in (row, row.get("graph")) if x) for name, row in impls.items()}
        ours, loop = _microseconds(impls["triton"]), impls.get("published")
        cells = [f"`{op}`", f"{model} {shape}", str(fastest["triton"]), str(ours)]
        cells += _best(_stock(fastest), fastest["triton"], 1)
        rows.append(cells + _best({"": _microseconds(loop)} if loop else {}, ours, 0))
    last = run[-1]
    checks = [row for row in run if row["kind"] == "check"]
    right = f"{sum('failed' not in row for row in checks)} of {len(checks)} checks right; " if checks else ""
    below = (
        f"{last['gpu']}, float16: medians with 20th and 80th percentile, in a CUDA graph where that is faster; launched"
        f" one by one, with the host's time, in the fourth column and as published. {right}copy "
        f"{last['copy_gb_per_s']:.0f} GB/s; torch {last['versions']['torch']}, triton {last['versions']['triton']}, "
        f"commit {last['git']}."
    )
    return markdown(header, rows, below)


def _microseconds(times: Mapping[str, Any]) -> Times:
    return Times(times["p50"], times["p20"], times["p80"])


def resources_table(path: Path) -> str:
    """bench/resources.json as a Markdown table: per kernel and target, the most that a shipped variant takes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    targets = list(content["kernels"])
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for target, entries in content["kernels"].items():
        for name, values in entries.items():
            found = dict(zip(content["fields"], values, strict=True))
            kernels.setdefault(name.partition(":")[0], {}).setdefault(target, []).append(found)
    rows = []
    for kernel, by_target in sorted(kernels.items()):
        cells = []
        for target in targets:
            most = {field: max(x[field] for x in by_target[target]) for field in content["fields"] if field != "key"}
            cells.append(f"{most['registers']}, {most['shared'] / 1024:.0f}, {most['spilled']}")
        rows.append([f"`{kernel}`", str(max(map(len, by_target.values()))), *cells])
    below = f"Registers per thread, KiB of shared memory, bytes spilled; Triton {content['triton']}."
    return markdown(["kernel", "variants", *targets], rows, below, left=1)


# The table NAME of a page, from its result file; a table whose file is missing is an error.
TABLES: dict[str, Callable[[], str]] = {
    "rates": lambda: rates_table(last_line(RESULTS / "shapes_rates.jsonl")),
    "behaviour": lambda: behaviour_table(last_line(RESULTS / "shapes_behaviour.jsonl")),
    "overhead": lambda: overhead_table(select_overhead(read(RESULTS / "overhead.jsonl"))),
    "speed": lambda: speed_table(select_overhead(read(RESULTS / "overhead.jsonl"))),
    "methods": lambda: rates_table(last_line(RESULTS / "shapes_methods.jsonl")),
    "methods_mmdit": lambda: rates_table(last_line(RESULTS / "shapes_methods_mmdit.jsonl")),
    "gpu": lambda: gpu_table(RESULTS),
    **{name: partial(operations_table, RESULTS / "ops_cpu.jsonl", name) for name in FAMILIES},
    "joint": lambda: joint_table(RESULTS / "joint_cpu.jsonl"),
    "ops": lambda: operations_table(RESULTS / "ops_cpu.jsonl", None),
    "host": lambda: host_table(read(RESULTS / "host.jsonl")),
    "resources": lambda: resources_table(RESOURCES),
}


def fill(text: str) -> str:
    """The text with every table in it made anew.

    Raises:
        ValueError: a table that `TABLES` does not know.
        OSError: a table's result file is missing.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; the tables are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table:(\w+) -->)\n.*?(<!-- /table -->)", table, text, flags=re.S)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true", help="change nothing; fail when a table is out of date")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Make the tables of all pages anew. 1 if `--check` finds one out of date, else 0.

    Raises:
        ValueError, OSError: as `fill`; no page is changed then.
    """
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: fill(text) for page, text in before.items()}
    stale = [page for page in PAGES if before[page] != after[page]]
    for page in stale:
        if arguments.check:
            name = page.relative_to(ROOT)
            print(f"{name} has a table that its result file does not give; run python -m bench report", file=sys.stderr)
        else:
            page.write_text(after[page], encoding="utf-8")
    return int(arguments.check and bool(stale))


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
