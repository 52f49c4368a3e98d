"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], below: str, left: int = 2) -> str:
    """A table with a line below; so many columns are aligned to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join([*("| " + " | ".join(row) + " |" for row in (header, rule, *rows)), "", below])
