"""Attention Regulation: cross-attention maps optimised on the fly so that every target token is attended to."""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .._layers import LayerChoice, check_choice, last_down_first_up
from .._numbers import check_count, check_number, check_steps, step_count
from .._tokens import Targets, check_targets, padded
from ._base import Call, Edited

if TYPE_CHECKING:
    from .._layers import Layer

CONVENTIONS = ("official", "paper")


@dataclass(frozen=True)
class AttentionRegulation:
    """Attention Regulation (arXiv 2403.06381, ECCV 2024, Eq. 9-15).

    In the first sampling steps, in a few cross-attention layers, a bias on the target tokens' logits is optimised by
    gradient descent until their attention maps are high somewhere and of similar mass, then averaged with that of the
    step before. Only the conditional rows are edited, and every sample as if it were alone: what it becomes does not
    depend on its batch.

    Args:
        targets: words, phrases (all their tokens, at their first occurrence) or token ids (positions in the context, 0
            is the start of text): one list for every prompt, or one list per prompt. With prompt embeddings, ids only.
        layers: name prefixes such as `["down_blocks.2", "up_blocks.1"]`, or `by_downsampling(n)`. None takes the last
            down block and the first up block that have cross-attention.
        edit_steps: the first steps to edit; an int counts them, a float is a share of the steps that the call runs
            (of the schedule from its first timestep on), rounded down. Where a second-order scheduler (Heun) evaluates
            the UNet twice in a step, both are edited; PNDM's repeated timestep counts as a step.
        strength: factor of the bias. Zero leaves the pipeline's own attention in place, bit for bit.
        steps, step_size: of the descent (`ops.regulate`).
        ema: weight of the previous evaluation's bias (before averaging) in the bias used; at the first evaluation that
            of the initial weights stands in for it.
        decay: the bias of step t is multiplied by `decay**t`.
        pin_special: put the attention of start- and end-of-text back to its unedited value. With prompt embeddings the
            end of the text is unknown, and only the start is put back.
        convention: `"official"` (the released code) or `"paper"`: centres, objective and whether the bias is added
            before or after scaling the logits.
        seed: of the initial weights, which are drawn afresh, uniform in [0, 1), at every layer and evaluation from a
            generator of its own: neither the pipeline's generators nor the global one are used.
        sigma, quantile, level, mass, mass_weight, penalty: as for `ops.regulate`; None for the convention's default.

    Raises:
        ValueError: an argument out of range. Targets that do not fit the prompts are reported when the pipeline is
            called, before its first step.
    """

    targets: Targets
    _: KW_ONLY
    layers: LayerChoice = None
    edit_steps: int | float = 0.5
    strength: float = 1.0
    steps: int = 20
    step_size: float = 100.0
    ema: float = 0.25
    decay: float = 0.99
    pin_special: bool = True
    convention: str = "official"
    seed: int = 0
    sigma: float | tuple[float, float] | None = None
    quantile: float = 0.9
    level: float = 0.9
    mass: float | None = None
    mass_weight: float | None = None
    penalty: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", check_targets(self.targets))
        object.__setattr__(self, "layers", check_choice(self.layers))
        check_steps("edit_steps", self.edit_steps)
        check_number("strength", self.strength, 0.0)
        check_count("steps", self.steps, 1)
        check_number("step_size", self.step_size, 0.0, open_low=True)
        check_number("ema", self.ema, 0.0, 1.0)
        check_number("decay", self.decay, 0.0, 1.0, open_low=True)
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"convention is {self.convention!r}; it must be one of {', '.join(map(repr, CONVENTIONS))}"
            )
        check_count("seed", self.seed, 0)
        for value in self.sigma if isinstance(self.sigma, tuple) else (self.sigma,):
            if value is not None:
                check_number("sigma", value, 0.0, open_low=True)
        check_number("quantile", self.quantile, 0.0, 1.0)
        check_number("level", self.level, 0.0, 1.0)
        for name in ("mass", "mass_weight", "penalty"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0.0)

    @classmethod
    def official(cls, targets: Targets, **overrides: Any) -> AttentionRegulation:
        """The authors' released code: the defaults of this class."""
        return cls(targets, **overrides)

    @classmethod
    def paper(cls, targets: Targets, **overrides: Any) -> AttentionRegulation:
        """The paper's equations: S added before scaling, centres counted from 1, distance to the unedited maps as
        penalty (weight 0.1), no columns put back.

        The other numbers are the released code's: number and size of the descent's steps, kappa (`ema`), lambda
        (`decay`), t_thres (`edit_steps`), mu and alpha (`mass`, `mass_weight`).
        """
        return cls(targets, **{"convention": "paper", "pin_special": False, **overrides})

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return last_down_first_up(layers)

    def start(self, call: Call) -> _Regulating:
        return _Regulating(self, call)


class _Regulating:
    """Attention regulation during one pipeline call."""

    def __init__(self, method: AttentionRegulation, call: Call) -> None:
        self.method, self.call = method, call
        positions = call.prompts.positions(method.targets)
        pinned = call.prompts.special() if method.pin_special else [[] for _ in positions]
        for row, pins in zip(positions, pinned, strict=True):
            both = sorted(set(row) & set(pins))
            if both:
                raise ValueError(
                    f"targets holds the token id {both[0]}, the start or end of text, whose attention pin_special=True "
                    "puts back; leave it out or pass pin_special=False"
                )
        self.target_ids = _id_tensor(positions, call.images)
        self.pinned_ids = _id_tensor(pinned, call.images)
        self.previous: dict[str, Tensor] = {}

    def active(self) -> bool:
        return self.method.strength > 0 and self.call.step < step_count(self.method.edit_steps, self.call.steps)

    def attend(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Edited:
        method, call = self.method, self.call
        if self.target_ids.device != q.device:
            self.target_ids, self.pinned_ids = (_moved(x, q.device) for x in (self.target_ids, self.pinned_ids))
        grid = layer.grid(call.latents)
        inside = method.convention == "paper"
        sigma, centres = method.sigma, method.convention
        stats = ops.target_statistics(
            q, k, v, self.target_ids, pinned_ids=self.pinned_ids, scale=scale, with_square=inside
        )
        theta = self._initial_theta(layer, stats.logits, ops.basis_shape(grid, sigma, centres))
        found = ops.regulate(
            stats,
            grid,
            theta=theta,
            objective=method.convention,
            steps=method.steps,
            step_size=method.step_size,
            bias_scale=scale if inside else 1.0,
            previous=self.previous.get(layer.name),
            ema=method.ema,
            strength=method.strength * method.decay**call.step,
            quantile=method.quantile,
            level=method.level,
            mass=method.mass,
            mass_weight=method.mass_weight,
            penalty=method.penalty,
            sigma=sigma,
            centres=centres,
        )
        self.previous[layer.name] = found.theta
        out = ops.merge_targets(stats, v, self.target_ids, found.bias, pinned_ids=self.pinned_ids)
        return Edited(out, found.bias, self.target_ids, self.pinned_ids)

    def _initial_theta(self, layer: Layer, logits: Tensor, centres: tuple[int, int]) -> Tensor:
        """Uniform weights `[B,H,T,r_y,r_x]`, the same for every sample, whatever the batch and its longest list of
        targets."""
        batch, heads, targets, _ = logits.shape
        theta = initial_theta(self.method.seed, layer.name, self.call.evaluation, heads, targets, centres)
        return _moved(theta.to(logits.dtype).expand(batch, -1, -1, -1, -1), logits.device)


def initial_theta(seed: int, layer: str, evaluation: int, heads: int, targets: int, centres: tuple[int, int]) -> Tensor:
    """Uniform weights `[H,T,r_y,r_x]` of one layer at one evaluation of the UNet, on the CPU."""
    key = f"{seed}/{layer}/{evaluation}"
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    generator = torch.Generator().manual_seed(number)
    # Target by target, so that the first targets' weights do not depend on how many there are.
    return torch.stack([torch.rand(heads, *centres, generator=generator) for _ in range(targets)], 1)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from pinned memory to a GPU, where the host would otherwise wait for everything before it."""
    if device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _id_tensor(rows: list[list[int]], images: int) -> Tensor:
    """Ids as `[T]` where they are the same for every prompt, else `[samples, T]` padded with -1."""
    if all(row == rows[0] for row in rows):
        return torch.tensor(rows[0], dtype=torch.int64)
    return padded(rows).repeat_interleave(images, 0)
