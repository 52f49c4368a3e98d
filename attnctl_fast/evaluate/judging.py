"""Judging the pictures of a sweep: one by one, and all of a method together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .plan import PLAIN, Picture, reason
from .scorers import Scorer, Subject, opened
from .store import Log, Record, Store

if TYPE_CHECKING:
    from .frechet import Fid


def score_pictures(scorer: Scorer, pictures: Iterable[Picture], store: Store, log: Log) -> None:
    """Judge drawn pictures one by one. One that cannot be judged is a record with its error."""
    for picture in pictures:
        record: Record = {"file": picture.file, "by": scorer.name}
        entry = picture.entry
        try:
            subject = Subject(
                opened(store.path / picture.file),
                entry["prompt"],
                entry.get("phrases") or entry.get("targets", []),
                dict(entry.get("boxes", [])),
                None if picture.method == PLAIN else store.path / picture.with_method(PLAIN).file,
            )
            record["scores"] = scorer(subject)
        except Exception as error:
            record["error"] = reason(error)
        log.write("scores", record)


def unmeasured(fid: Fid, pictures: Sequence[Picture], store: Store) -> list[str]:
    """Return the methods whose drawn pictures have not been compared with the folder, not all or with an error."""
    done = measured(fid.name, pictures, store)
    return [method for method in _drawn(pictures, store) if "value" not in done.get(method, {})]


def measured(name: str, pictures: Sequence[Picture], store: Store) -> dict[str, Record]:
    """Return for every method what was found of the pictures that are drawn now."""
    marks = {method: _mark(files) for method, files in _drawn(pictures, store).items()}
    rows = [row for row in store.records() if row["kind"] == "set" and row["by"] == name]
    return {row["method"]: row for row in rows if marks.get(row["method"]) == row["files"]}


def measure_methods(fid: Fid, methods: Iterable[str], pictures: Sequence[Picture], store: Store, log: Log) -> None:
    """Compare all pictures of each method with the folder. A method for which that fails is a record with its error."""
    drawn = _drawn(pictures, store)
    for method in methods:
        record: Record = {"method": method, "by": fid.name, "files": _mark(drawn[method]), "count": len(drawn[method])}
        try:
            record["value"] = fid([store.path / file for file in drawn[method]])
        except Exception as error:
            record["error"] = reason(error)
        log.write("set", record)


def _drawn(pictures: Sequence[Picture], store: Store) -> dict[str, list[str]]:
    good = {file for file, record in store.drawn().items() if "error" not in record}
    found: dict[str, list[str]] = {}
    for picture in pictures:
        if picture.file in good:
            found.setdefault(picture.method, []).append(picture.file)
    return found


def _mark(files: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(files).encode()).hexdigest()[:12]
