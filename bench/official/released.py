"""The authors' own code against ours: functions of a user's clone of a released repository, side by side.

`--official-dir PATH` names a clone, or a folder of clones, of attention_regulation, Energy-Based-CrossAttention or
T-SAM's code. None of their code is here: the functions that current libraries can still import are imported from the
clone, by name, and called with the arguments that the released pipelines give them. That runs the code of the folder
with the rights of the user, so name only a folder whose code you would run.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnctl_fast.cli.report import spread
from bench.harness.checkout import git_state
from bench.harness.rows import Log, Row
from bench.harness.timing import Clock, first_line
from bench.official import energy, regulation, tsam
from bench.official.repository import Adapter, Clone, Results

REPOSITORIES = {x.REPOSITORY: x for x in (regulation, energy, tsam)}
HELP = (
    "a clone, or a folder of clones, of the authors' repositories "
    f"({', '.join(REPOSITORIES)}): their functions are measured too. This runs the code in it"
)


class OfficialCase(NamedTuple):
    """A function of a clone and what does the same here. `agree` gives the largest difference of two results over
    ours' largest number, and what is wrong if that is more than rounding."""

    repository: str
    function: str
    operation: str
    shape: str
    theirs: Callable[[], Results]
    ours: Callable[[], Results]
    agree: Callable[[Results, Results], tuple[float, str | None]]


class Skipped(NamedTuple):
    """A function that is not measured, and why: `failed` where that is an error and not something missing."""

    repository: str
    function: str
    operation: str
    reason: str
    failed: bool = False


def find_clones(folder: Path) -> dict[str, Path]:
    """The clones that `folder` is or holds, by the repository's name.

    Raises:
        ValueError: no clone is there, or two of the same repository.
    """
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
    found: dict[str, Path] = {}
    for path in folders:
        for name, repository in REPOSITORIES.items():
            if not (path / repository.MARKER).is_file():
                continue
            if name in found:
                raise ValueError(f"{found[name]} and {path} are both clones of {name}; name one of them")
            found[name] = path
    if not found:
        looked = ", ".join(f"{repository.MARKER} ({name})" for name, repository in REPOSITORIES.items())
        raise ValueError(f"{folder} is no clone of the authors' repositories and holds none; looked for {looked}")
    return found


def cases(folder: Path, device: torch.device | str = "cpu") -> Iterator[OfficialCase | Skipped]:
    """Every function of the clones in `folder`, made ready only when its turn comes, or why it cannot be measured.

    Raises:
        ValueError: as `find_clones`.
    """
    clones = find_clones(folder)
    for name, repository in REPOSITORIES.items():
        for adapter in repository.ADAPTERS:
            if name in clones:
                yield _case(Clone(name, clones[name]), adapter, torch.device(device))
            else:
                yield Skipped(name, adapter.function, adapter.operation, f"no clone in {folder}")


def measure(
    folder: Path | None,
    log: Log,
    turns: int,
    progress: Callable[[str], Any] = lambda name: None,
    device: torch.device | str = "cpu",
) -> None:
    """Write a row per function: its time and ours, `turns` times in turn after a first call of each that is compared.

    Args:
        folder: a clone or a folder of clones; None writes rows that say that there was none.
        log: its rows' `kind` and `dtype` become "official" and "float32".
        progress: called with what is measured next.

    Raises:
        ValueError: as `find_clones`, before anything is measured, or turns below 1.
    """
    if turns < 1:
        raise ValueError(f"turns is {turns}; it must be at least 1")
    if folder is None:
        for name in REPOSITORIES:
            log.write({"kind": "official", "repository": name, "skipped": "no --official-dir"})
        return
    commits = {name: _commit(path) for name, path in find_clones(folder).items()}
    clock = Clock(torch.device(device))
    for case in cases(folder, device):
        row = {"kind": "official", "commit": commits.get(case.repository), "dtype": "float32"}
        row |= {name: getattr(case, name) for name in ("repository", "function", "operation")}
        if isinstance(case, Skipped):
            log.write({**row, "failed" if case.failed else "skipped": case.reason})
            continue
        progress(f"{case.repository}: {case.function}")
        log.write({**row, "shape": case.shape, **_measured(case, clock, turns)})


def official_table(rows: Iterable[Row]) -> str:
    """The rows of `measure` as a Markdown table, and below it what was not measured."""
    header = ["repository", "function", "ours", "shape", "theirs, ms", "ours, ms", "theirs / ours", "results"]
    lines = [header, ["---"] * 4 + ["---:"] * 3 + ["---"]]
    missing: dict[str, list[str]] = {}
    rows = [row for row in rows if row["kind"] == "official"]
    for row in rows:
        if "ratio" in row:
            lines.append(_cells(row))
            continue
        reason = f"failed: {row['failed']}" if "failed" in row else f"skipped: {row['skipped']}"
        function = f" `{row['function']}`" if "function" in row else ""
        missing.setdefault(reason, []).append(f"{row['repository']}{function}")
    text = [f"| {' | '.join(cells)} |" for cells in lines] if len(lines) > 2 else []
    if len(lines) > 2:
        commits = sorted(
            {f"{row['repository']} {row['commit'] or 'of unknown commit'}" for row in rows if "ratio" in row}
        )
        text += ["", f"The authors' own functions, from {', '.join(commits)}: median and quartiles, in turn with ours."]
    for reason, names in missing.items():
        text += ["", f"Not measured, {reason} ({', '.join(dict.fromkeys(names))})."]
    return "\n".join(text).strip()


def _cells(row: Row) -> list[str]:
    times = [
        f"{_figure(1e3 * x['median'])} ({_figure(1e3 * x['low'])}-{_figure(1e3 * x['high'])})"
        for x in (row["theirs"], row["ours"])
    ]
    # A ratio of the times of two different things would mean nothing.
    ratio = _figure(row["ratio"]["median"]) if row["agrees"] else ""
    return [row["repository"], f"`{row['function']}`", row["operation"], row["shape"], *times, ratio, row["agreement"]]


def _figure(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _case(clone: Clone, adapter: Adapter, device: torch.device) -> OfficialCase | Skipped:
    known = clone.repository, adapter.function, adapter.operation
    try:
        with _apart():
            comparison = adapter.build(clone, device)
    except (ImportError, AttributeError) as error:
        return Skipped(*known, first_line(error))
    except (Exception, SystemExit) as error:
        return Skipped(*known, first_line(error), failed=True)

    def agree(theirs: Results, ours: Results) -> tuple[float, str | None]:
        difference = _difference(theirs, ours)
        if difference <= comparison.tolerance:
            return difference, None
        return difference, f"differ by {difference:.1e}, more than {comparison.tolerance:.0e}"

    return OfficialCase(*known, comparison.shape, comparison.theirs, comparison.ours, agree)


def _difference(theirs: Results, ours: Results) -> float:
    """The largest difference over ours' largest number, over all results; infinite where shapes differ."""
    if [x.shape for x in theirs] != [x.shape for x in ours]:
        return math.inf
    shares = [
        (x.double() - y.double()).abs().amax() / y.double().abs().amax() for x, y in zip(theirs, ours, strict=True)
    ]
    return float(torch.stack(shares).amax())


def _measured(case: OfficialCase, clock: Clock, turns: int) -> Row:
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    try:
        with _apart():
            difference, wrong = case.agree(case.theirs(), case.ours())
            for _ in range(turns):
                for form, samples in times.items():
                    samples.append(clock.first_call(getattr(case, form)))
    except (Exception, SystemExit) as error:
        return {"failed": first_line(error)}
    return {
        **{form: spread(samples) for form, samples in times.items()},
        "ratio": spread([theirs / ours for theirs, ours in zip(times["theirs"], times["ours"], strict=True)]),
        # JSON has neither infinity nor NaN.
        "difference": difference if math.isfinite(difference) else None,
        "agrees": wrong is None,
        "agreement": wrong or f"equal to {difference:.1e}",
    }


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Without gradients, as pipelines run. Released code sets gradients, anomaly detection and seeds for the whole
    process, and uses what is deprecated."""
    anomalies = torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled())
    with warnings.catch_warnings(), torch.random.fork_rng(), anomalies, torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _commit(clone: Path) -> str | None:
    """The clone's commit; None where it is no checkout of its own."""
    return git_state(clone) if (clone / ".git").exists() else None
