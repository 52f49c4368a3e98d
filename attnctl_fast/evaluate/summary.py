"""Sum up a sweep: one row per picture, figures per method, and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..cli.report import aligned, spread
from ..shapes.evaluate import mcnemar
from .intervals import of_ratio, of_share
from .plan import PLAIN, Picture
from .store import Record, Store


@dataclass(frozen=True)
class Score:
    """A column of the table: its title, how a mean is written, and whether more of it is better than less."""

    title: str
    form: str = ".2f"
    more_is_better: bool = True


NOTHING: Mapping[str, Record] = MappingProxyType({})
SCORES = {
    "strict": Score("strict"),
    "exact": Score("exact"),
    "colours": Score("all colours"),
    "detected": Score("detected"),
    "found": Score("objects found"),
    "placed": Score("in their boxes"),
    "clip": Score("CLIP score"),
    "image_text": Score("CLIP image-text", ".3f"),
    "text_text": Score("CLIP text-text", ".3f"),
    "questions": Score("questions right"),
    "lpips": Score("LPIPS", ".3f", more_is_better=False),
}


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
    for file, row in {row["file"]: row for row in store.records() if row["kind"] == "maps"}.items():
        about = scores.setdefault(file, {})
        if "error" in row:
            about.setdefault("score_errors", {})["maps"] = row["error"]
        else:
            about["words"] = row["words"]
    rows = [(drawn.get(picture.file) or {**picture.record(), "error": "not drawn"}) for picture in pictures]
    return [
        {name: value for name, value in row.items() if name != "kind"}
        | ({} if "error" in row else scores.get(row["file"], {}))
        for row in rows
    ]


def summary(rows: Sequence[Record], methods: Sequence[str], sets: Mapping[str, Record] = NOTHING) -> dict[str, Any]:
    """Return figures of every method.

    `pictures` and `failed` are numbers; `seconds` per picture and scores that are numbers have median and quartiles,
    the latter a mean too; of scores that are yes or no `rate` is the share of yes; `interval` is the 95 % interval of
    mean or rate. `against_plain`, over the prompts and seeds that both have, counts for every score the pictures that
    are better than the plain one (`gained`) and worse (`lost`), with the exact p value of McNemar's test, which for
    numbers is the sign test. `overhead` is what a method adds to the time of the plain pictures, in percent. `fid` is
    the distance from a folder, where `sets` has it.
    """
    result: dict[str, Any] = {}
    good = {method: [row for row in rows if row["method"] == method and "error" not in row] for method in methods}
    plain = {(row["place"], row["seed"]): row for row in good.get(PLAIN, [])}
    warm = {method: _warm(mine) for method, mine in good.items()}
    for method in methods:
        mine = good[method]
        seconds = [row["seconds"] for row in mine if row["seconds"] is not None]
        result[method] = {
            "pictures": len(mine),
            "failed": sum(row["method"] == method for row in rows) - len(mine),
            "seconds": spread(seconds) if seconds else None,
        }
        against = {}
        for name, score in SCORES.items():
            prompts, values = [row["place"] for row in mine if name in row], [row[name] for row in mine if name in row]
            if values and isinstance(values[0], bool):
                rate = {"rate": sum(values) / len(values), "interval": of_share(values, prompts)}
                result[method][name] = {**rate, "count": len(values)}
            elif values:
                mean = {"mean": statistics.fmean(values), "interval": of_ratio(values, [1.0] * len(values), prompts)}
                result[method][name] = {**mean, **spread(values), "count": len(values)}
            if method == PLAIN or not score.more_is_better:
                continue
            pairs = [(plain.get((row["place"], row["seed"]), {}).get(name), row.get(name)) for row in mine]
            both = [(before, after) for before, after in pairs if before is not None and after is not None]
            if both:
                gained, lost = sum(a > b for b, a in both), sum(a < b for b, a in both)
                against[name] = {"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost), "count": len(both)}
        if against:
            result[method]["against_plain"] = against
        if "value" in sets.get(method, {}):
            result[method]["fid"] = {"value": sets[method]["value"], "count": sets[method]["count"]}
        if method != PLAIN and (cost := _overhead(warm.get(PLAIN, []), warm[method])):
            result[method]["overhead"] = cost
    return result


def _warm(rows: Sequence[Record]) -> list[Record]:
    """Return the rows of one method whose times count: not a process's first, which compiles and fills caches."""
    seen: set[tuple[str, int]] = set()
    kept = []
    for row in rows:
        if row["seconds"] is not None:
            place = (row.get("run", ""), row.get("rank", 0))
            kept += [row] if place in seen else []
            seen.add(place)
    return kept


def _overhead(plain: Sequence[Record], controlled: Sequence[Record]) -> dict[str, Any] | None:
    """Return the cost over the plain pictures that the same process drew in the same turn, in percent."""
    names = ("place", "seed", "run", "rank")
    before = {tuple(map(row.get, names)): row["seconds"] for row in plain}
    pairs = [(before[key], row) for row in controlled if (key := tuple(map(row.get, names))) in before]
    if not pairs:
        return None
    under, over = [seconds for seconds, _ in pairs], [row["seconds"] for _, row in pairs]
    interval = of_ratio(over, under, [row["place"] for _, row in pairs])
    return {
        "percent": 100 * (sum(over) / sum(under) - 1),
        "interval": interval and [100 * (end - 1) for end in interval],
        "count": len(pairs),
    }


def table(figures: dict[str, Any], paper: Mapping[str, float] | None = None) -> str:
    """Lay out the summary as lines of text; `paper` as in `cells`."""
    return "\n".join(aligned(cells(figures, paper)))


def cells(figures: dict[str, Any], paper: Mapping[str, float] | None = None, *, page: bool = False) -> list[list[str]]:
    """Return the rows of the table, its head first.

    Args:
        figures: of `summary`.
        paper: overheads of methods in a paper, in percent, for a column of their own.
        page: with the 95 % intervals, and what belongs to a figure in lines of their own.
    """
    shown = [name for name in SCORES if any(name in entry for entry in figures.values())]
    costs, sets = (any(name in entry for entry in figures.values()) for name in ("overhead", "fid"))
    head = ["method", "pictures", *(SCORES[name].title for name in shown), *["FID"] * sets, "s per picture"]
    rows = [head + ["overhead"] * costs + ["in the paper"] * (paper is not None)]
    for method, entry in figures.items():
        parts = [[str(entry["pictures"]), f"({entry['failed']} failed)" if entry["failed"] else ""]]
        parts += [_score(entry, name, page) for name in shown]
        parts += [[f"{entry['fid']['value']:.2f}"] if "fid" in entry else []] * sets
        seconds = entry["seconds"]
        parts += [[f"{seconds['median']:.3g}", f"({seconds['low']:.3g} to {seconds['high']:.3g})"] if seconds else []]
        parts += [_cost(entry.get("overhead"), page)] * costs
        if paper is not None:
            parts += [[f"{paper[method]:+.1f} %"] if method in paper else []]
        rows.append([method, *(("\n" if page else " ").join(filter(None, lines)) for lines in parts)])
    return rows


def _score(entry: dict[str, Any], name: str, page: bool) -> list[str]:
    if name not in entry:
        return []
    value, form = entry[name], SCORES[name].form
    if "rate" in value:
        lines = [f"{100 * value['rate']:.1f} %", _between([100 * end for end in value["interval"]], ".1f", page)]
    else:
        lines = [f"{value['mean']:{form}}", _between(value["interval"], form, page)]
    change = entry.get("against_plain", {}).get(name)
    return lines + ([f"(+{change['gained']} -{change['lost']}, p = {change['p_value']:.1g})"] if change else [])


def _cost(cost: dict[str, Any] | None, page: bool) -> list[str]:
    return [f"{cost['percent']:+.1f} %", _between(cost["interval"], "+.1f", page)] if cost else []


def _between(interval: Sequence[float] | None, form: str, page: bool) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if page and interval else ""
