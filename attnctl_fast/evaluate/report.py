"""The page of a sweep, `report.html`: its table, its pictures side by side, their heat maps; one file beside them.

Prompts are hostile input. The page's script makes them the text of elements and nothing else, its policy allows no
other script, and paths are put together from numbers and names of methods.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from .plan import Picture
from .store import Record, Store
from .summary import SCORES, cells

FILE = "report.html"


def page(
    store: Store,
    pictures: Sequence[Picture],
    rows: Sequence[Record],
    figures: dict[str, Any],
    *,
    model: str,
    paper: Mapping[str, float] | None = None,
    embed: bool = False,
) -> str:
    """Return the page.

    Args:
        store: where the pictures are.
        pictures: of the sweep, in its order.
        rows: what `merged` says of them.
        figures: what `summary` makes of those.
        model: what drew them.
        paper: overheads in a paper, as `cells` takes them.
        embed: put the pictures and maps into the page in place of links to them.
    """
    data = _data(store, pictures, rows, list(figures)) | {"table": cells(figures, paper, page=True)}
    data |= {"title": f"Sweep of {model}", "about": _about(pictures, rows)}
    if embed:
        drawn = [picture.file for picture, row in zip(pictures, rows, strict=True) if "error" not in row]
        maps = [picture.maps for picture, row in zip(pictures, rows, strict=True) if "words" in row]
        data["embedded"] = {file: _uri(store, file) for file in [*drawn, *maps]}
    style, script = (_own(f"report.{kind}") for kind in ("css", "js"))
    return Template(_own("report.html")).substitute(
        STYLE=style, SCRIPT=script, STYLE_HASH=_hash(style), SCRIPT_HASH=_hash(script), DATA=_json(data)
    )


def _data(store: Store, pictures: Sequence[Picture], rows: Sequence[Record], methods: list[str]) -> dict[str, Any]:
    names = [name for name in SCORES if any(name in row for row in rows)]
    prompts: dict[int, str] = {}
    words: dict[int, list[str]] = {}
    mapped: dict[str, bool] = {}
    turns: dict[tuple[int, int], list[Any]] = {}
    size = None
    for picture, row in zip(pictures, rows, strict=True):
        place, seed, method = picture.place, picture.settings.seed, methods.index(picture.method)
        prompts[place] = picture.settings.prompt
        cell = row["error"] if "error" in row else [row.get(name) for name in names]
        turns.setdefault((place, seed), [None] * len(methods))[method] = cell
        if "error" not in row:
            size = size or _size(store, picture.file)
            if "words" in row:
                words[place] = row["words"]
                mapped[f"{place} {seed} {method}"] = True
    return {
        "methods": methods,
        "scores": [{"title": SCORES[name].title, "digits": int(SCORES[name].form[1])} for name in names],
        "prompts": [prompts.get(place, "") for place in range(max(prompts) + 1)],
        "words": words,
        "mapped": mapped,
        # JavaScript's numbers end at 2**53.
        "rows": [[place, str(seed), turn] for (place, seed), turn in turns.items()],
        "size": size or (1, 1),
    }


def _about(pictures: Sequence[Picture], rows: Iterable[Record]) -> str:
    settings = pictures[0].settings
    steps = f"{settings.steps} steps" if settings.steps else "the pipeline's own number of steps"
    last = max((row["run"] for row in rows if "run" in row), default="")
    prompts = len({picture.place for picture in pictures})
    return f"{prompts} prompts, {len(pictures)} pictures, {steps}; last drawn {last[:19].replace('T', ' ')} UTC"


def _size(store: Store, file: str) -> tuple[int, int]:
    from PIL import Image

    with Image.open(store.path / file) as image:
        return image.size


def _uri(store: Store, file: str) -> str:
    return f"data:image/png;base64,{base64.b64encode((store.path / file).read_bytes()).decode()}"


def _own(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return how the page's policy names a text that may stand in it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """Return JSON that ends no element of a page, whatever it says."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
