"""Measure what every method adds to a denoising step, in up to four forms side by side.

    python -m bench overhead                 the default of this device
    python -m bench overhead --arch sdxl --size 512 --methods TSAM SynGen
    python -m bench overhead --seconds 1500  more rounds, and room for all methods

published: as the authors' code does it, written from the equations with the structure of the released code. diffusers:
its own pipeline, where it has the method. stock: the best that PyTorch does without kernels of one's own. ours: the
user's pipeline under `attnctl_fast.control`. All draw the same picture from the same latents, which is checked before
they are timed (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attnctl_fast.cli.model import device_named
from attnctl_fast.cli.options import require_extra
from attnctl_fast.shapes import LAYERS
from bench.compare.worktree import termination_raised
from bench.harness.checkout import RESULTS
from bench.harness.intervals import confident, fewest_rounds
from bench.harness.rows import Log, Row, stamp
from bench.official import released
from bench.official.released import official_table
from bench.pictures import architectures, ours
from bench.pictures.contest import PLAIN, STEPS, Arm, Contest, arms
from bench.pictures.overhead_rows import FORMS, KIND
from bench.pictures.sampling import Setting
from bench.report.overhead_table import overhead_table

DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.float16, torch.bfloat16)}
# Where an option is not given.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"size": 512, "dtype": "float32", "seconds": 540.0},
    "cuda": {"size": 512, "dtype": "float16", "seconds": 280.0},
}
DEFAULT_ARCH = "sd2"
# Pixels along a side of the pictures that are compared where a whole evaluation takes seconds.
CHECKED_SIZE = 128


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arch", default=DEFAULT_ARCH, help=f"{', '.join(architectures.SIZES)}; default: {DEFAULT_ARCH}")
    made.add_argument("--methods", nargs="+", metavar="METHOD", help=f"default: all, {', '.join(ours.METHODS)}")
    made.add_argument("--forms", nargs="+", metavar="FORM", help=f"default: all, {', '.join(FORMS)}")
    made.add_argument("--size", type=int, help="pixels along a side; default: 512")
    made.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: float32 on a CPU, else float16")
    made.add_argument("--batch", type=int, default=1, help="pictures at once; default: 1")
    made.add_argument("--compile", action="store_true", help="compile the UNet in place before all forms")
    made.add_argument("--seconds", type=float, help="about how long it takes; default: 540 on a CPU, else 280")
    made.add_argument("--device", default="auto", help="torch device; default: a GPU if there is one")
    made.add_argument("--official-dir", type=Path, metavar="PATH", help=released.HELP)
    made.add_argument("--results", type=Path, default=RESULTS / "overhead.jsonl", help="file to append to")
    return made


def run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    require_extra()
    device = device_named(arguments.device)
    complete(arguments, device)
    if arguments.official_dir is not None:
        released.find_clones(arguments.official_dir)
    settings = {name: getattr(arguments, name) for name in ("arch", "size", "dtype", "batch", "compile")}
    # Where whole evaluations are cheap, or compiled, nothing stands still.
    still = device.type == "cpu" and not arguments.compile
    log = Log(arguments.results, stamp(device) | settings | {"kind": KIND, "still": still})
    say(f"about {arguments.seconds:.0f} s (--seconds), the first methods first; Ctrl-C keeps what was measured")
    setting = prepare(arguments, device)
    competing = arms(setting, arguments.methods, arguments.forms)
    with termination_raised():
        try:
            compete(setting, competing, log, start + arguments.seconds, still=still)
            released.measure(arguments.official_dir, log, device)
        finally:
            show(log.rows)
    return 0


def compete(setting: Setting, competing: Sequence[Sequence[Arm]], log: Log, until: float, *, still: bool) -> None:
    """Write a row of plain sampling, one of every form that fails, and one of every other form when it has been timed,
    also if that was interrupted."""
    contest = Contest(setting, still=still)
    side = CHECKED_SIZE // setting.pipe.vae_scale_factor
    small = replace(setting, latents=setting.latents[..., :side, :side]) if still else setting
    with contest.running(), tqdm(total=sum(map(len, competing)), unit="form", dynamic_ncols=True) as bar:
        contest.time_plain()
        seconds = statistics.median(contest.plain)
        log.write({"method": PLAIN, "form": PLAIN, "seconds": contest.plain, "step": {"middle": seconds}})
        say(f"a plain step takes {seconds:.3g} s; now every form draws the same picture")
        for group in competing:
            bar.set_postfix_str(f"{group[0].method} is checked")
            contest.check(group, small)
        groups = list(alike(arm for group in competing for arm in group if arm.failed is None))
        written: set[Arm] = set()
        left_out: list[str] = []

        def keep(group: Iterable[Arm]) -> None:
            for arm in group:
                if arm not in written and (arm.failed is not None or len(arm.added) > 1):
                    written.add(arm)
                    log.write(row(arm, seconds))

        keep(arm for group in competing for arm in group)
        for index, group in enumerate(groups):
            now = time.monotonic()
            if now > until:
                left_out += [f"{arm.method} {arm.form}" for arm in group]
                continue
            bar.set_postfix_str(f"{group[0].method}: {', '.join(arm.form for arm in group)}")
            try:
                contest.race(group, now + (until - now) / (len(groups) - index))
            finally:
                keep(group)
                bar.update(len(group))
    if left_out:
        say(f"left out, as the time was up: {', '.join(left_out)}; a larger --seconds has room for them")


def alike(found: Iterable[Arm]) -> Iterable[list[Arm]]:
    """The forms of a method that touch the same, which compete in one race."""
    groups: dict[Any, list[Arm]] = {}
    for arm in found:
        groups.setdefault((arm.method, arm.touched), []).append(arm)
    return groups.values()


def row(arm: Arm, plain: float) -> Row:
    """What was found out about a form; plain: seconds of a plain step."""
    made: Row = {"method": arm.method, "form": arm.form, "published_percent": ours.PUBLISHED.get(arm.method)}
    made |= {"source": ours.SOURCE if arm.method in ours.PUBLISHED else None, "difference": arm.difference}
    if arm.failed is not None:
        return made | {"failed": arm.failed}
    edited = ours.edited_steps(arm.method, STEPS)
    images = [x.once + edited * x.edited + (STEPS - edited) * x.resting for x in arm.added]
    whole = STEPS * plain
    return made | {
        "edited": edited,
        "rounds": len(arm.added),
        "ranks": len(arm.added) >= fewest_rounds(0.05),
        "step": confident([x.edited for x in arm.added])._asdict(),
        "resting": statistics.median(x.resting for x in arm.added),
        "once": statistics.median(x.once for x in arm.added),
        "image": confident(images)._asdict(),
        "percent": confident([100 * x / whole for x in images])._asdict(),
        "extra_mb": arm.extra_mb,
        "samples": [list(x) for x in arm.added],
    }


def show(written: Sequence[Row]) -> None:
    tables: dict[str, Callable[[Sequence[Row]], str]] = {KIND: overhead_table, "official": official_table}
    for kind, table in tables.items():
        if any(row["kind"] == kind for row in written):
            print(table(written), end="\n\n")


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def prepare(arguments: argparse.Namespace, device: torch.device) -> Setting:
    """The pipeline and what it is to draw."""
    arch = arguments.arch
    pipe = architectures.pipeline(arch, device, DTYPES[arguments.dtype])
    if arguments.compile:
        pipe.unet.compile()
    side = arguments.size // pipe.vae_scale_factor
    latents = torch.randn(arguments.batch, 4, side, side, generator=torch.Generator().manual_seed(0))
    layers = LAYERS if arch == "shapes" else None
    return Setting(pipe, latents.to(device, DTYPES[arguments.dtype]), 1, 1, layers=layers)


def complete(arguments: argparse.Namespace, device: torch.device) -> None:
    """Check the arguments and put in the defaults.

    Raises:
        ValueError: one that is not known or out of range.
    """
    defaults = DEFAULTS["cpu" if device.type == "cpu" else "cuda"]
    if arguments.arch == "shapes":
        defaults = defaults | {"size": architectures.SIZES["shapes"]}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    _known("--arch", [arguments.arch], architectures.SIZES)
    _known("--dtype", [arguments.dtype], DTYPES)
    arguments.methods = _known("--methods", arguments.methods, ours.METHODS)
    arguments.forms = _known("--forms", arguments.forms, FORMS)
    for name in ("size", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    multiple = architectures.SIDES[arguments.arch]
    if arguments.size % multiple:
        raise ValueError(f"--size is {arguments.size}; for {arguments.arch} it must be a multiple of {multiple}")


def _known(option: str, given: Sequence[str] | None, known: Any) -> list[str]:
    """The given names, in their known order; all where none is given."""
    for name in given or ():
        if name not in known:
            raise ValueError(f"{option} is {name!r}; it must be one of {', '.join(known)}")
    return [name for name in known if given is None or name in given]
