"""The folder of a sweep, which keeps what has been drawn and judged, so that a later run goes on with the rest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from PIL.Image import Image

Record: TypeAlias = dict[str, Any]
_LOCK = "sweep.lock"


class Store:
    """The folder of a sweep: `sweep.json` with its settings, `pictures`, and `results-RANK.jsonl` of every process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None

    @property
    def begun(self) -> bool:
        """Whether there is a sweep in it."""
        return (self.path / "sweep.json").is_file()

    def lock(self) -> None:
        """Keep other sweeps out of the folder, which is made where it is missing, until `close` or the process's end.

        Windows and file systems without `flock` do without.

        Raises:
            ValueError: another sweep is at work in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32" or self._lock is not None:
            return
        self._lock = (self.path / _LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"another sweep is at work in {self.path}; wait for it, or choose another --out"
            ) from error
        except OSError:
            # The file system has no locks.
            return

    def close(self) -> None:
        """Let other sweeps in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def check(self, settings: Record) -> None:
        """Raise ValueError if the folder holds anything but a sweep of these settings."""
        if self.begun:
            there = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
            here = json.loads(json.dumps(settings))
            # An earlier version may lack a setting that is None here.
            if any(there.get(name) != here.get(name) for name in {**there, **here}):
                raise ValueError(
                    f"{self.path} holds another sweep: {_difference(there, here)}; choose another --out, or repeat it "
                    "with the same options"
                )
        elif self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file; name a folder")
        elif self.path.exists() and any(
            entry.suffix != ".tmp" and entry.name != _LOCK for entry in self.path.iterdir()
        ):
            raise ValueError(f"{self.path} holds other files and no sweep; choose another --out")

    def claim(self, settings: Record) -> None:
        """Write the settings, for later runs to compare theirs with, before anything else; errors as in `check`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.check(settings)
        if not self.begun:
            self.write("sweep.json", json.dumps(settings, indent=1) + "\n")
        (self.path / "pictures").mkdir(exist_ok=True)

    def records(self) -> list[Record]:
        """Return what all processes have written, the earliest run first, without lines that a kill cut off."""
        found = []
        for path in sorted(self.path.glob("results-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    found.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return sorted(found, key=lambda record: record["run"])

    def drawn(self) -> dict[str, Record]:
        """Return the last record of every picture, by its file; of one that is not there any more, none."""
        last = {record["file"]: record for record in self.records() if record["kind"] == "picture"}
        return {file: record for file, record in last.items() if "error" in record or (self.path / file).is_file()}

    def missing(self, files: Iterable[str]) -> list[str]:
        """Return those of the pictures that have no record, or one with an error."""
        done = {file for file, record in self.drawn().items() if "error" not in record}
        return [file for file in files if file not in done]

    def unscored(self, files: Iterable[str], name: str) -> list[str]:
        """Return those of the pictures that are drawn and not judged by this scorer, or with an error."""
        return self._without(files, "scores", name)

    def unmapped(self, files: Iterable[str]) -> list[str]:
        """Return those of the pictures that are drawn and whose words have no maps, or an error."""
        return self._without(files, "maps")

    def _without(self, files: Iterable[str], kind: str, name: str | None = None) -> list[str]:
        there = [record for record in self.records() if record["kind"] == kind and record.get("by") == name]
        done = {record["file"] for record in there if "error" not in record}
        drawn = {file for file, record in self.drawn().items() if "error" not in record}
        return [file for file in files if file in drawn - done]

    def save(self, file: str, image: Image) -> None:
        """Save a picture; under its name there is never a part of one."""
        path = self.path / file
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        image.save(part, format="PNG")
        os.replace(part, path)

    def write(self, file: str, text: str) -> None:
        """Write a text in the same way."""
        part = self.path / f"{file}.{os.getpid()}.tmp"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path / file)

    def tidy(self) -> None:
        """Remove what killed processes left unfinished."""
        for path in [*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")]:
            path.unlink(missing_ok=True)


@dataclass
class Log:
    """The records of one process, each in its file as soon as written; the first of a run says what it runs on."""

    path: Path
    run: str
    rank: int
    about: Record
    _begun: bool = field(default=False, init=False)

    def write(self, kind: str, record: Record) -> None:
        """Append a record of this kind: `picture`, `scores`, `maps` or `set`."""
        with self.path.open("a+b") as file:
            if not self._begun:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    # A kill may have cut off the last line.
                    file.write(b"" if file.read() == b"\n" else b"\n")
                file.write(self._line("run", self.about))
                self._begun = True
            file.write(self._line(kind, record))

    def _line(self, kind: str, record: Record) -> bytes:
        return (json.dumps({"run": self.run, "kind": kind, "rank": self.rank, **record}) + "\n").encode()


def _difference(there: Record, here: Record) -> str:
    """Say which setting differs first; of the prompts, which one."""
    name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
    one, other = there.get(name), here.get(name)
    if name == "prompts" and isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"it has {len(one)} prompts, this one {len(other)}"
        place = next(place for place in range(len(one)) if one[place] != other[place])
        name, one, other = f"prompt {place + 1}", one[place], other[place]
    return f"{name} is {one!r} there and {other!r} here"
