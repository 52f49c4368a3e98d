"""What the three commands share: pictures of the shapes model without and with methods from the same seeds, a line of
results for every run, and the seeds that settings are chosen on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnctl_fast.cli.report import overhead, spread
from attnctl_fast.shapes.evaluate import Arm, Evaluation, compare, interleaved
from bench.harness.checkout import RESULTS
from bench.harness.rows import Log, Row, stamp

Options = Mapping[str, Any]
PLAIN, TUNING_SEED = "plain", 100_000
CRITERIA = ("strict", "exact", "colours")


def parser(purpose: str | None, *, count: int = 128, batch_size: int = 16) -> argparse.ArgumentParser:
    """What every command is asked."""
    made = argparse.ArgumentParser(description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tune", action="store_true", help=f"other settings, on seeds from {TUNING_SEED} on")
    made.add_argument("--count", type=int, default=count, help="pictures per arm")
    made.add_argument("--batch-size", type=int, default=batch_size)
    made.add_argument("--steps", type=int, default=25)
    made.add_argument("--guidance-scale", type=float, default=5.0)
    made.add_argument("--device", default="cpu")
    made.add_argument("--results", type=Path, metavar="FILE", help="file to append to")
    return made


def seeds(arguments: argparse.Namespace) -> range:
    """The seeds of the README's figures, or those that `--tune` chooses on."""
    start = TUNING_SEED if arguments.tune else 0
    return range(start, start + arguments.count)


def drawn(
    pipe: Any, arguments: argparse.Namespace, arms: Sequence[Arm], objects: int = 2, progress: bool = True
) -> list[Evaluation]:
    """The pictures of every arm, batch by batch in turn."""
    found = interleaved(
        pipe,
        seeds(arguments),
        {str(index): arm for index, arm in enumerate(arms)},
        objects=objects,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
        progress=progress,
        warm_up=True,
    )
    return list(found.values())


def cost(plain: Evaluation, result: Evaluation) -> Row:
    """What a row says of the time."""
    return {
        "seconds_per_image": spread(result.seconds_per_image),
        "overhead_percent": overhead(plain.seconds_per_image, result.seconds_per_image),
    }


def rates(names: Sequence[tuple[str, Options]], results: Sequence[Evaluation]) -> Row:
    """What a line of results holds of methods with their options, after the plain arm: who draws which objects."""
    plain = results[0]
    shares = {name: plain.hits(name) / len(plain.scores) for name in CRITERIA}
    return {
        PLAIN: shares | {"seconds_per_image": spread(plain.seconds_per_image)},
        "rows": [
            {"method": name, "options": dict(options), **asdict(compare(plain, result)), **cost(plain, result)}
            for (name, options), result in zip(names, results[1:], strict=True)
        ],
    }


def line(arguments: argparse.Namespace, found: Row, **settings: Any) -> Row:
    """A line of results: when, of which commit, with which settings, and what was found."""
    names = ("count", "steps", "guidance_scale", "batch_size")
    asked = {name: getattr(arguments, name) for name in names} | {"seed_start": seeds(arguments).start}
    return stamp(arguments.device) | {"settings": asked | settings, **found}


def keep(arguments: argparse.Namespace, name: str, row: Row) -> None:
    """Append a line to the command's file."""
    Log(arguments.results or RESULTS / f"shapes_{name}{'_tuning' if arguments.tune else ''}.jsonl", {}).write(row)
