"""The README's tables, made from the result files: python bench/tables.py [--check].

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; `TABLES` says what makes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CRITERIA = ("strict", "exact", "colours")


def last_line(path: Path) -> dict[str, Any]:
    """The newest result of a JSON-lines file."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def rates_table(run: dict[str, Any]) -> str:
    """A run of `rates.measure` as a Markdown table with its settings below."""
    settings, versions = run["settings"], run["versions"]
    header = ["", "strict", "exact", "all colours", "s per image", "overhead"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    plain = run["plain"]
    rows.append(["plain", *(_percent(plain[name]) for name in CRITERIA), _seconds(plain), ""])
    for entry in run["regulations"]:
        cells = [
            f"{_percent(entry[name]['controlled'])} (+{entry[name]['gained']} -{entry[name]['lost']}, "
            f"p = {_p_value(entry[name]['p_value'])})"
            for name in CRITERIA
        ]
        cost = entry["overhead_percent"]
        rows.append([_label(entry["options"]), *cells, _seconds(entry), f"{cost['median']:+.0f} %"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    last = settings["seed_start"] + settings["count"] - 1
    lines += [
        "",
        f"{settings['count']} prompts of {settings['objects']} objects, seeds {settings['seed_start']} to {last}, "
        f"{settings['scheduler'].removesuffix('Scheduler')} {settings['steps']} steps, guidance "
        f"{settings['guidance_scale']:g}, batches of {settings['batch_size']}; torch {versions['torch']}, "
        f"{versions['gpus'] if versions['gpus'] != 'none' else versions['processor']}, {versions['threads']} threads. "
        "Times are medians over batches, overhead the median over batches measured in turn. Strict: every prompted "
        "object is there; exact: and no other; all colours: each colour, on whichever shape; in brackets the pairs "
        "gained and lost and McNemar's exact p.",
    ]
    return "\n".join(lines)


def regulate_table(run: dict[str, Any]) -> str:
    """A run of `regulate.py` as a Markdown table with its settings below."""
    header = ["B*H", "M", "T", "d", "published loop, ms", "eager, ms", "ratio"]
    rows = [header, ["---:"] * len(header)]
    for entry in run["shapes"]:
        times = [
            f"{entry[form]['median']:.3g} ({entry[form]['q1']:.3g} to {entry[form]['q3']:.3g})"
            for form in ("published", "eager")
        ]
        sizes = [str(entry[name]) for name in ("rows", "image_tokens", "targets", "head_width")]
        rows.append([*sizes, *times, f"{entry['ratio']:.1f}"])
    versions = run["versions"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [
        "",
        "One regulated layer, float32, 77 text tokens, 20 steps: median and quartiles, each form at its better of "
        f"1 and 2 threads; torch {versions['torch']}, {versions['processor']}.",
    ]
    return "\n".join(lines)


# The table NAME of the README, from its result file; a table whose file is missing is an error.
TABLES: dict[str, Callable[[], str]] = {
    "rates": lambda: rates_table(last_line(RESULTS / "shapes_rates.jsonl")),
    "regulate": lambda: regulate_table(last_line(RESULTS / "cpu_regulate.jsonl")),
}


def fill(text: str) -> str:
    """The text with every table in it made anew.

    Raises:
        KeyError: a table that `TABLES` does not know.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table:(\w+) -->)\n.*?(<!-- /table -->)", table, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before)
    if check and before != after:
        print("README.md has a table that its result file does not give; run python bench/tables.py", file=sys.stderr)
        return 1
    if not check:
        readme.write_text(after, encoding="utf-8")
    return 0


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _seconds(entry: dict[str, Any]) -> str:
    return f"{entry['seconds_per_image']['median']:.3f}"


def _p_value(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def _label(options: dict[str, Any]) -> str:
    extras = [f"{name.replace('_', ' ')} {value:g}" for name, value in options.items() if name != "layers"]
    return f"regulation, {', '.join(extras)}, {' and '.join(f'`{layer}`' for layer in options['layers'])}"


if __name__ == "__main__":
    sys.exit(main())
