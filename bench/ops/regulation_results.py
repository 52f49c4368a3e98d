"""Whether a result of attention regulation is right. Descents part where ranks swap, so that no bias can be compared
with the truth's; what can be is the lowest loss, whether the bias has it, and whether the output is that bias's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from bench.ops import rivals
from bench.ops.base import TOLERANCES, Judge, wide
from bench.ops.inputs import Case, Tensors, qkv

# Of the lowest loss.
LOSS_TOLERANCE = 0.02
# Between the losses that a form found in float32 and those at its bias in float64, which float32 rounds by 1e-7.
OWN_TOLERANCE = 1e-4


def lowest(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """From (losses [steps,B,H], ...), the lowest mean over batch and heads."""
    return (result[0].mean((1, 2)).amin(),)


def judge_solver(case: Case, t: Tensors) -> Judge:
    results = Results(case, t)
    return Judge(lowest, results.truth(), LOSS_TOLERANCE, results.check_bias)


def judge_layer(case: Case, t: Tensors) -> Judge:
    results = Results(case, t)
    return Judge(lowest, results.truth(), LOSS_TOLERANCE, results.check_layer)


class Results:
    """Judges results (losses [steps,B,H], bias [B,H,T,M]), by the bias of each, in float64 by the textbook."""

    def __init__(self, case: Case, t: Tensors) -> None:
        self.case, self.t, self.exact = case, t, wide(t)
        self.qkv = qkv(self.exact)
        self.stats = ops.target_statistics(*self.qkv, t["target_ids"], impl="reference")
        self.inverse = [torch.linalg.pinv(basis) for basis in rivals.axes(case.grid, self.exact["theta"])]

    def truth(self) -> tuple[Tensor, ...]:
        """The lowest loss."""
        how: dict[str, Any] = {"theta": self.exact["theta"], "steps": self.case.steps}
        return lowest((ops.regulate(self.stats, self.case.grid, **how, impl="reference").losses,))

    def check_bias(self, result: tuple[Tensor, ...]) -> None:
        """Raise ValueError unless the losses at the bias are those of the best step, of every sample or of all."""
        losses, bias = result[0].double(), result[1].double()
        theta = self.inverse[0] @ bias.unflatten(3, self.case.grid) @ self.inverse[1].mT
        found = ops.regulation_loss(self.stats, bias, theta=theta, impl="reference")
        totals = losses.mean(2)
        by_sample, together = totals.argmin(0), totals.mean(1).argmin().expand(totals.shape[1])
        samples = torch.arange(totals.shape[1], device=totals.device)
        best = torch.stack([losses[step, samples] for step in (by_sample, together)])
        off = float(((found - best).flatten(1).norm(dim=1) / best.flatten(1).norm(dim=1)).amin())
        if not off <= OWN_TOLERANCE:
            raise ValueError(f"losses at the bias are off the lowest by {off:.2g}, allowed {OWN_TOLERANCE:.2g}")

    def check_layer(self, result: tuple[Tensor, ...]) -> None:
        """The same of (losses, bias, output [B,H,M,d]), and unless the output is that of the bias."""
        self.check_bias(result)
        bias, out = (t.double() for t in result[1:])
        how: dict[str, Any] = {"pinned_ids": self.t["pinned_ids"], "impl": "reference"}
        expected = ops.biased_attention(*self.qkv, bias, self.t["target_ids"], **how)
        off, allowed = float((out - expected).norm() / expected.norm()), TOLERANCES[self.case.dtype]
        if not off <= allowed:
            raise ValueError(f"the output is off that of the bias by {off:.2g} of the norm, allowed {allowed:.2g}")
