"""Seconds per image of every method in up to four forms, side by side in one interleaved run.

    python bench/run.py overhead                 the default of this device
    python bench/run.py overhead --arch sdxl --size 512 --methods TSAM SynGen

published: as the authors' code does it, written from the equations with the structure of the released code. diffusers:
its own pipeline, where it has the method. stock: the best that PyTorch does without kernels of one's own. ours: the
user's pipeline under `attnctl_fast.control`. All draw the same picture from the same latents (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import diffusers_forms
import official
import ours
import published_attention
import published_guidance
import stock_attention
import stock_guidance
import torch
from checkout import RESULTS
from memory import peak_megabytes
from official import official_table
from overhead_table import overhead_table
from rows import Log, Row, stamp
from sampling import Drawn, Form, Setting, call
from timing import first_line
from tqdm import tqdm

from attnctl_fast._model import device_named
from attnctl_fast._report import overhead, spread
from attnctl_fast.shapes import LAYERS

PLAIN = "plain"
RIVALS: dict[str, Mapping[str, Form]] = {
    "published": published_attention.FORMS | published_guidance.FORMS,
    "diffusers": diffusers_forms.FORMS,
    "stock": stock_attention.FORMS | stock_guidance.FORMS,
}
FORMS = (*RIVALS, "ours")
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.float16, torch.bfloat16)}
# Where an option is not given: on a CPU what two cores do within ten minutes, on a GPU the setting of the papers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"size": 128, "steps": 4, "dtype": "float32", "turns": 2},
    "cuda": {"size": 512, "steps": 50, "dtype": "float16", "turns": 2},
}
DEFAULT_ARCH = "sd2"


@dataclass
class Arm:
    """One form of one method, and what was measured of it."""

    method: str
    form: str
    draw: Form
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    images: torch.Tensor | None = None
    losses: list[float] | None = None
    failed: str | None = None


def arms(setting: Setting, methods: Sequence[str], forms: Sequence[str]) -> list[Arm]:
    """Plain sampling, then every form that there is of every method."""
    left_out = () if diffusers_forms.supports(setting) else ("diffusers",)
    found = [Arm(PLAIN, PLAIN, lambda setting: Drawn(call(setting)))]
    for method in methods:
        for form in (form for form in forms if form not in left_out):
            if form == "ours":
                found.append(Arm(method, form, partial(ours.draw, method)))
            elif method in RIVALS[form]:
                found.append(Arm(method, form, RIVALS[form][method]))
    return found


def measure(setting: Setting, competing: Sequence[Arm], turns: int, progress: Callable[[str], None]) -> None:
    """Draw by every arm in turn; before that, two steps that are not counted. What fails does not compete any more."""
    device = setting.latents.device
    short = replace(setting, steps=2, edited=1)
    for turn in range(-1, turns):
        for arm in list(competing)[:: 1 if turn % 2 else -1]:
            progress(f"{arm.method}, {arm.form}")
            if arm.failed is not None:
                continue
            try:
                if turn < 0:
                    _warm_up(arm, short)
                    continue
                with peak_megabytes(device) as peak:
                    start = time.perf_counter()
                    drawn = arm.draw(setting)
                    arm.seconds.append((time.perf_counter() - start) / setting.batch)
                    taken = peak()
                arm.images = drawn.images
                if taken is not None:
                    arm.megabytes.append(taken)
            except Exception as error:
                arm.failed = first_line(error)


def _warm_up(arm: Arm, setting: Setting) -> None:
    """Finds the losses as well, which ours keeps to itself: reading them would make the host wait."""
    with ours.regulation_losses() as losses:
        drawn = arm.draw(setting)
    arm.losses = losses or drawn.losses


def rows(competing: Sequence[Arm]) -> list[Row]:
    """What was measured, arm by arm; those of which nothing is known yet are left out."""
    plain = next((arm for arm in competing if arm.method == PLAIN and arm.seconds), None)
    own = {arm.method: arm for arm in competing if arm.form == "ours"}
    found = []
    for arm in competing:
        row: Row = {"method": arm.method, "form": arm.form}
        row["published_percent"] = ours.PUBLISHED.get(arm.method)
        row["source"] = ours.SOURCE if arm.method in ours.PUBLISHED else None
        if arm.failed is not None:
            found.append(row | {"failed": arm.failed})
        elif arm.seconds:
            memory = statistics.median(arm.megabytes) if arm.megabytes else None
            least = statistics.median(plain.megabytes) if plain and plain.megabytes else None
            row |= {"seconds": arm.seconds, **spread(arm.seconds), "peak_mb": memory}
            row["extra_mb"] = None if memory is None or least is None or arm is plain else memory - least
            row["overhead_percent"] = (
                None if plain is None or arm is plain else overhead(plain.seconds, arm.seconds[: len(plain.seconds)])
            )
            row["difference"] = difference(arm, own.get(arm.method))
            found.append(row)
    return found


def difference(arm: Arm, own: Arm | None) -> dict[str, float] | None:
    """How far a form's result is from ours: the largest difference of a pixel (0..1), or where pictures of correct
    forms may differ, that of the first losses in percent."""
    if own is None or arm is own or own.images is None or arm.images is None:
        return None
    if arm.losses and own.losses:
        count = min(len(arm.losses), len(own.losses))
        pairs = zip(arm.losses[:count], own.losses[:count], strict=True)
        return {"loss_percent": max(100 * abs(theirs / mine - 1) for theirs, mine in pairs)}
    return {"image": float((arm.images - own.images).abs().max())}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arch", default=DEFAULT_ARCH, help=f"{', '.join(architectures.SIZES)}; default: {DEFAULT_ARCH}")
    made.add_argument("--methods", nargs="+", metavar="METHOD", help=f"default: all, {', '.join(ours.METHODS)}")
    made.add_argument("--forms", nargs="+", metavar="FORM", help=f"default: all, {', '.join(FORMS)}")
    made.add_argument("--size", type=int, help="pixels along a side; default: 128 on a CPU, else 512; shapes 64")
    made.add_argument("--steps", type=int, help="of the sampler; default: 4 on a CPU, else 50")
    made.add_argument("--edited", type=int, help="the first steps, in which methods are at work; default: half of them")
    made.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: float32 on a CPU, else float16")
    made.add_argument("--batch", type=int, default=1, help="pictures at once; default: 1")
    made.add_argument("--compile", action="store_true", help="compile the UNet in place before all forms")
    made.add_argument("--turns", type=int, help="how often every form draws; default: 2")
    made.add_argument("--device", default="auto", help="torch device; default: a GPU if there is one")
    made.add_argument(
        "--official-dir",
        type=Path,
        metavar="PATH",
        help=official.HELP,
    )
    made.add_argument("--json", action="store_true", help="print the rows as JSON lines instead of the table")
    made.add_argument("--results", type=Path, default=RESULTS / "overhead.jsonl", help="file to append to")
    return made


def run(arguments: argparse.Namespace) -> int:
    device = device_named(arguments.device)
    complete(arguments, device)
    if arguments.official_dir is not None:
        official.find_clones(arguments.official_dir)
    settings = {
        "kind": "overhead",
        **{name: getattr(arguments, name) for name in ("arch", "size", "steps", "edited", "dtype", "batch", "compile")},
    }
    log = Log(arguments.results, stamp(device) | settings)
    setting = prepare(arguments, device)
    competing = arms(setting, arguments.methods, arguments.forms)
    try:
        compete(setting, competing, arguments.turns, log)
        official.measure(arguments.official_dir, log, arguments.turns, device=device)
    finally:
        show(log.rows, as_json=arguments.json)
    return 0


def compete(setting: Setting, competing: Sequence[Arm], turns: int, log: Log) -> None:
    """`measure` with a progress bar; what was measured is written even if it is interrupted."""
    with tqdm(total=len(competing) * (turns + 1), unit="image", dynamic_ncols=True) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        try:
            measure(setting, competing, turns, progress)
        finally:
            for row in rows(competing):
                log.write(row)


def show(written: Sequence[Row], *, as_json: bool) -> None:
    if as_json:
        print(*map(json.dumps, written), sep="\n")
    elif any(row["kind"] == "overhead" for row in written):
        print(overhead_table(written), official_table(written), sep="\n\n")


def prepare(arguments: argparse.Namespace, device: torch.device) -> Setting:
    """The pipeline and what it is to draw."""
    arch = arguments.arch
    pipe = architectures.pipeline(arch, device, DTYPES[arguments.dtype])
    if arguments.compile:
        pipe.unet.compile()
    side = arguments.size // pipe.vae_scale_factor
    latents = torch.randn(arguments.batch, 4, side, side, generator=torch.Generator().manual_seed(0))
    layers = LAYERS if arch == "shapes" else None
    given = latents.to(device, DTYPES[arguments.dtype])
    return Setting(pipe, given, arguments.steps, arguments.edited, layers=layers)


def complete(arguments: argparse.Namespace, device: torch.device) -> None:
    """Check the arguments and put in the defaults.

    Raises:
        ValueError: one that is not known or out of range.
    """
    defaults = dict(DEFAULTS["cpu" if device.type == "cpu" else "cuda"])
    if arguments.arch == "shapes":
        defaults["size"] = architectures.SIZES["shapes"]
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.edited is None:
        arguments.edited = max(arguments.steps // 2, 1)
    _known("--arch", [arguments.arch], architectures.SIZES)
    _known("--dtype", [arguments.dtype], DTYPES)
    arguments.methods = _known("--methods", arguments.methods, ours.METHODS)
    arguments.forms = _known("--forms", arguments.forms, FORMS)
    for name in ("size", "steps", "batch", "turns"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    multiple = architectures.SIDES[arguments.arch]
    if arguments.size % multiple:
        raise ValueError(f"--size is {arguments.size}; for {arguments.arch} it must be a multiple of {multiple}")
    if arguments.edited not in range(1, arguments.steps + 1):
        raise ValueError(f"--edited is {arguments.edited}; it must be 1 to {arguments.steps}, the number of steps")


def _known(option: str, given: Sequence[str] | None, known: Any) -> list[str]:
    """The given names, in their known order; all where none is given."""
    for name in given or ():
        if name not in known:
            raise ValueError(f"{option} is {name!r}; it must be one of {', '.join(known)}")
    return [name for name in known if given is None or name in given]
