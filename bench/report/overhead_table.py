"""The overhead table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness.rows import Row
from bench.pictures.overhead_rows import KIND, told_apart
from bench.report.markdown import table


def overhead_table(rows: Sequence[Row]) -> str:
    """The rows of one run of `bench overhead` as a Markdown table with its settings below."""
    rows = [row for row in rows if row["kind"] == KIND]
    memory = any(row.get("extra_mb") is not None for row in rows)
    header = ["method", "form", "s added to a step", "s to 50 steps", "share of plain sampling"]
    header += [*(["extra memory"] if memory else []), "in the paper", "off ours"]
    return table(header, (_cells(row, memory) for row in rows if row["form"] != "plain"), _settings(rows))


def _cells(row: Row, memory: bool) -> list[str]:
    paper = row["published_percent"]
    figure = f"+{paper:g} %" if paper is not None and row["form"] == "published" else ""
    name = [f"`{row['method']}`", row["form"]]
    if "failed" in row:
        return [*name, f"failed: {row['failed']}".replace("|", "\\|"), "", "", *([""] if memory else []), figure, ""]
    extra = [f"{row['extra_mb']:+.0f} MB" if row["extra_mb"] is not None else ""] if memory else []
    values = [_interval(row[key], unit) for key, unit in (("step", ""), ("image", ""), ("percent", " %"))]
    return [*name, *values, *extra, figure, _off(row["difference"])]


def _interval(value: dict[str, float], unit: str) -> str:
    low, middle, high = (figure(value[key]) for key in ("low", "middle", "high"))
    if not told_apart(value):
        return f"not distinguishable from zero ({low} to {high}{unit})"
    return f"{middle}{unit} ({low} to {high})"


def figure(value: float) -> str:
    """With its sign, to two digits or whole."""
    return f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+#.2g}".rstrip(".")


def _off(difference: dict[str, float | None] | None) -> str:
    if difference is None:
        return ""
    if "loss_percent" in difference:
        return f"chaotic: loss differs by {difference['loss_percent']:.1g} %"
    return f"{difference['latent']:.1g} of {difference['effect']:.1g}"


def _settings(rows: Sequence[Row]) -> str:
    first = rows[0]
    sources = sorted({row["source"] for row in rows if row.get("source")})
    commit = f"{first['git']}{' and uncommitted changes' if first['dirty'] else ''}" if first["git"] else "unknown"
    plain = next((row["step"]["middle"] for row in rows if row["form"] == "plain"), None)
    measured = [row for row in rows if "rounds" in row]
    steps = dict.fromkeys(f"{row['method']} {row['edited']}" for row in measured)
    few = "; Student's t below six rounds" if not all(row["ranks"] for row in measured) else ""
    rounds = (
        f"{min(row['rounds'] for row in measured)} to {max(row['rounds'] for row in measured)}" if measured else "no"
    )
    how = "with all that a form does not touch standing still" if first["still"] else "of whole evaluations"
    return (
        f"{_place(first)}, batch {first['batch']}, DDIM, guidance, without refinement; {first['dtype']}"
        f"{', compiled but for published and diffusers' if first['compile'] else ''}; without encoding and decoding. "
        f"A plain step takes {plain:.3g} s. Added: the middle of {rounds} rounds in turn with plain steps, {how}, and "
        f"the 95 % interval of the paired differences by signed ranks{few}. A step is one in which the method is at "
        f"work; of 50 these are by default: {', '.join(steps)}. Off ours: the largest difference of a latent after a "
        f"step, of what the method itself changes. {first['device']}, {first['threads']} threads, torch "
        f"{first['versions']['torch']}, commit {commit}." + (f" In the paper: {'; '.join(sources)}." if sources else "")
    )


def _place(row: Row) -> str:
    weights = "trained weights" if row["arch"] == "shapes" else "random weights"
    return f"{row['arch']}, {weights}, {row['size']}x{row['size']} pixels"


def speed_table(rows: Sequence[Row]) -> str:
    """The same for the README: the share of plain sampling that each form of a method adds to 50 steps."""
    rows = [row for row in rows if row["kind"] == KIND]
    header = ["method", "published", "stock PyTorch", "ours", "in the paper"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["form"] != "plain"):
        forms = {row["form"]: row for row in rows if row["method"] == method}
        cells = [_share(forms[form]) if form in forms else "" for form in ("published", "stock", "ours")]
        paper = next(iter(forms.values()))["published_percent"]
        lines.append([f"`{method}`", *cells, f"+{paper:g} %" if paper is not None else ""])
    first, sources = rows[0], dict.fromkeys(row["source"] for row in rows if row.get("source"))
    below = (
        f"Added to 50 steps of plain sampling: {_place(first)}, {first['dtype']}, {first['device']}, "
        f"{first['threads']} threads; from a to b: not distinguishable from zero. In the paper: {'; '.join(sources)}."
    )
    return table(header, lines, below, left=1)


def _share(row: Row) -> str:
    if "failed" in row:
        return "failed"
    low, middle, high = (figure(row["percent"][key]) for key in ("low", "middle", "high"))
    return f"{middle} %" if told_apart(row["percent"]) else f"{low} to {high} %"
