"""CONFORM: maps of words that belong together attract each other, and repel those of other words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_smoothing
from ..attach.call import Call
from ..attach.prompts import Prompts, padded
from ._groups import Groups, check_groups, members
from .latent_guidance import Bounds, LatentGuidance, sampled
from .map_guidance import GuidanceContext

REFINEMENT: Mapping[int, float | None] = {0: None, 10: None, 20: None}


@dataclass(frozen=True)
class CONFORM(LatentGuidance):
    """Move the latents until maps of one group of words are alike, and maps of different groups are not.

    CONFORM (arXiv 2312.06059, CVPR 2024).

    The loss is the NT-Xent loss of the smoothed maps of all named tokens, together with the same tokens' maps from the
    end of the step before: tokens of a group are positive pairs, tokens of different groups negative ones. What is not
    named takes no part.

    Args:
        groups: two or more groups of words, phrases (all their tokens) or token ids, such as
            `[("red", "bag"), ("green", "apple")]`, for every prompt, or one such list per prompt. A group may be one
            word. Of a word that the prompt repeats, a group's last word stands for the first occurrence that no earlier
            group ended with, its other words for the occurrence nearest to that one. With prompt embeddings, ids only.
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, as in `LatentGuidance`.
        steps: the first steps to guide, a count or a share. 30 are those of the released example; the released
            pipeline's own default is 25.
        scale: length of the step on the latents.
        schedule: its factor over the call, as in `attnctl_fast.schedules`.
        refinement: at which steps the latents are moved again and again: by default `max_refinements` times at steps 0,
            10 and 20, as far as the call runs them; the released code has no bound. Where every group is a single
            token, the first step has nothing to compare with yet and moves nothing: leave step 0 out.
        max_refinements: how often at most.
        temperature: of the similarities.
        remember: compare with the maps of the step before. Without, tokens that are alone in their group attract
            nothing, and are repelled by nothing.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. Groups that do not fit the prompts or share a token are reported when the
            pipeline is called, before its first step.
    """

    groups: Groups
    _: KW_ONLY
    steps: int | float = 30
    refinement: Bounds = field(default_factory=lambda: dict(REFINEMENT))
    temperature: float = 0.5
    remember: bool = True
    sigma: float = 0.5
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", check_groups(self.groups, "groups", least_groups=2, least_words=1))
        check_number("temperature", self.temperature, 0.0, open_low=True)
        check_smoothing(self.sigma, self.kernel_size)

    @classmethod
    def official(cls, groups: Groups, **overrides: Any) -> CONFORM:
        """Construct the authors' released example: the defaults of this class."""
        return cls(groups, **overrides)

    def bounds(self, steps: int) -> dict[int, float | None]:
        return sampled("refinement", dict(self.refinement), steps, REFINEMENT)

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        return [[position for position, _ in row] for row in members(self.groups, prompts, "groups")]

    def prepare(self, call: Call) -> _Memory:
        rows = [[index for _, index in row] for row in members(self.groups, call.prompts, "groups")]
        return _Memory(padded(rows).repeat_interleave(call.images, 0))

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        memory = context.prepared
        memory.groups = memory.groups.to(maps.device)
        return contrastive_loss(
            maps,
            memory.groups,
            context.grid,
            previous=memory.maps,
            temperature=self.temperature,
            sigma=self.sigma,
            kernel_size=self.kernel_size,
        )

    def after_step(self, maps: Tensor, context: GuidanceContext) -> None:
        if self.remember:
            context.prepared.maps = maps


@dataclass
class _Memory:
    """The group of every token `[B,n]`, padded with -1, and the maps of the step before."""

    groups: Tensor
    maps: Tensor | None = None


def contrastive_loss(
    maps: Tensor,
    groups: Tensor,
    grid: tuple[int, int],
    *,
    previous: Tensor | None = None,
    temperature: float = 0.5,
    sigma: float = 0.5,
    kernel_size: int = 3,
) -> Tensor:
    """Return the NT-Xent loss of smoothed maps.

    It is the mean over all ordered pairs (a, p) of a group of `-log(e^(s_ap) / (e^(s_ap) + sum_n e^(s_an)))`, with s
    the cosine similarity over the temperature and n running over the maps of other groups.

    Args:
        maps: `[B,n,M]`; float.
        groups: `[B,n]` int64, a number for each group, -1 where a map takes no part.
        grid: (height, width) of the maps.
        previous: more maps `[B,n,M]` of the same tokens, which join their groups.
        temperature: of the similarities.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.

    Returns:
        The loss `[B]`, float32 (float64 for float64 maps); zero where no group has two maps.
    """
    if previous is not None:
        maps, groups = torch.cat([maps, previous], 1), torch.cat([groups, groups], 1)
    smooth = ops.smooth_maps(maps, grid, sigma=sigma, kernel_size=kernel_size)
    similarity = ops.map_similarity(smooth) / temperature
    real = (groups >= 0)[:, :, None] & (groups >= 0)[:, None]
    same = groups[:, :, None] == groups[:, None]
    others = similarity.masked_fill(same | ~real, torch.finfo(similarity.dtype).min).logsumexp(2, keepdim=True)
    itself = torch.eye(groups.shape[1], dtype=torch.bool, device=groups.device)
    positive = same & real & ~itself
    losses = torch.where(positive, torch.nn.functional.softplus(others - similarity), 0.0)
    return losses.sum((1, 2)) / positive.sum((1, 2)).clamp_min(1)
