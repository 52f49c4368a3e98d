"""The table of what the host does for an operation, from the rows of `bench host`."""

from __future__ import annotations

from collections.abc import Iterable

from bench.harness.rows import Row

BEFORE = "before"


def host_table(rows: Iterable[Row]) -> str:
    """The newest run as a Markdown table beside the newest one that is labelled `before`, with its settings below."""
    runs: dict[bool, list[Row]] = {}
    for row in rows:
        kept = runs.setdefault(row["label"] == BEFORE, [])
        if kept and kept[0]["run"] != row["run"]:
            kept.clear()
        kept.append(row)
    now, before = ({(row["op"], row["impl"]): row for row in runs[old] if "median" in row} for old in (False, True))
    lines = ["| | launches | before, us | now, us | before / now |", "| --- | ---: | ---: | ---: | ---: |"]
    launched = [(before[case], row) for case, row in now.items() if row["impl"] == "triton" and case in before]
    for old, row in launched:
        cells = [f"`{row['op']}`", row["launches"], _microseconds(old), _microseconds(row), _ratio(old, row)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    old, last = launched[-1]
    versions = last["versions"]
    tiny = " and ".join(
        f"{_ratio(run['attention', 'eager'], run['attention', 'SDPA'])} times {name}"
        for name, run in (("before", before), ("now", now))
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Medians and quartiles of thread time per call at {last['shape']}, {last['dtype']}; before: commit "
            f"{old['git']}. Eager attention of tiny tensors on a CPU takes {tiny} what SDPA takes. torch "
            f"{versions['torch']}, triton {versions['triton']}, {last['device']}, commit {last['git']}.",
        ]
    )


def _microseconds(row: Row) -> str:
    return f"{row['median']:.3g} ({row['q1']:.3g} to {row['q3']:.3g})"


def _ratio(one: Row, other: Row) -> str:
    return f"{one['median'] / other['median']:.1f}"
