"""Seconds per image of every method in up to four forms, side by side in one interleaved run.

    python -m bench overhead                 the default of this device
    python -m bench overhead --arch sdxl --size 512 --methods TSAM SynGen
    python -m bench overhead --seconds 280   as many turns as fit

published: as the authors' code does it, written from the equations with the structure of the released code. diffusers:
its own pipeline, where it has the method. stock: the best that PyTorch does without kernels of one's own. ours: the
user's pipeline under `attnctl_fast.control`. All draw the same picture from the same latents (docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attnctl_fast.cli.model import device_named
from attnctl_fast.cli.options import require_extra
from attnctl_fast.cli.report import spread
from attnctl_fast.shapes import LAYERS
from bench.harness.checkout import RESULTS
from bench.harness.memory import peak_megabytes
from bench.harness.rows import Log, Row, stamp
from bench.harness.timing import first_line
from bench.official import released
from bench.official.released import official_table
from bench.pictures import architectures, diffusers_forms, ours, published, stock
from bench.pictures.overhead_rows import last
from bench.pictures.sampling import Drawn, Form, Setting, call
from bench.report.overhead_table import overhead_table

PLAIN = "plain"
RIVALS: dict[str, Mapping[str, Form]] = {
    "published": published.FORMS,
    "diffusers": diffusers_forms.FORMS,
    "stock": stock.FORMS,
}
FORMS = (*RIVALS, "ours")
DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float32, torch.float16, torch.bfloat16)}
# Where an option is not given: on a CPU what two cores do within ten minutes, on a GPU the setting of the papers.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"size": 128, "steps": 2, "dtype": "float32", "turns": 1},
    "cuda": {"size": 512, "steps": 50, "dtype": "float16", "turns": 2},
}
DEFAULT_ARCH = "sd2"
# Where the time decides.
MOST_TURNS = 1000
# As released, these are not compiled: they put Python in front of every layer.
NEVER_COMPILED = ("published", "diffusers")
# One UNet is compiled for the processors, batch sizes and weights of every form; an arm that exceeds this fails.
RECOMPILATIONS: dict[str, Any] = {
    "recompile_limit": 256,
    "accumulated_recompile_limit": 4096,
    "fail_on_recompile_limit_hit": True,
}


@dataclass
class Arm:
    """One form of one method, and what was measured of it. plain: seconds of plain sampling right before or after."""

    method: str
    form: str
    draw: Form
    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    images: torch.Tensor | None = None
    losses: list[float] | None = None
    failed: str | None = None


def plain_arm() -> Arm:
    return Arm(PLAIN, PLAIN, lambda setting: Drawn(call(setting)))


def arms(setting: Setting, methods: Sequence[str], forms: Sequence[str]) -> list[list[Arm]]:
    """By method, every form that there is.

    Raises:
        ValueError: there is none.
    """
    left_out = () if diffusers_forms.supports(setting) else ("diffusers",)
    found = []
    for method in methods:
        draws = {form: RIVALS[form].get(method) if form in RIVALS else partial(ours.draw, method) for form in forms}
        found.append([Arm(method, x, draw) for x, draw in draws.items() if draw is not None and x not in left_out])
    if not any(found):
        raise ValueError(f"there is no form {' or '.join(forms)} of {' or '.join(methods)} here; name others")
    return found


def measure(
    setting: Setting,
    plain: Arm,
    competing: Sequence[Sequence[Arm]],
    turns: int,
    progress: Callable[[str], None],
    keep: Callable[[Sequence[Arm]], None],
    until: float = math.inf,
) -> None:
    """Draw by every form of every method in turn, plain sampling beside each method; before that, without counting,
    once, or twice where the UNet is compiled: what one arm changes, others compile for anew. What fails does not
    compete any more. keep: is given each method's forms when they have drawn, also if they are interrupted. until: of
    `time.monotonic()`; a method that would take longer, as it took before, is left out."""
    start, forms = time.monotonic(), 1 + sum(map(len, competing))
    tqdm.write(f"{forms} forms: first once without counting, {_short(setting).steps} steps each", file=sys.stderr)
    for _ in range(warm_ups(setting)):
        for arm in (plain, *chain(*competing)):
            _warm_up(arm, setting)
            progress(f"{arm.method}, {arm.form}")
    taken = time.monotonic() - start
    most = taken / warm_ups(setting) * setting.steps / _short(setting).steps
    tqdm.write(f"warmed up in {taken:.0f} s; a turn takes at most about {most:.0f} s", file=sys.stderr)
    for turn in range(turns):
        forward = 1 if turn % 2 == 0 else -1
        start, drawn = time.monotonic(), 0
        for group in competing:
            last = [arm.seconds[-1] * setting.batch for arm in (plain, *group) if arm.seconds] if turn else []
            if time.monotonic() + sum(last) > until:
                continue
            drawn += 1
            try:
                for arm in (plain, *group)[::forward]:
                    if arm.failed is None:
                        _draw(arm, setting)
                    progress(f"{arm.method}, {arm.form}")
                for arm in group:
                    if plain.failed is None and len(arm.plain) < len(arm.seconds):
                        arm.plain.append(plain.seconds[-1])
            finally:
                keep(group)
        if not drawn:
            break
        tqdm.write(f"turn {turn + 1}: {drawn} methods in {time.monotonic() - start:.0f} s", file=sys.stderr)


def warm_ups(setting: Setting) -> int:
    return 1 if setting.pipe.unet._compiled_call_impl is None else 2


def _draw(arm: Arm, setting: Setting) -> None:
    try:
        with _as_released(arm, setting), peak_megabytes(setting.latents.device) as peak:
            start = time.perf_counter()
            drawn = arm.draw(setting)
            seconds = (time.perf_counter() - start) / setting.batch
            taken = peak()
    except Exception as error:
        arm.failed = first_line(error)
        return
    arm.seconds.append(seconds)
    arm.images = drawn.images
    if taken is not None:
        arm.megabytes.append(taken)


def _warm_up(arm: Arm, setting: Setting) -> None:
    """Where something compiles, by two edited steps and two plain ones, since one of each compiles less than others
    need. Finds the losses as well, which ours keeps to itself: those by another draw, since what looks for them would
    be compiled."""
    short, recorded = _short(setting), []
    try:
        with _as_released(arm, setting):
            drawn = arm.draw(short)
        if (arm.method, arm.form) == ("AttentionRegulation", "ours"):
            with _uncompiled(setting), ours.regulation_losses() as recorded:
                arm.draw(short)
        if recorded or drawn.losses is not None:
            arm.losses = [float(losses.mean(2).amin(0).mean()) for losses in recorded or drawn.losses or ()]
    except Exception as error:
        arm.failed = first_line(error)


def _short(setting: Setting) -> Setting:
    compiles = setting.latents.device.type == "cuda" or setting.pipe.unet._compiled_call_impl is not None
    steps, edited = (4, 2) if compiles else (1, 1)
    return replace(setting, steps=min(steps, setting.steps), edited=min(edited, setting.edited))


def _as_released(arm: Arm, setting: Setting) -> AbstractContextManager[None]:
    """Have a compiled UNet run uncompiled for those forms that never are."""
    return _uncompiled(setting) if arm.form in NEVER_COMPILED else nullcontext()


@contextmanager
def _uncompiled(setting: Setting) -> Iterator[None]:
    unet = setting.pipe.unet
    compiled = unet._compiled_call_impl
    unet._compiled_call_impl = None
    try:
        yield
    finally:
        unet._compiled_call_impl = compiled


def rows(plain: Arm, competing: Sequence[Sequence[Arm]]) -> list[Row]:
    """What was measured, arm by arm; those of which nothing is known yet are left out."""
    least = statistics.median(plain.megabytes) if plain.megabytes else None
    found = []
    for group in ([plain], *competing):
        own = next((arm for arm in group if arm.form == "ours"), None)
        for arm in group:
            row: Row = {"method": arm.method, "form": arm.form}
            row["published_percent"] = ours.PUBLISHED.get(arm.method)
            row["source"] = ours.SOURCE if arm.method in ours.PUBLISHED else None
            if arm.failed is not None:
                found.append(row | {"failed": arm.failed})
            elif arm.seconds:
                memory = statistics.median(arm.megabytes) if arm.megabytes else None
                row |= {"seconds": arm.seconds, **_summary(arm.seconds), "peak_mb": memory}
                row["extra_mb"] = None if memory is None or least is None or arm is plain else memory - least
                costs = [100 * (after / before - 1) for before, after in zip(arm.plain, arm.seconds, strict=False)]
                row["overhead_percent"] = _summary(costs) if costs else None
                row["difference"] = difference(arm, own, plain)
                found.append(row)
    return found


def _summary(values: Sequence[float]) -> dict[str, float]:
    """The median and quartiles; of fewer than five, the lowest and the highest."""
    if len(values) >= 5:
        return spread(values)
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def difference(arm: Arm, own: Arm | None, plain: Arm) -> dict[str, float | None] | None:
    """How far a form's result is from ours: the largest difference of a pixel (0..1), None where it is not finite, and
    that of ours from plain sampling's; or where pictures of correct forms may differ, that of the losses of the first
    steps in percent."""
    if own is None or arm is own or own.images is None or arm.images is None:
        return None
    if arm.losses is not None or own.losses is not None:
        pairs = list(zip(arm.losses or (), own.losses or (), strict=False))
        return {"loss_percent": max((100 * abs(x - y) / max(abs(y), 1e-12) for x, y in pairs), default=None)}
    found: dict[str, float | None] = {"image": _off(arm.images, own.images)}
    return found | {"effect": None if plain.images is None else _off(own.images, plain.images)}


def _off(images: torch.Tensor, others: torch.Tensor) -> float | None:
    largest = float((images - others).abs().max())
    return largest if math.isfinite(largest) else None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arch", default=DEFAULT_ARCH, help=f"{', '.join(architectures.SIZES)}; default: {DEFAULT_ARCH}")
    made.add_argument("--methods", nargs="+", metavar="METHOD", help=f"default: all, {', '.join(ours.METHODS)}")
    made.add_argument("--forms", nargs="+", metavar="FORM", help=f"default: all, {', '.join(FORMS)}")
    made.add_argument("--size", type=int, help="pixels along a side; default: 128 on a CPU, else 512")
    made.add_argument("--steps", type=int, help="of the sampler; default: 2 on a CPU, else 50")
    made.add_argument("--edited", type=int, help="the first steps, in which methods are at work; default: half of them")
    made.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: float32 on a CPU, else float16")
    made.add_argument("--batch", type=int, default=1, help="pictures at once; default: 1")
    made.add_argument("--compile", action="store_true", help="compile the UNet in place before all forms")
    made.add_argument("--turns", type=int, help="how often every form draws; default: 1 on a CPU, else 2")
    made.add_argument("--seconds", type=float, help="instead of --turns: as many as fit, the first methods first")
    made.add_argument("--device", default="auto", help="torch device; default: a GPU if there is one")
    made.add_argument(
        "--official-dir",
        type=Path,
        metavar="PATH",
        help=released.HELP,
    )
    made.add_argument("--json", action="store_true", help="print the rows as JSON lines instead of the table")
    made.add_argument("--results", type=Path, default=RESULTS / "overhead.jsonl", help="file to append to")
    return made


def run(arguments: argparse.Namespace) -> int:
    until = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
    require_extra()
    device = device_named(arguments.device)
    complete(arguments, device)
    if arguments.official_dir is not None:
        released.find_clones(arguments.official_dir)
    settings = {
        "kind": "overhead",
        **{name: getattr(arguments, name) for name in ("arch", "size", "steps", "edited", "dtype", "batch", "compile")},
    }
    log = Log(arguments.results, stamp(device) | settings)
    setting = prepare(arguments, device)
    competing = arms(setting, arguments.methods, arguments.forms)
    with compilation(arguments.compile):
        try:
            compete(setting, competing, arguments.turns, log, until)
            released.measure(arguments.official_dir, log, arguments.turns, device=device)
        finally:
            show(last(log.rows), as_json=arguments.json)
    return 0


def compilation(on: bool) -> Any:
    return torch._dynamo.config.patch(RECOMPILATIONS) if on else nullcontext()


def compete(
    setting: Setting, competing: Sequence[Sequence[Arm]], turns: int, log: Log, until: float = math.inf
) -> None:
    """`measure` with a progress bar. A method's rows are written after each of its turns, so the last ones count."""
    plain, count = plain_arm(), sum(map(len, competing))
    turns = turns if until == math.inf else MOST_TURNS
    total = warm_ups(setting) * (1 + count) + turns * (count + len(competing))
    with tqdm(total=None if until < math.inf else total, unit="image", dynamic_ncols=True) as bar:

        def progress(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        def keep(group: Sequence[Arm]) -> None:
            for row in rows(plain, [group]):
                log.write(row)

        measure(setting, plain, competing, turns, progress, keep, until)


def show(written: Sequence[Row], *, as_json: bool) -> None:
    if as_json:
        print(*map(json.dumps, written), sep="\n")
        return
    for kind, table in (("overhead", overhead_table), ("official", official_table)):
        if any(row["kind"] == kind for row in written):
            print(table(written), end="\n\n")


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
    defaults = DEFAULTS["cpu" if device.type == "cpu" else "cuda"]
    if arguments.arch == "shapes":
        defaults = defaults | {"size": architectures.SIZES["shapes"]}
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
