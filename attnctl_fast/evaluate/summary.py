"""Sum up a sweep: one row per picture, figures per method, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..cli.report import aligned, spread
from ..shapes.evaluate import mcnemar
from .plan import PLAIN, Picture
from .store import Record, Store

_TITLES = {"strict": "strict", "exact": "exact", "colours": "all colours", "clip": "CLIP score"}


def merged(store: Store, pictures: Iterable[Picture], scorers: Iterable[str]) -> list[Record]:
    """Return the row of every picture in the order of the sweep, with what these scorers say of it.

    `score_errors` has what kept a scorer from judging it.
    """
    drawn, names = store.drawn(), set(scorers)
    scores: dict[str, Record] = {}
    judged = {
        (row["file"], row["by"]): row for row in store.records() if row["kind"] == "scores" and row["by"] in names
    }
    for (file, name), row in judged.items():
        about = scores.setdefault(file, {})
        if "error" in row:
            about.setdefault("score_errors", {})[name] = row["error"]
        else:
            about.update(row["scores"])
    rows = [(drawn.get(picture.file) or {**picture.record(), "error": "not drawn"}) for picture in pictures]
    return [
        {name: value for name, value in row.items() if name != "kind"}
        | ({} if "error" in row else scores.get(row["file"], {}))
        for row in rows
    ]


def summary(rows: Sequence[Record], methods: Sequence[str]) -> dict[str, Any]:
    """Return figures of every method.

    `pictures` and `failed` are numbers; `seconds` per picture and scores that are numbers have median and quartiles,
    the latter a mean too; of scores that are yes or no `rate` is the share of yes. `against_plain`, over the prompts
    and seeds that both have, counts for every score the pictures that are better than the plain one (`gained`) and
    worse (`lost`), with the exact p value of McNemar's test, which for numbers is the sign test.
    """
    result: dict[str, Any] = {}
    good = {method: [row for row in rows if row["method"] == method and "error" not in row] for method in methods}
    plain = {(row["place"], row["seed"]): row for row in good.get(PLAIN, [])}
    for method in methods:
        mine = good[method]
        seconds = [row["seconds"] for row in mine if row["seconds"] is not None]
        result[method] = {
            "pictures": len(mine),
            "failed": sum(row["method"] == method for row in rows) - len(mine),
            "seconds": spread(seconds) if seconds else None,
        }
        against = {}
        for name in _TITLES:
            values = [row[name] for row in mine if name in row]
            if values and isinstance(values[0], bool):
                result[method][name] = {"rate": sum(values) / len(values), "count": len(values)}
            elif values:
                result[method][name] = {"mean": statistics.fmean(values), **spread(values), "count": len(values)}
            pairs = [(plain.get((row["place"], row["seed"]), {}).get(name), row.get(name)) for row in mine]
            both = [(before, after) for before, after in pairs if before is not None and after is not None]
            if both and method != PLAIN:
                gained, lost = sum(a > b for b, a in both), sum(a < b for b, a in both)
                against[name] = {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost), "count": len(both)}
        if against:
            result[method]["against_plain"] = against
    return result


def table(figures: dict[str, Any]) -> str:
    """Lay out the summary as lines of text."""
    shown = [name for name in _TITLES if any(name in entry for entry in figures.values())]
    rows = [["method", "pictures", *(_TITLES[name] for name in shown), "s per picture"]]
    for method, entry in figures.items():
        seconds = entry["seconds"]
        time = f"{seconds['median']:.3g} ({seconds['low']:.3g} to {seconds['high']:.3g})" if seconds else ""
        failed = f" ({entry['failed']} failed)" if entry["failed"] else ""
        rows.append([method, f"{entry['pictures']}{failed}", *(_cell(entry, name) for name in shown), time])
    return "\n".join(aligned(rows))


def _cell(entry: dict[str, Any], name: str) -> str:
    if name not in entry:
        return ""
    value = entry[name]
    text = f"{100 * value['rate']:.1f} %" if "rate" in value else f"{value['mean']:.2f}"
    change = entry.get("against_plain", {}).get(name)
    return text + (f" (+{change['gained']} -{change['lost']}, p = {change['p_value']:.1g})" if change else "")
