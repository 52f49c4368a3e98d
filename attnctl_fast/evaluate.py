"""A sweep: many prompts with several seeds and methods, split over processes, judged and summed up.

    python -m attnctl_fast.evaluate --model shapes --method plain regulation --seeds 64 --out sweep
    accelerate launch --num_processes 2 -m attnctl_fast.evaluate --model path/or/hub-id \\
        --method plain regulation energy --prompts prompts.jsonl --seeds 4 --clip path/to/clip --out sweep

Each process draws its share of the pictures with a pipeline of its own on its own device, one at a time and each from
the noise of its own seed: on one kind of device, with one number of threads, pictures are the same whatever the
number of processes. On a CPU, `accelerate launch --multi_gpu --num_processes 2` starts two.

`--prompts` is a text file with one prompt a line, or with one JSON object a line where prompts have targets, pairs,
groups or seeds of their own: `{"prompt": "a red ball and a dog", "targets": ["ball", "dog"]}`. Without it, `--model
shapes` draws its own scenes of two objects, one for each seed. `--method` takes several methods; `plain` is the
pipeline alone, which the others are compared with on the same prompts and seeds.

The folder `--out` then holds `pictures`, what every process wrote as it went (`results-RANK.jsonl`), and at the end
`results.jsonl`, one row per picture, and `summary.json`. After a kill or an interruption the same command goes on with
what is missing, on any number of processes; other settings are refused, and so is a second sweep while one is at work
in the folder. A picture that cannot be drawn or judged is a row with its error and is tried again by the next run. The
folder must be one that all processes see.

The exit status is 0, 1 if pictures or scores failed, 2 for a mistake, 130 when interrupted; launchers of several
processes turn all but 0 into 1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._options import METHODS, add_method_options, add_model_options, natural, positive, require_extra, settings_of

if TYPE_CHECKING:
    import torch

    from ._choice import MethodSettings
    from ._folder import Folder
    from ._processes import Processes
    from ._prompts import Entry
    from ._scores import Scorer
    from ._sweep import Picture

PROGRAM = "attnctl_fast.evaluate"
_SCENES = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep and return the exit status of this process. Only the first process tells of what all have met."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    first = os.environ.get("RANK", "0") == "0"
    try:
        if first:
            arguments = _parser().parse_args(argv)
        else:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                arguments = _parser().parse_args(argv)
    except SystemExit:
        # A launcher kills all processes once one has failed, and the first has to say why.
        if first:
            raise
        return 0
    try:
        failed = _sweep(arguments)
    except KeyboardInterrupt:
        if first:
            print("interrupted; finished pictures are kept, and the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        if first:
            print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if first else 0
    return int(first and failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Draws prompts with several seeds and methods, split over the processes of `accelerate launch`, "
        "and sums up what the pictures show. Repeated after a kill, it goes on with what is missing.",
    )
    add_model_options(parser, layers="the method's own", out="out/evaluate")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt a line, or a JSON object a line, with its own targets, pairs, groups, token_weights, edit, "
        "negate, negative_prompt and seeds; needed but for --model shapes, which has scenes of its own",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"number of seeds: for every prompt, default 1; without --prompts one scene each, default {_SCENES}",
    )
    parser.add_argument("--seed-start", type=natural, default=0, metavar="SEED", help="the first of them; default: 0")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=["plain", *METHODS],
        metavar="NAME",
        default=["plain", "regulation"],
        help=f"one or more of plain, {', '.join(METHODS)}, each with those of the options below that it has; default: "
        "plain regulation",
    )
    add_method_options(parser)
    clip = parser.add_mutually_exclusive_group()
    clip.add_argument("--clip", metavar="PATH", help="CLIP weights of transformers, a folder or hub id: CLIP score")
    clip.add_argument("--open-clip", metavar="MODEL:PRETRAINED", help="the same by a model of open_clip_torch")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _sweep(arguments: argparse.Namespace) -> int:
    """Draw, judge and sum up, and return the number of pictures that could not be drawn or judged."""
    require_extra("accelerate")
    from ._folder import Folder

    with closing(Folder(arguments.out)) as folder:
        return _sweep_in(folder, arguments)


def _sweep_in(folder: Folder, arguments: argparse.Namespace) -> int:
    from ._folder import Log
    from ._model import device_named, load
    from ._processes import Processes
    from ._sweep import check, draw_pictures, plan, score_pictures

    processes = Processes(cpu=arguments.device == "cpu")
    methods = arguments.method
    base = processes.together(lambda: _base(arguments, processes))
    device = processes.together(lambda: device_named(base.device))
    scorers = processes.together(lambda: _scorers(arguments, device))
    count = arguments.seeds or (_SCENES if arguments.prompts is None else 1)
    seeds = range(arguments.seed_start, arguments.seed_start + count)
    entries = processes.together(lambda: _entries(arguments, base, seeds))
    pictures = processes.together(lambda: plan(base, methods, entries, seeds))
    settings = _settings(base, methods, entries, [seeds[0], count])
    by_file = {picture.file: picture for picture in pictures}

    def look() -> tuple[str, list[str], list[bool]]:
        folder.check(settings)
        if folder.begun:
            folder.lock()
        missing = folder.missing(by_file)
        judging = [bool(missing or folder.unscored(by_file, scorer.name)) for scorer in scorers]
        return datetime.now(timezone.utc).isoformat(timespec="microseconds"), missing, judging

    def ready() -> Any:
        pipe = load(base)
        pipe.set_progress_bar_config(disable=True)
        check(pipe, processes.share(pictures))
        return pipe

    def begin() -> list[str]:
        folder.lock()
        folder.claim(settings)
        return folder.missing(by_file)

    run, missing, judging = processes.by_first(look)
    log = Log(folder.path / f"results-{processes.rank}.jsonl", run, processes.rank, _about(processes, device))
    for scorer in compress(scorers, judging):
        processes.together(scorer.load)
    if missing:
        pipe = processes.together(ready)
        missing = processes.by_first(begin)
        mine = [by_file[file] for file in processes.share(missing)]
        processes.together(lambda: draw_pictures(pipe, _bar(mine, "drawing", processes), folder, log))
        del pipe
    for scorer in scorers:
        unscored = processes.by_first(partial(folder.unscored, by_file, scorer.name))
        mine = [by_file[file] for file in processes.share(unscored)]
        bar = _bar(mine, scorer.name, processes)
        processes.together(partial(score_pictures, scorer, bar, folder, log))
    names = [scorer.name for scorer in scorers]
    failed = processes.by_first(lambda: _finish(folder, pictures, settings, methods, names))
    processes.close()
    return failed


def _bar(pictures: list[Picture], name: str, processes: Processes) -> Iterable[Picture]:
    from tqdm import tqdm

    text = name if processes.count == 1 else f"{name}, process 1 of {processes.count}"
    hidden = processes.rank > 0 or not pictures
    return tqdm(pictures, desc=text, unit="picture", disable=hidden, dynamic_ncols=True)


def _about(processes: Processes, device: torch.device) -> dict[str, Any]:
    """What a run of this process needs to be repeated."""
    from torch.cuda import get_device_name

    from ._report import versions

    report = versions()
    name = get_device_name(device) if device.type == "cuda" else report["processor"]
    return {"processes": processes.count, "device": name, "versions": report}


def _base(arguments: argparse.Namespace, processes: Processes) -> MethodSettings:
    """What all pictures share."""
    from ._choice import MethodSettings, check_options

    if double := next((name for name in arguments.method if arguments.method.count(name) > 1), None):
        raise ValueError(f"--method names {double} twice; name it once")
    given = settings_of(MethodSettings, arguments) | {"prompt": "", "method": arguments.method[0]}
    base = MethodSettings(**given | {"device": _device(arguments.device, processes)})
    check_options(base, *arguments.method)
    return base


def _device(name: str, processes: Processes) -> str:
    """The device of this process by the option's value."""
    if name in ("auto", "cpu"):
        return str(processes.device)
    if processes.count > 1:
        raise ValueError(
            f"--device {name!r} is one device, but there are {processes.count} processes; leave it out, and every "
            "process has its own, or choose cpu"
        )
    return name


def _entries(arguments: argparse.Namespace, base: MethodSettings, seeds: range) -> list[Entry]:
    """The prompts.

    Raises:
        OSError, ValueError: there are none, or not in the form that `read_prompts` takes.
    """
    from ._model import SHAPES
    from ._prompts import read_prompts, scene_prompts

    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.model != SHAPES:
        raise ValueError(f"--model {arguments.model} needs --prompts, a file of prompts; only shapes has its own")
    for name in base.given("targets", "pairs", "groups"):
        raise ValueError(f"--{name} goes with --prompts; the scenes of --model shapes have their own")
    return scene_prompts(seeds)


def _scorers(arguments: argparse.Namespace, device: torch.device) -> list[Scorer]:
    from ._model import SHAPES
    from ._scores import Clip, Detector, OpenClip

    scorers: list[Scorer] = [Detector()] if arguments.model == SHAPES else []
    if arguments.clip is not None:
        scorers.append(Clip(arguments.clip, device))
    if arguments.open_clip is not None:
        scorers.append(OpenClip(arguments.open_clip, device))
    return scorers


def _settings(base: MethodSettings, methods: list[str], entries: list[Entry], seeds: list[int]) -> dict[str, Any]:
    """What decides the pictures, as `sweep.json` holds it; `seeds` are the first one and their number."""
    shared = asdict(base)
    for name in ("prompt", "seed", "method", "num_images"):
        del shared[name]
    kind = base.device.partition(":")[0]
    return {**shared, "device": kind, "methods": methods, "seeds": seeds, "prompts": entries}


def _finish(
    folder: Folder, pictures: list[Picture], settings: dict[str, Any], methods: list[str], scorers: list[str]
) -> int:
    """Write `results.jsonl` and `summary.json`, print the table, and return the number of pictures that could not be
    drawn or judged."""
    from ._summary import merged, summary, table

    rows = merged(folder, pictures, scorers)
    figures = summary(rows, methods)
    runs = [row for row in folder.rows() if row["kind"] == "run"]
    report = {"settings": settings, "scorers": scorers, "methods": figures, "runs": runs}
    folder.write("results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    folder.write("summary.json", json.dumps(report, indent=1) + "\n")
    folder.tidy()
    print(table(figures))
    print(f"Pictures and results.jsonl: {folder.path}", flush=True)
    failed = [row for row in rows if "error" in row]
    if failed:
        print(
            f"{len(failed)} of {len(rows)} pictures failed, {failed[0]['file']} with {failed[0]['error']}; the same "
            "command tries them again",
            file=sys.stderr,
        )
    unscored = [row for row in rows if "score_errors" in row]
    if unscored:
        name, error = next(iter(unscored[0]["score_errors"].items()))
        print(
            f"{len(unscored)} of {len(rows)} pictures are not judged, {unscored[0]['file']} by {name} with {error}; "
            "the same command tries them again",
            file=sys.stderr,
        )
    return len(failed) + len(unscored)


if __name__ == "__main__":
    sys.exit(main())
