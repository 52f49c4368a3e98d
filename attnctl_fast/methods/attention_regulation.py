"""Attention Regulation: cross-attention maps optimised on the fly so that every target token is attended to."""

from __future__ import annotations

import hashlib
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_count, check_number, check_steps, step_count
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.layers import Layer, LayerChoice, check_choice, last_down_first_up, middle_third, of_transformer
from ..attach.prompts import Targets, check_targets, one_hot, padded
from ..attach.protocol import Edited, Method, Run
from ..attach.rows import Rows

CONVENTIONS = ("official", "paper")


@dataclass(frozen=True)
class AttentionRegulation(Method):
    """Optimise the targets' attention maps until every target is attended to.

    Attention Regulation (arXiv 2403.06381, ECCV 2024, Eq. 9-15).

    In the first sampling steps, in a few cross-attention layers, a bias on the target tokens' logits is optimised by
    gradient descent until their attention maps are high somewhere and of similar mass, then averaged with that of the
    step before. Only the conditional rows are edited, and every sample, of a video every frame, as if it were alone:
    what it becomes does not depend on its batch. In joint attention (SD 3, FLUX.1, Chroma) a map is the share of text
    and image together, so that `level` and `mass` ask for more than in cross-attention.

    Args:
        targets: words, phrases (all their tokens, at their first occurrence) or token ids (positions in the context, 0
            is the start of text): one list for every prompt, or one list per prompt. With prompt embeddings, ids only.
        layers: name prefixes such as `["down_blocks.2", "up_blocks.1"]`, or `by_downsampling(n)`. None takes the last
            down block and the first up block that have cross-attention, and of a transformer the middle third of its
            blocks, without those of a single stream.
        edit_steps: the first steps to edit; an int counts them, a float is a share of the steps that the call runs
            (of the schedule from its first timestep on), rounded down. Where a second-order scheduler (Heun) evaluates
            the model twice in a step, both are edited; PNDM's repeated timestep counts as a step.
        strength: factor of the bias. Zero leaves the pipeline's own attention in place, bit for bit.
        steps: number of weights that the descent evaluates (`ops.regulate`).
        step_size: size of its steps.
        ema: weight of the previous evaluation's bias (before averaging) in the bias used; at the first evaluation that
            of the initial weights stands in for it.
        decay: the bias of step t is multiplied by `decay**t`.
        pin_special: put the attention of start- and end-of-text back to its unedited value. With prompt embeddings the
            end of the text is unknown, and only the start is put back.
        convention: `"official"` (the released code) or `"paper"`: centres, objective and whether the bias is added
            before or after scaling the logits.
        seed: of the initial weights, uniform in [0, 1) and others at every layer and evaluation, but the same on every
            device: neither the pipeline's generators nor the global one are used.
        sigma: width of the Gaussians in cells, one number or (along y, along x); None for the grid's default.
        quantile: which quantile of each target's map is aimed at.
        level: the aim of that quantile, a share of the attention.
        mass: the aim of each target's mean attention; None takes min(1, 0.2 T)/T for T targets.
        mass_weight: weight of that aim; None for the convention's default.
        penalty: weight of the penalty on the edit; None for the convention's default.

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

    edits_attention = True

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
        """Construct the authors' released code: the defaults of this class."""
        return cls(targets, **overrides)

    @classmethod
    def paper(cls, targets: Targets, **overrides: Any) -> AttentionRegulation:
        """Construct the paper's equations.

        S is added before scaling, centres are counted from 1, the distance to the unedited maps is a penalty (weight
        0.1), and no columns are put back.

        The other numbers are the released code's: number and size of the descent's steps, kappa (`ema`), lambda
        (`decay`), t_thres (`edit_steps`), mu and alpha (`mass`, `mass_weight`).
        """
        return cls(targets, **{"convention": "paper", "pin_special": False, **overrides})

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return middle_third(layers) if of_transformer(layers) else last_down_first_up(layers)

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Regulating(self, call, sites)


class _Regulating(Run):
    """Attention regulation during one pipeline call."""

    def __init__(self, method: AttentionRegulation, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        positions = call.prompts.positions(method.targets)
        pinned = call.prompts.special() if method.pin_special else [[] for _ in positions]
        for row, pins in zip(positions, pinned, strict=True):
            both = sorted(set(row) & set(pins))
            if both:
                raise ValueError(
                    f"targets holds the token id {both[0]}, the start or end of text, whose attention pin_special=True "
                    "puts back; leave it out or pass pin_special=False"
                )
        self._ids = tuple(_id_tensor(rows, call.images) for rows in (positions, pinned))
        self._rows: Rows | None = None
        self._strength: Tensor
        self._keys: Tensor
        self._shapes: list[torch.Size]
        self._sizes: list[int]

    def before_denoiser(self, evaluation: Evaluation) -> None:
        method, call, rows = self.method, self.call, evaluation.rows
        edited = step_count(method.edit_steps, call.steps)
        self.used = method.strength > 0 and edited > 0
        self.active = self.used and call.step < edited
        if not self.used or not rows.conditional:
            return
        sample = evaluation.sample
        if self._rows is None or rows.conditional != self._rows.conditional:
            self._rows = rows
            of_rows = (ids if ids.ndim == 1 else rows.of_samples(ids) for ids in self._ids)
            self.target_ids, self.pinned_ids = (_moved(ids, sample.device) for ids in of_rows)
            self._keys = _moved(self._weight_keys(len(rows.conditional)), sample.device)
            for site in self._sites:
                site.previous = {}
        strength = method.strength * method.decay**call.step if self.active else 0.0
        wide = torch.promote_types(sample.dtype, torch.float32)
        self._strength = torch.full((), strength, dtype=wide, device=sample.device)
        if self.active or not hasattr(self._sites[0], "theta"):
            # All layers' at once, since every kernel costs the host some microseconds.
            weights = uniform(self._keys, call.evaluation).to(wide).split(self._sizes)
            for site, shape, theta in zip(self._sites, self._shapes, weights, strict=True):
                site.theta = theta.view(shape)
        for site in self._sites:
            # Views of one picture have averages of their own.
            if call.view not in site.previous:
                site.previous[call.view] = site.theta.clone()
            site.average = site.previous[call.view]

    def edit(self, site: Site, attention: Attention) -> Edited:
        method = self.method
        q, k, v, scale = attention.q, attention.k, attention.v, attention.scale
        inside = method.convention == "paper"
        target_ids, pinned_ids = (attention.column_ids(ids) for ids in (self.target_ids, self.pinned_ids))
        stats = ops.target_statistics(
            q,
            k,
            v,
            target_ids,
            pinned_ids=pinned_ids,
            scale=scale,
            with_square=inside,
            key_bias=attention.key_bias,
        )
        found = ops.regulate(
            frame_by_frame(stats, site),
            site.grid,
            theta=site.theta,
            objective=method.convention,
            steps=method.steps,
            step_size=method.step_size,
            bias_scale=scale if inside else 1.0,
            previous=site.average,
            ema=method.ema,
            strength=self._strength,
            quantile=method.quantile,
            level=method.level,
            mass=method.mass,
            mass_weight=method.mass_weight,
            penalty=method.penalty,
            sigma=method.sigma,
            centres=method.convention,
        )
        if torch.compiler.is_compiling():
            site.average.copy_(found.theta)
        else:
            site.previous[self.call.view] = found.theta
        bias = found.bias if not site.frames else joined_frames(found.bias, len(q))
        out = ops.merge_targets(stats, v, target_ids, bias, pinned_ids=pinned_ids)

        def probabilities(logits: Tensor, head: int, rows: slice) -> Tensor:
            tokens = logits.shape[-1]
            targets = one_hot(target_ids, len(logits), tokens, logits)
            pinned = one_hot(pinned_ids, len(logits), tokens, logits).sum(1).bool()[:, None]
            biased = logits + bias[:, head, :, rows].to(logits.dtype).mT @ targets
            return torch.where(pinned, logits.softmax(-1), biased.softmax(-1))

        return Edited(out, probabilities)

    def _weight_keys(self, samples: int) -> Tensor:
        """Return the keys of the initial weights of all layers, one layer after the other.

        They are the same for every sample and every frame, whatever the batch and its longest list of targets.
        """
        method, targets = self.method, self.target_ids.shape[-1]
        keys = []
        for site in self._sites:
            centres = ops.basis_shape(site.grid, method.sigma, method.convention)
            of_one = weight_keys(method.seed, site.name, site.heads, targets, centres)
            keys.append(of_one.expand(samples * math.prod(site.frames), -1, -1, -1, -1))
        self._shapes, self._sizes = [x.shape for x in keys], [x.numel() for x in keys]
        return torch.cat([x.flatten() for x in keys])


def frame_by_frame(stats: ops.TargetStatistics, site: Site) -> ops.TargetStatistics:
    """Return the statistics with every frame of a video as a sample of its own, without their attention."""
    if not site.frames:
        return stats

    def apart(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(-1, (*site.frames, -1)).movedim(-2, 1).flatten(0, 1)

    lse, logits, square = apart(stats.rest_lse), apart(stats.logits), apart(stats.rest_square)
    assert lse is not None and logits is not None
    return ops.TargetStatistics(lse.new_empty(*lse.shape, 0), lse, logits, square, None)


def joined_frames(bias: Tensor, samples: int) -> Tensor:
    """Return the bias of samples `[B,H,T,M]` of that of their frames."""
    return bias.unflatten(0, (samples, -1)).movedim(1, -2).flatten(-2)


def weight_keys(seed: int, layer: str, heads: int, targets: int, centres: tuple[int, int]) -> Tensor:
    """Return what tells the initial weights `[H,T,r_y,r_x]` of a layer apart, int64 below 2^32, on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{layer}".encode(), digest_size=4).digest()
    shape = (targets, heads, *centres)
    # Target by target, so that the first targets' weights do not depend on how many there are.
    count = torch.arange(math.prod(shape)).view(shape).transpose(0, 1)
    return scrambled((count + int.from_bytes(digest, "little")) & 0xFFFFFFFF)


def scrambled(x: Any) -> Any:
    """Return a permutation of the numbers below 2^32 that leaves no pattern, of ints or an int64 tensor.

    Products stay below 2^59, so that they are the same on every device.
    """
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def uniform(keys: Tensor, evaluation: int) -> Tensor:
    """Return numbers of [0, 1) in float32, one for every key, for an evaluation of the model: the same on every device.

    Nothing is drawn in turn, so that they are made where they are used.
    """
    return (scrambled(keys ^ scrambled(evaluation)) >> 8).float() * 2.0**-24


def initial_theta(seed: int, layer: str, evaluation: int, heads: int, targets: int, centres: tuple[int, int]) -> Tensor:
    """Return uniform weights `[H,T,r_y,r_x]` of one layer at one evaluation of the model, on the CPU."""
    return uniform(weight_keys(seed, layer, heads, targets, centres), evaluation)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """Return `x` on `device`.

    It goes from pinned memory to a GPU, where the host would otherwise wait for everything before it.
    """
    if device.type == "cuda":
        return x.contiguous().pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _id_tensor(rows: list[list[int]], images: int) -> Tensor:
    """Return ids as `[T]` where they are the same for every prompt, else `[samples, T]` padded with -1."""
    if all(row == rows[0] for row in rows):
        return torch.tensor(rows[0], dtype=torch.int64)
    return padded(rows).repeat_interleave(images, 0)
