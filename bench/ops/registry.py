"""Every operation, declared once, and what of them is timed: by name. The declarations are in the files of families."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.ops import attention, biased, context, joint, maps, regulation, rivals
from bench.ops.base import Comparison, Operation, Timed, Timing, case_of
from bench.ops.layers import Layer

DECLARED: dict[str, Operation] = {
    **attention.OPERATIONS,
    **regulation.OPERATIONS,
    **biased.OPERATIONS,
    **maps.OPERATIONS,
    **context.OPERATIONS,
    **joint.OPERATIONS,
}
# Those that the tests' rule for errors judges row by row, forward and backward; the first ones compute attention.
ATTENTION = (
    *("attention", "target_statistics", "attention_with_maps", "region_attention"),
    *("grouped_attention", "biased_attention", "regulated_attention", "maps_from_lse"),
)
LOSSES = ("regulation_loss_official", "regulation_loss_paper")
MAPS = tuple(name for name, operation in DECLARED.items() if operation.leaves == ("maps",))
JUDGED = (*ATTENTION, "gaussian_bias", "merge_targets", *LOSSES, *MAPS)
# Operation and timing, by the timing's name: the public function's, with what is differentiated behind it.
OPERATIONS: dict[str, tuple[Operation, Timing]] = {
    name: (operation, timing) for operation in DECLARED.values() for name, timing in operation.timings.items()
}


def named(part: str) -> list[str]:
    """The names of `OPERATIONS` that contain what `--only` says.

    Raises:
        ValueError: there is none.
    """
    found = [name for name in OPERATIONS if part in name]
    if not found:
        raise ValueError(f"--only {part!r} is in the name of no operation; there are {', '.join(OPERATIONS)}")
    return found


def timed(
    name: str, layer: Layer, dtype: torch.dtype, device: torch.device, compile: rivals.Compile = rivals.uncompiled
) -> Timed:
    """Put a timing of `OPERATIONS` on random inputs. compile: torch.compile, or what stands for it."""
    operation, timing = OPERATIONS[name]
    case = replace(case_of(layer, dtype, device), **timing.options)
    return Timed(operation, timing, case, case.tensors((*operation.inputs, *timing.also)), compile)


def comparison(
    name: str, layer: Layer, dtype: torch.dtype, device: torch.device, compile: rivals.Compile = rivals.uncompiled
) -> Comparison:
    """Compare the forms of a timing of `OPERATIONS` on random inputs."""
    return timed(name, layer, dtype, device, compile).comparison()


def launch(name: str, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    """Launch the kernels of a timing."""
    timed(name, layer, dtype, device).ours("triton")()
