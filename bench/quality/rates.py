"""Detection rates and times of attention regulation on the shapes model, over pairs of pictures.

    python -m bench rates                        the figures of the README: seeds 0..n-1
    python -m bench rates --tune                 a search over strengths and layers, on seeds from 100000 on
    python -m bench report                       put the last figures into the README

Every run appends one line to bench/results/shapes_rates.jsonl (--tune: shapes_rates_tuning.jsonl) and prints it as a
table.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from attnctl_fast.shapes import LAYERS, load_pipeline
from attnctl_fast.shapes.evaluate import TUNED, Arm, regulation
from bench.quality import pairs
from bench.report.tables import rates_table


def choices(arguments: argparse.Namespace) -> list[pairs.Options]:
    """The settings to measure: as tuned and the official ones, or every combination of what was asked for."""
    if not (arguments.tune or arguments.strengths or arguments.layers or arguments.option):
        return [TUNED, {"layers": LAYERS, "strength": 1.0}]
    layers = arguments.layers or [",".join(LAYERS), *(LAYERS if arguments.tune else ())]
    grid = {
        "layers": [names.split(",") for names in layers],
        "strength": arguments.strengths or ([0.125, 0.25, 0.5, 1.0] if arguments.tune else [TUNED["strength"]]),
        **dict(arguments.option),
    }
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def parser() -> argparse.ArgumentParser:
    made = pairs.parser(__doc__, count=256, batch_size=8)
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
    made.add_argument("--weights", type=Path, help="a folder with other weights of the shapes model")
    return made


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and keep."""
    chosen = choices(arguments)
    pipe = load_pipeline(device=arguments.device, **({"weights": arguments.weights} if arguments.weights else {}))
    arms = [Arm(), *(Arm(regulation(**options)) for options in chosen)]
    results = pairs.drawn(pipe, arguments, arms, arguments.objects)
    found = pairs.rates([("AttentionRegulation", options) for options in chosen], results)
    row = pairs.line(arguments, found, objects=arguments.objects, scheduler=type(pipe.scheduler).__name__)
    pairs.keep(arguments, "rates", row)
    print(rates_table(row))
    return 0


def _option(text: str) -> tuple[str, list[float]]:
    name, _, values = text.partition("=")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE[,VALUE...] with numbers, got {text!r}") from None
