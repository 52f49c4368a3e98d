"""A sweep from beginning to end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from itertools import compress
from typing import Any

import torch
from tqdm import tqdm

from ..cli.method_options import Given, given_options
from ..cli.model import SHAPES, Settings, device_named, load
from ..cli.report import versions
from . import report
from .captions import Captions
from .coco import read_coco
from .frechet import Fid
from .heat import map_pictures
from .judging import measure_methods, measured, score_pictures, unmeasured
from .owl import Owl
from .perceptual import Lpips
from .plan import PLAIN, Picture, check, draw_pictures, in_turns, plan
from .presets import PRESETS, Preset, preset_scenes
from .processes import Processes
from .prompts import SCENES, Entry, read_prompts, scene_prompts
from .questions import Questions
from .scorers import Clip, Detector, OpenClip, Scorer
from .store import Log, Store
from .summary import merged, summary, table


def sweep(arguments: argparse.Namespace) -> int:
    """Draw, judge and sum up, and return the number of pictures that could not be drawn or judged.

    Raises:
        ValueError, OSError, ImportError: a mistake of the user, in this process or in another one.
    """
    with closing(Store(arguments.out)) as store:
        processes = Processes(cpu=arguments.device == "cpu")
        try:
            failed = _sweep_into(store, processes, arguments)
        except (ValueError, OSError, ImportError):
            processes.close()
            raise
        processes.close()
        return failed


def _sweep_into(store: Store, processes: Processes, arguments: argparse.Namespace) -> int:
    methods = arguments.method
    preset = PRESETS.get(arguments.preset)
    defaults = preset.shapes.get(arguments.model, {}) if preset else {}
    base, options = processes.together(lambda: _shared(arguments, processes))
    device = processes.together(lambda: device_named(base.device))
    scorers = processes.together(lambda: _scorers(arguments, device))
    seeds = _seeds(arguments, preset)
    prompts = processes.together(lambda: _prompts(arguments, options, seeds))
    fid = processes.together(lambda: _fid(arguments, device))
    pictures = processes.together(lambda: plan(base, options, methods, prompts, seeds, defaults))
    record = _record(base, options, methods, prompts, seeds, arguments.preset)
    by_file = {picture.file: picture for picture in pictures}
    watchable = [picture.file for picture in pictures if picture.watchable] if arguments.maps else []

    def look() -> tuple[str, list[str], bool, list[bool]]:
        store.check(record)
        if store.begun:
            store.lock()
        missing = store.missing(by_file)
        mapping = bool(watchable and missing or store.unmapped(watchable))
        judging = [bool(missing or store.unscored(by_file, scorer.name)) for scorer in scorers]
        return datetime.now(timezone.utc).isoformat(timespec="microseconds"), missing, mapping, judging

    def ready() -> Any:
        pipe = load(base)
        pipe.set_progress_bar_config(disable=True)
        check(pipe, processes.share(pictures))
        return pipe

    def begin() -> list[str]:
        store.lock()
        store.claim(record)
        return store.missing(by_file)

    run, missing, mapping, judging = processes.by_first(look)
    log = Log(store.path / f"results-{processes.rank}.jsonl", run, processes.rank, _about(processes, device))
    for scorer in compress(scorers, judging):
        processes.together(scorer.load)
    if fid is not None:
        processes.together(fid.fetch)
    if missing or mapping:
        pipe = processes.together(ready)
        missing = processes.by_first(begin)
        mine = in_turns(by_file[file] for file in processes.share(missing))
        processes.together(lambda: draw_pictures(pipe, _bar(mine, "drawing", processes), store, log))
        if mapping:
            unmapped = processes.by_first(partial(store.unmapped, watchable))
            mine = [by_file[file] for file in processes.share(unmapped)]
            processes.together(lambda: map_pictures(pipe, _bar(mine, "maps", processes), store, log))
        del pipe
    for scorer in scorers:
        unscored = processes.by_first(partial(store.unscored, by_file, scorer.name))
        mine = [by_file[file] for file in processes.share(unscored)]
        bar = _bar(mine, scorer.name, processes)
        processes.together(partial(score_pictures, scorer, bar, store, log))
    if fid is not None and (unknown := processes.by_first(partial(unmeasured, fid, pictures, store))):
        processes.together(fid.load)
        share = processes.share(unknown)
        processes.together(partial(measure_methods, fid, share, pictures, store, log))
    names = [scorer.name for scorer in scorers]
    return processes.by_first(lambda: _finish(store, pictures, record, names, fid, arguments.embed))


def _bar(pictures: list[Picture], name: str, processes: Processes) -> Iterable[Picture]:
    text = name if processes.count == 1 else f"{name}, process 1 of {processes.count}"
    hidden = processes.rank > 0 or not pictures
    return tqdm(pictures, desc=text, unit="picture", disable=hidden, dynamic_ncols=True)


def _about(processes: Processes, device: torch.device) -> dict[str, Any]:
    """Return what a run of this process needs to be repeated."""
    here = versions()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else here["processor"]
    return {"processes": processes.count, "device": name, "versions": here}


def _shared(arguments: argparse.Namespace, processes: Processes) -> tuple[Settings, Given]:
    """Return the settings and the method options that all pictures share, but for what a prompt has of its own.

    Raises:
        ValueError: options that do not go together.
    """
    methods = arguments.method
    if double := next((name for name in methods if methods.count(name) > 1), None):
        raise ValueError(f"--method names {double} twice; name it once")
    device = arguments.device
    if device in ("auto", "cpu"):
        device = str(processes.device)
    elif processes.count > 1:
        raise ValueError(
            f"--device {device!r} is one device, but there are {processes.count} processes; leave it out, and every "
            "process has its own, or choose cpu"
        )
    return Settings.of(arguments, prompt="", device=device), given_options(arguments, methods)


def _seeds(arguments: argparse.Namespace, preset: Preset | None) -> range:
    own = arguments.prompts is None and arguments.model in SHAPES
    count = arguments.seeds or (SCENES if own else preset.seeds if preset else 1)
    return range(arguments.seed_start, arguments.seed_start + count)


def _prompts(arguments: argparse.Namespace, options: Given, seeds: range) -> list[Entry]:
    """Return the prompts.

    Raises:
        OSError, ValueError: there are none, or not in the form that `read_prompts` takes.
    """
    if arguments.prompts is not None:
        coco = [path.suffix == ".json" for path in arguments.prompts]
        if all(coco):
            return read_coco(arguments.prompts)
        if any(coco) or len(arguments.prompts) > 1:
            raise ValueError("--prompts takes one file of lines, or files in COCO's form, which end in .json")
        return read_prompts(arguments.prompts[0])
    preset = PRESETS.get(arguments.preset)
    if preset and arguments.model not in SHAPES:
        return preset.prompts()
    if arguments.model not in SHAPES:
        known = " and ".join(SHAPES)
        raise ValueError(f"--model {arguments.model} needs --prompts, a file of prompts; only {known} have their own")
    scenes = preset_scenes(seeds) if preset else scene_prompts(seeds)
    if name := next((name for name in options if name in scenes[0]), None):
        raise ValueError(f"--{name} goes with --prompts; the scenes of --model {arguments.model} have their own")
    return scenes


def _scorers(arguments: argparse.Namespace, device: torch.device) -> list[Scorer]:
    """Return the judges that the options ask for.

    Raises:
        OSError, ValueError, ImportError: one cannot be had, or options do not go together.
    """
    pickle = arguments.allow_pickle
    scorers: list[Scorer] = [Detector()] if arguments.model in SHAPES else []
    clip = None if arguments.clip is None else Clip(arguments.clip, device, pickle)
    if arguments.owl is not None:
        scorers.append(Owl(arguments.owl, device, arguments.owl_threshold, pickle))
    if clip is not None:
        scorers.append(clip)
    if arguments.open_clip is not None:
        scorers.append(OpenClip(arguments.open_clip, device, pickle))
    if arguments.captions is not None:
        if clip is None:
            raise ValueError("--captions compares by CLIP; add --clip")
        scorers.append(Captions(arguments.captions, clip, device, pickle))
    if (arguments.questions is None) != (arguments.vqa is None):
        raise ValueError("--questions and --vqa go together: a file of questions, and the model that answers them")
    if arguments.questions is not None:
        scorers.append(Questions(arguments.questions, arguments.vqa, device, pickle))
    if arguments.lpips is not None:
        if PLAIN not in arguments.method:
            raise ValueError("--lpips compares with the plain pictures; add plain to --method")
        scorers.append(Lpips(arguments.lpips, device, pickle))
    return scorers


def _fid(arguments: argparse.Namespace, device: torch.device) -> Fid | None:
    if arguments.fid is None:
        return None
    return Fid(arguments.fid, arguments.fid_dims, device, arguments.allow_pickle)


def _record(
    base: Settings,
    options: Given,
    methods: list[str],
    prompts: list[Entry],
    seeds: range,
    preset: str | None = None,
) -> dict[str, Any]:
    """Return what decides the pictures, as `sweep.json` holds it: of the seeds, the first one and their number."""
    record = {**asdict(base), **options, "device": base.device.partition(":")[0], "methods": methods}
    for name in ("prompt", "seed", "allow_pickle"):
        del record[name]
    return {**record, "preset": preset, "seeds": [seeds[0], len(seeds)], "prompts": prompts}


def _finish(
    store: Store,
    pictures: list[Picture],
    record: dict[str, Any],
    scorers: list[str],
    fid: Fid | None,
    embed: bool,
) -> int:
    """Write results, summary and page, print the table, and return how many pictures have an error."""
    preset = PRESETS.get(record["preset"])
    paper = preset.overheads if preset else None
    rows = merged(store, pictures, scorers)
    sets = measured(fid.name, pictures, store) if fid else {}
    figures = summary(rows, record["methods"], sets)
    runs = [row for row in store.records() if row["kind"] == "run"]
    about = {"settings": record, "scorers": [*scorers, *([fid.name] if fid else [])], "methods": figures, "runs": runs}
    store.write("results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    store.write("summary.json", json.dumps(about, indent=1) + "\n")
    page = report.page(store, pictures, rows, figures, model=record["model"], paper=paper, embed=embed)
    store.write(report.FILE, page)
    store.tidy()
    print(table(figures, paper))
    if preset:
        print(f"In the paper: {preset.source}.")
    print(f"Pictures and results.jsonl: {store.path}   to look at: {store.path / report.FILE}", flush=True)
    failed = [f"{row['file']} with {row['error']}" for row in rows if "error" in row]
    unscored = [
        f"{row['file']} by {name} with {error}"
        for row in rows
        for name, error in list(row.get("score_errors", {}).items())[:1]
    ]
    unscored += [f"{row['method']} by {row['by']} with {row['error']}" for row in sets.values() if "error" in row]
    for trouble, what in ((failed, "failed"), (unscored, "are not judged")):
        if trouble:
            print(
                f"{len(trouble)} of {len(rows)} pictures {what}, {trouble[0]}; the same command tries them again",
                file=sys.stderr,
            )
    return len(failed) + len(unscored)
