"""Detection rates and times on the shapes model, over pairs of pictures: plain pipeline against attention regulation.

    python -m bench rates                        the figures of the README: seeds 0..n-1
    python -m bench rates --tune                 a search over strengths and layers, on seeds from 100000 on
    python -m bench report                       put the last figures into the README

Every run appends one line to bench/results/shapes_rates.jsonl (--tune: shapes_tuning.jsonl) and prints it as a table.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnctl_fast.cli.report import overhead, spread, versions
from attnctl_fast.shapes import LAYERS, load_pipeline
from attnctl_fast.shapes.evaluate import TUNED, Arm, Evaluation, compare, interleaved, regulation
from bench.harness.checkout import RESULTS, append, git_state
from bench.report.tables import rates_table

TUNING_SEED = 100_000


def measure(
    pipe: Any,
    *,
    count: int,
    seed_start: int,
    regulations: Sequence[dict[str, Any]],
    objects: int = 2,
    steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Evaluate the plain pipeline and each regulation, given as options of `evaluate.regulation`, on the same seeds."""
    arms = {"plain": Arm()}
    arms.update((f"{index}", Arm(regulation(**options))) for index, options in enumerate(regulations))
    results = interleaved(
        pipe,
        range(seed_start, seed_start + count),
        arms,
        objects=objects,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        warm_up=True,
    )
    plain = results.pop("plain")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git": git_state(),
        "versions": versions(),
        "settings": {
            "count": count,
            "seed_start": seed_start,
            "objects": objects,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "batch_size": batch_size,
            "scheduler": type(pipe.scheduler).__name__,
        },
        "plain": _rates(plain) | {"seconds_per_image": spread(plain.seconds_per_image)},
        "regulations": [
            {
                "options": options,
                **asdict(compare(plain, result)),
                "seconds_per_image": spread(result.seconds_per_image),
                "overhead_percent": overhead(plain.seconds_per_image, result.seconds_per_image),
            }
            for options, result in zip(regulations, results.values(), strict=True)
        ],
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tune", action="store_true", help=f"search on held-apart seeds, from {TUNING_SEED} on")
    made.add_argument("--count", type=int, help="number of prompts; default: 256, with --tune 128")
    made.add_argument("--strengths", type=float, nargs="+", help="default: as tuned, and 1; with --tune 0.125 to 1")
    made.add_argument(
        "--layers",
        nargs="+",
        help="sets of layers, names joined by commas; default: all 16x16 layers, --tune: block by block too",
    )
    made.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE[,VALUE...]",
        help="another number of AttentionRegulation, such as mass=0.05,0.1; may be given repeatedly",
    )
    made.add_argument("--objects", type=int, default=2)
    made.add_argument("--steps", type=int, default=25)
    made.add_argument("--guidance-scale", type=float, default=5.0)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--device", default="cpu")
    made.add_argument("--weights", type=Path, help="a folder with other weights of the shapes model")
    made.add_argument("--results", type=Path, help="file to append to")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and keep."""
    if arguments.tune or arguments.strengths or arguments.layers or arguments.option:
        layers = arguments.layers or [",".join(LAYERS), *(LAYERS if arguments.tune else ())]
        grid = {
            "layers": [names.split(",") for names in layers],
            "strength": arguments.strengths or ([0.125, 0.25, 0.5, 1.0] if arguments.tune else [TUNED["strength"]]),
            **dict(arguments.option),
        }
        choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    else:
        choices = [dict(TUNED), {"layers": LAYERS, "strength": 1.0}]
    pipe = load_pipeline(device=arguments.device, **({"weights": arguments.weights} if arguments.weights else {}))
    found = measure(
        pipe,
        count=arguments.count or (128 if arguments.tune else 256),
        seed_start=TUNING_SEED if arguments.tune else 0,
        regulations=choices,
        objects=arguments.objects,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        batch_size=arguments.batch_size,
    )
    path = arguments.results or RESULTS / ("shapes_tuning.jsonl" if arguments.tune else "shapes_rates.jsonl")
    append(path, found)
    print(rates_table(found))
    return 0


def _rates(result: Evaluation) -> dict[str, float]:
    return {name: result.hits(name) / len(result.scores) for name in ("strict", "exact", "colours")}


def _option(text: str) -> tuple[str, list[float]]:
    name, _, values = text.partition("=")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE[,VALUE...] with numbers, got {text!r}") from None
