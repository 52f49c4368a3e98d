"""Time of one regulated layer on a CPU: the published loop against `target_statistics`, `regulate` and `merge_targets`.

    python bench/regulate.py            append the figures to bench/results/cpu_regulate.jsonl and print them as a table
    python -m pytest bench/regulate.py  the same measurements in pytest-benchmark's own table

Both forms run one after the other in one process, at one and at two threads; a form's time is the better of its two.
The published loop is autograd on full logits (`reference.regulate_full_logits`), 20 steps, without the anomaly mode
that the released code leaves on. Its logits and its final attention are part of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu import record
from tables import regulate_table
from torch import Tensor

from attnctl_fast import ops, reference
from attnctl_fast.ops.gaussian_bias import full_basis

# B*H, M, T, head width: SD 2 and SD 1.5 at 512 px (16x16), SDXL at 1024 px (32x32), each at batch 1.
SHAPES = [(20, 256, 2, 64), (8, 256, 2, 64), (8, 256, 2, 160), (20, 1024, 3, 64)]
TOKENS = 77
PINNED = [0, 12]


def forms(heads: int, image_tokens: int, targets: int, width: int) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """The two forms, each returning the layer's output and the lowest loss."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, width, generator=generator) for n in (image_tokens, TOKENS, TOKENS))
    side = int(image_tokens**0.5)
    ids = [5, 8, 11][:targets]
    theta = torch.rand(1, heads, targets, *ops.basis_shape((side, side)), generator=generator)
    basis, scale = full_basis((side, side), None, "official", theta), width**-0.5
    columns, pinned = torch.tensor(ids), torch.tensor(PINNED)

    def published() -> tuple[Tensor, Tensor]:
        bias, _, losses = reference.regulate_full_logits(q @ k.mT * scale, columns, theta, basis)
        return reference.biased_attention(q, k, v, bias, columns, pinned, scale), losses.mean(-1).amin()

    def eager() -> tuple[Tensor, Tensor]:
        stats = ops.target_statistics(q, k, v, ids, pinned_ids=PINNED, impl="eager")
        found = ops.regulate(stats, (side, side), theta=theta, impl="eager")
        out = ops.merge_targets(stats, v, ids, found.bias, pinned_ids=PINNED, impl="eager")
        return out, found.losses.mean(-1).amin()

    return {"published": published, "eager": eager}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["published", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_regulated_layer(benchmark: Any, shape: tuple[int, int, int, int], form: str, threads: int) -> None:
    both = forms(*shape)
    # Trajectories may part where ranks swap (float32), so the losses that they end with are compared.
    torch.testing.assert_close(both["eager"]()[1], both["published"]()[1], rtol=0.02, atol=0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        benchmark.extra_info.update(shape=shape, form=form, threads=threads)
        benchmark.pedantic(both[form], rounds=20 if form == "published" else 100, warmup_rounds=3)
    finally:
        torch.set_num_threads(before)


def summary(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Per shape: both forms' median and quartiles in ms at their better thread count, and the ratio of the medians."""
    rows = []
    for shape in SHAPES:
        row: dict[str, Any] = dict(zip(("rows", "image_tokens", "targets", "head_width"), shape, strict=True))
        for form in ("published", "eager"):
            runs = [
                b
                for b in report["benchmarks"]
                if tuple(b["extra_info"]["shape"]) == shape and b["extra_info"]["form"] == form
            ]
            best = min(runs, key=lambda b: b["stats"]["median"])
            row[form] = {name: 1e3 * best["stats"][name] for name in ("median", "q1", "q3")}
            row[form]["threads"] = best["extra_info"]["threads"]
        row["ratio"] = row["published"]["median"] / row["eager"]["median"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    record(__file__, "cpu_regulate.jsonl", summary, regulate_table)
