"""The parser of `python -m attnctl_fast.evaluate`, and what it says of mistakes."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

from ..cli.method_options import METHODS, add_method_options
from ..cli.options import add_model_options, natural, positive, require_extra, share
from .presets import PRESETS
from .prompts import FIELDS, SCENES

PROGRAM = "attnctl_fast.evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep and return the exit status of this process. Only the first process tells of what all have met."""
    return _main(argv, _parser())


def reproduce(argv: Sequence[str]) -> int:
    """Run a paper's evaluation, which is a sweep with other defaults; statuses as in `main`."""
    return _main(argv, _parser(preset=True))


def _main(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> int:
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    first = os.environ.get("RANK", "0") == "0"
    try:
        unread = io.StringIO()
        with nullcontext() if first else redirect_stdout(unread), nullcontext() if first else redirect_stderr(unread):
            arguments = parser.parse_args(argv)
            if arguments.method is None:
                preset = PRESETS.get(arguments.preset)
                arguments.method = list(preset.methods) if preset else ["plain", "regulation"]
    except SystemExit:
        # A launcher kills all processes once one has failed, and the first has to say why.
        if first:
            raise
        return 0
    try:
        require_extra("accelerate")
        # Imports torch and what was just asked for.
        from .sweep import sweep

        failed = sweep(arguments)
    except KeyboardInterrupt:
        if first:
            print("interrupted; finished pictures are kept, and the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        if first:
            print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if first else 0
    return int(first and failed > 0)


def _parser(preset: bool = False) -> argparse.ArgumentParser:
    if preset:
        parser = argparse.ArgumentParser(
            prog="attnctl-fast reproduce",
            description="Runs the evaluation of a paper on your model: its prompts, seeds and methods, its figures "
            "beside yours. It is the sweep of `python -m attnctl_fast.evaluate`: repeated after a kill, it goes on, "
            "and `accelerate launch -m attnctl_fast reproduce ...` splits it over GPUs. --model shapes draws scenes of "
            "its own.",
        )
        parser.add_argument("preset", choices=PRESETS, help="; ".join(f"{n}: {p.source}" for n, p in PRESETS.items()))
    else:
        parser = argparse.ArgumentParser(
            prog=PROGRAM,
            description="Draws prompts with several seeds and methods, split over the processes of `accelerate "
            "launch`, and sums up what the pictures show. Repeated after a kill, it goes on with what is missing.",
        )
        parser.set_defaults(preset=None)
    add_model_options(parser, out="out/reproduce" if preset else "out/evaluate")
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=Path,
        metavar="FILE",
        help=f"a prompt a line, or a JSON object a line, with {', '.join(FIELDS)}; or files in COCO's form (.json), "
        "captions and boxes of the same pictures; "
        + ("default: those of the paper" if preset else "needed but for --model shapes, which has scenes of its own"),
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"number of seeds: for every prompt, default 1; without --prompts one scene each, default {SCENES}",
    )
    parser.add_argument("--seed-start", type=natural, default=0, metavar="SEED", help="the first of them; default: 0")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=["plain", *METHODS],
        metavar="NAME",
        help=f"one or more of plain, {', '.join(METHODS)}, each with those of the options below that it has; default: "
        + ("those of the paper's table that need no boxes" if preset else "plain regulation"),
    )
    add_method_options(parser)
    clip = parser.add_mutually_exclusive_group()
    clip.add_argument("--clip", metavar="PATH", help="CLIP weights of transformers, a folder or hub id: CLIP score")
    clip.add_argument("--open-clip", metavar="MODEL:PRETRAINED", help="the same by a model of open_clip_torch")
    parser.add_argument(
        "--owl",
        metavar="PATH",
        help="OWLv2 weights of transformers, a folder or hub id: whether the picture shows the prompt's phrases",
    )
    parser.add_argument(
        "--owl-threshold",
        type=share,
        default=0.1,
        metavar="SCORE",
        help="the least score of a detection; default: 0.1, that of transformers' example",
    )
    parser.add_argument(
        "--captions",
        metavar="PATH",
        help="a captioning model of transformers, such as BLIP; with --clip: CLIP similarities of the prompt with the "
        "picture and with its caption",
    )
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="questions about prompts, in the form of TIFA's files"
    )
    parser.add_argument(
        "--vqa", metavar="PATH", help="a visual-question model of transformers, such as ViLT, that answers --questions"
    )
    parser.add_argument(
        "--lpips",
        nargs="?",
        const="alex",
        choices=("alex", "vgg", "squeeze"),
        help="distance from the plain picture by this network; default of the option: alex",
    )
    parser.add_argument("--fid", type=Path, metavar="DIR", help="FID of every method's pictures against a folder's")
    parser.add_argument(
        "--fid-dims",
        type=int,
        choices=(64, 192, 768, 2048),
        default=2048,
        help="Inception features of the FID; default: 2048, which needs thousands of pictures",
    )
    parser.add_argument(
        "--maps", action="store_true", help="heat maps of every word in report.html; draws every picture once more"
    )
    parser.add_argument(
        "--embed", action="store_true", help="put the pictures into report.html, so that it can be sent alone"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
