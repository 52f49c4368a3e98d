"""What `bench gpu` measures, and so what `bench precompile` compiles for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.compile import tune
from bench.gpu import correctness
from bench.gpu.contest import Task
from bench.harness.timing import Clock
from bench.ops.layers import JOINT, LARGE, LAYERS, REGULATED, SELF, SMALL, TINY, Layer
from bench.ops.registry import OPERATIONS, launch

# Four images at once, for these.
BATCHED = ("regulated_layer", "attention", "regulated_attention", "attention_with_maps")


def tasks(dry: bool = False) -> tuple[list[Task], list[Task]]:
    """List the comparisons in two parts, in float16, the most important first: the aims and every operation at two
    layers; what is made of joint attention at its own, every operation at the other layers, SD 2's first, and some for
    four images. Classifier-free guidance doubles the batch of plain attention; everything else runs on the conditional
    half."""
    if dry:
        return [Task(name, TINY, torch.float32) for name in OPERATIONS], []

    def task(operation: str, layer: Layer, images: int = 1) -> Task:
        batch = images * (2 if operation == "attention" else 1)
        return Task(operation, layer._replace(batch=batch), torch.float16)

    first = [task(name, layer) for name in ("regulate", "regulated_layer") for layer in (SMALL, LARGE)]
    first += [task("attention", layer) for layer in LAYERS]
    first += [task("region_attention", SELF)]
    first += [task(name, layer) for layer in (SMALL, LARGE) for name in OPERATIONS]
    first = list(dict.fromkeys(first))
    others = sorted(REGULATED, key=lambda layer: layer.model != "SD 2")
    rest = [task(name, layer) for layer in others for name in OPERATIONS]
    batched = [task(name, layer, 4) for layer in (SMALL, LARGE) for name in BATCHED]
    joint = [task(name, layer) for layer in JOINT for name in ("maps_from_lse", "maps_from_lse_all")]
    joint += [task("grouped_attention", layer) for layer in JOINT if layer.targets <= 8]
    return first, [x for x in dict.fromkeys(joint + batched + rest) if x not in first]


def rivals(dry: bool = False) -> list[Task]:
    """List every operation at one layer, against what torch.compile makes, those that the aims name first, and regions
    of self-attention."""
    layer, dtype = (TINY, torch.float32) if dry else (SMALL, torch.float16)
    aims = ["regulated_layer", "regulate"]
    found = [Task(name, layer, dtype, compiled=True) for name in dict.fromkeys((*aims, *OPERATIONS))]
    if not dry:
        found.insert(len(aims), Task("region_attention", SELF, dtype, compiled=True))
    return found


def cases() -> list[tuple[str, Callable[[], Any]]]:
    """List all that `bench gpu` --one-shot launches, by name, to be recorded on a CPU."""
    clock = Clock(torch.device("cpu"))
    found: list[tuple[str, Callable[[], Any]]] = []
    for part in tasks():
        found += [
            (f"{x.operation} {x.layer.sizes}", partial(launch, x.operation, x.layer, x.dtype, clock.device))
            for x in part
        ]
    for check in (*correctness.first_checks(), *correctness.further_checks()):
        found.append((f"check {check.name} {check.case}", partial(correctness.launch, check)))
    for kernel, layers in tune.FIRST.items():
        for layer in layers:
            found.append((f"tuning {kernel} {layer.sizes}", partial(_launch_candidates, kernel, layer, clock)))
    return found


def _launch_candidates(kernel: str, layer: Layer, clock: Clock) -> None:
    tune.Tuner(clock, kernel, layer, torch.float16).launch(tune.CANDIDATES)
