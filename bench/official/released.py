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
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from attnctl_fast.cli.report import spread
from bench.harness.checkout import git_state
from bench.harness.rows import Log, Row
from bench.harness.timing import Clock, first_line
from bench.official import energy, regulation, tsam
from bench.official.repository import Adapter, Clone, Results
from bench.report.markdown import table

TURNS = 3
REPOSITORIES = {x.REPOSITORY: x for x in (regulation, energy, tsam)}
HELP = (
    "a clone, or a folder of clones, of the authors' repositories "
    f"({', '.join(REPOSITORIES)}): their functions are measured too. This runs the code in it"
)


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


def measure(folder: Path | None, log: Log, device: torch.device | str = "cpu") -> None:
    """Write a row per function: its time and ours, `TURNS` times in turn after a first call of each that is compared;
    or why there are none.

    Args:
        folder: a clone or a folder of clones; None writes rows that say that there was none.
        log: its rows' `kind` and `dtype` become "official" and "float32".

    Raises:
        ValueError: as `find_clones`, before anything is measured.
    """
    if folder is None:
        for name in REPOSITORIES:
            log.write({"kind": "official", "repository": name, "skipped": "no --official-dir"})
        return
    clones, clock = find_clones(folder), Clock(torch.device(device))
    commits = {name: git_state(path) if (path / ".git").exists() else None for name, path in clones.items()}
    for name, repository in REPOSITORIES.items():
        for adapter in repository.ADAPTERS:
            row = {"kind": "official", "commit": commits.get(name), "dtype": "float32", "repository": name}
            row |= {"function": adapter.function, "operation": adapter.operation}
            if name in clones:
                log.write(row | _measured(adapter, Clone(name, clones[name]), clock))
            else:
                log.write(row | {"skipped": f"no clone in {folder}"})


def _measured(adapter: Adapter, clone: Clone, clock: Clock) -> Row:
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    try:
        with _apart():
            try:
                case = adapter.build(clone, clock.device)
            except (ImportError, AttributeError) as error:
                return {"skipped": first_line(error)}
            difference = _difference(case.theirs(), case.ours())
            for _ in range(TURNS):
                for form, samples in times.items():
                    samples.append(clock.first_call(getattr(case, form)))
    except (Exception, SystemExit) as error:
        return {"failed": first_line(error)}
    agrees = difference <= case.tolerance
    off = f"differ by {difference:.1e}, more than {case.tolerance:.0e}"
    return {
        "shape": case.shape,
        **{form: spread(samples) for form, samples in times.items()},
        "ratio": spread([theirs / ours for theirs, ours in zip(times["theirs"], times["ours"], strict=True)]),
        # JSON has neither infinity nor NaN.
        "difference": difference if math.isfinite(difference) else None,
        "agrees": agrees,
        "agreement": f"equal to {difference:.1e}" if agrees else off,
    }


def _difference(theirs: Results, ours: Results) -> float:
    """The largest difference over ours' largest number, over all results; infinite where shapes differ."""
    if [x.shape for x in theirs] != [x.shape for x in ours]:
        return math.inf
    shares = [
        (x.double() - y.double()).abs().amax() / y.double().abs().amax() for x, y in zip(theirs, ours, strict=True)
    ]
    return float(torch.stack(shares).amax())


def official_table(rows: Iterable[Row]) -> str:
    """The rows of `measure` as a Markdown table, and below it what was not measured."""
    rows = [row for row in rows if row["kind"] == "official"]
    timed = [row for row in rows if "ratio" in row]
    missing: dict[str, list[str]] = {}
    for row in rows:
        if "ratio" not in row:
            reason = f"failed: {row['failed']}" if "failed" in row else f"skipped: {row['skipped']}"
            missing.setdefault(reason, []).append(" ".join(filter(None, (row["repository"], row.get("function")))))
    text = []
    if timed:
        commits = sorted({f"{row['repository']} {row['commit'] or 'of unknown commit'}" for row in timed})
        header = ["repository", "function", "ours", "shape", "results", "theirs, ms", "ours, ms", "theirs / ours"]
        below = f"The authors' own functions, from {', '.join(commits)}: median and quartiles, in turn with ours."
        text.append(table(header, map(_cells, timed), below, left=5))
    text += [f"Not measured, {reason} ({', '.join(dict.fromkeys(names))})." for reason, names in missing.items()]
    return "\n\n".join(text)


def _cells(row: Row) -> list[str]:
    each = ([f"{1e3 * x[name]:.3g}" for name in ("median", "low", "high")] for x in (row["theirs"], row["ours"]))
    times = [f"{median} ({low}-{high})" for median, low, high in each]
    # A ratio of the times of two different things would mean nothing.
    ratio = f"{row['ratio']['median']:.3g}" if row["agrees"] else ""
    return [row["repository"], f"`{row['function']}`", row["operation"], row["shape"], row["agreement"], *times, ratio]


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Without gradients, as pipelines run. Released code sets gradients, anomaly detection and seeds for the whole
    process, and uses what is deprecated."""
    anomalies = torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled())
    with warnings.catch_warnings(), torch.random.fork_rng(), anomalies, torch.no_grad():
        warnings.simplefilter("ignore")
        yield
