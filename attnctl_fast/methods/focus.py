"""FOCUS: the velocity is corrected so that words of a subject attend alike, and subjects apart."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_smoothing
from ..attach.call import Call
from ..attach.prompts import Prompts, padded
from ._groups import Groups, check_groups, members
from .map_guidance import GuidanceContext
from .velocity_guidance import VelocityGuidance


@dataclass(frozen=True)
class FOCUS(VelocityGuidance):
    """Correct the velocity until the words of a subject attend to one place, and subjects to different ones.

    FOCUS (arXiv 2510.02315, CVPR 2026 workshop).

    The loss is the mean of two Jensen-Shannon divergences of smoothed, cubed maps, each between 0 and 1: the one
    between the words of a subject, and one minus the one between subjects. The released codes for SD 3 and FLUX.1 add
    the gradient with opposite signs; here both descend the loss.

    Args:
        groups: two or more subjects, each a group of words, phrases (all their tokens) or token ids, such as
            `[("red", "bag"), ("green", "apple")]`, for every prompt, or one such list per prompt. A group may be one
            word. Of a word that the prompt repeats, a group's last word stands for the first occurrence that no earlier
            group ended with, its other words for the occurrence nearest to that one. With prompt embeddings, ids only.
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, as in `VelocityGuidance`.
        steps: the first steps to guide, a count or a share; all in the released code.
        strength: factor of the correction, lambda in the paper; 1 to 5 there.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`; the root of a half is a Gaussian of one cell.
        kernel_size: its cells along an axis, odd.

    Raises:
        ValueError: an argument out of range. Groups that do not fit the prompts or share a token are reported when the
            pipeline is called, before its first step.
    """

    groups: Groups
    _: KW_ONLY
    sigma: float = 0.5**0.5
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", check_groups(self.groups, "groups", least_groups=2, least_words=1))
        check_smoothing(self.sigma, self.kernel_size)

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        return [[position for position, _ in row] for row in members(self.groups, prompts, "groups")]

    def prepare(self, call: Call) -> Tensor:
        rows = [[index for _, index in row] for row in members(self.groups, call.prompts, "groups")]
        return padded(rows).repeat_interleave(call.images, 0)

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        context.prepared = context.prepared.to(maps.device)
        return divergence_loss(maps, context.prepared, context.grid, sigma=self.sigma, kernel_size=self.kernel_size)


def divergence_loss(
    maps: Tensor, groups: Tensor, grid: tuple[int, int], *, sigma: float = 0.5**0.5, kernel_size: int = 3
) -> Tensor:
    """Return FOCUS's loss of attention maps: subjects that overlap, and words of a subject that do not.

    Args:
        maps: `[B,n,M]`; float.
        groups: `[B,n]` int64, the group of each, -1 where a map takes no part. Every sample has two groups at least.
        grid: (height, width) of the maps.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.

    Returns:
        The loss `[B]`, between 0 and 1, float32 (float64 for float64 maps).
    """
    smooth = ops.smooth_maps(maps, grid, sigma=sigma, kernel_size=kernel_size)
    numbers = torch.arange(groups.shape[1], device=groups.device)
    member = (groups[:, None] == numbers[:, None]).to(smooth.dtype)
    within = jensen_shannon(smooth, member)
    several = (member.sum(2) > 1).to(smooth.dtype)
    means = member @ smooth / member.sum(2, keepdim=True).clamp_min(1)
    between = jensen_shannon(means, (member.sum(2) > 0)[:, None].to(smooth.dtype))[:, 0]
    return ((within * several).sum(1) / several.sum(1).clamp_min(1) + 1 - between) / 2


def jensen_shannon(maps: Tensor, member: Tensor) -> Tensor:
    """Return how much the maps of each set differ, from 0 (alike) to 1 (nowhere both).

    It is the mean Kullback-Leibler divergence of the cubed maps, as shares of their sums, from their mean, over the
    logarithm of their number; 0 for a single map.

    Args:
        maps: `[B,n,M]`, at least 0.
        member: `[B,S,n]`, 1 where a map belongs to a set and 0 elsewhere.

    Returns:
        The divergences `[B,S]`.
    """
    tiny = torch.finfo(maps.dtype).tiny
    # Shares do not change with a factor of a map, which keeps the cubes within the numbers of float32.
    cubes = (maps / maps.detach().amax(2, keepdim=True).clamp_min(tiny)) ** 3
    shares = cubes / cubes.sum(2, keepdim=True).clamp_min(tiny)
    count = member.sum(2)
    weights = member / count.clamp_min(1)[..., None]
    mean = weights @ shares
    each = (weights @ (shares * (shares + 1e-10).log())).sum(2)
    return (each - (mean * (mean + 1e-10).log()).sum(2)) / count.clamp_min(2).log()
