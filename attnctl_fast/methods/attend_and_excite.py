"""Attend-and-Excite: the latents move until every target token is attended to somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_smoothing
from ..attach.call import Call
from ..attach.prompts import Prompts, Targets, check_targets, padded, shown_ranges
from .latent_guidance import Bounds, LatentGuidance, check_bounds, sampled
from .map_guidance import GuidanceContext

THRESHOLDS: Mapping[int, float | None] = {0: 0.05, 10: 0.5, 20: 0.8}


@dataclass(frozen=True)
class AttendAndExcite(LatentGuidance):
    """Move the latents until every target is attended to somewhere.

    Attend-and-Excite (arXiv 2301.13826, SIGGRAPH 2023).

    The loss is one minus the highest attention to the least attended target, of attention that is sharpened and shared
    out anew among all tokens but the start of text, then smoothed. Attention in joint layers (SD 3, FLUX), of which the
    image has its part, is shared out without sharpening: divided by its sum over the words of the prompt.

    Args:
        targets: words, phrases (all their tokens, at their first occurrence) or token ids (positions in the context):
            one list for every prompt, or one list per prompt. With prompt embeddings, ids only.
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, as in `LatentGuidance`.
        steps: the first steps to guide, a count or a share, as in `LatentGuidance`.
        scale: length of the step on the latents.
        schedule: its factor over the call, as in `attnctl_fast.schedules`.
        thresholds: at which steps the latents are moved until every target's highest attention is at least so much, or
            `max_refinements` times. Of the default's steps, those that a call does not run are left out.
        sharpness: factor of the attention before the softmax over the tokens.
        text_only: share out among the prompt's own tokens only, without the end of text and the padding, as the
            released code does for SD 2.1. Needs a prompt, not embeddings. Where the text is not CLIP's alone
            (transformers) it is always so, as far as the prompt is known.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.
        max_refinements: how often the latents are moved at most, at each step with a threshold.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. Targets that do not fit the prompts, and thresholds at steps that the call
            does not run, are reported when the pipeline is called, before its first step.
    """

    targets: Targets
    _: KW_ONLY
    steps: int | float = 25
    thresholds: Bounds = field(default_factory=lambda: dict(THRESHOLDS))
    sharpness: float = 100.0
    text_only: bool = False
    sigma: float = 0.5
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", check_targets(self.targets))
        object.__setattr__(self, "thresholds", check_bounds("thresholds", self.thresholds))
        for step, threshold in dict(self.thresholds).items():
            if threshold is not None:
                check_number(f"thresholds[{step}]", threshold, 0.0, 1.0)
        if self.refinement:
            raise ValueError(
                f"refinement is {dict(self.refinement)}; AttendAndExcite takes thresholds={{step: attention}} instead"
            )
        check_number("sharpness", self.sharpness, 0.0, open_low=True)
        check_smoothing(self.sigma, self.kernel_size)

    @classmethod
    def official(cls, targets: Targets, **overrides: Any) -> AttendAndExcite:
        """Construct the authors' released code, and diffusers': the defaults of this class."""
        return cls(targets, **overrides)

    @classmethod
    def paper(cls, targets: Targets, **overrides: Any) -> AttendAndExcite:
        """Construct the paper's algorithm, which checks every move of a refinement at once.

        The numbers are the released code's.
        """
        return cls(targets, **{"late_check": False, **overrides})

    def bounds(self, steps: int) -> dict[int, float | None]:
        thresholds = sampled("thresholds", dict(self.thresholds), steps, THRESHOLDS)
        return {step: None if value is None else 1 - value for step, value in thresholds.items()}

    def prepare(self, call: Call) -> _Prepared:
        prompts = call.prompts
        positions, sharing = prompts.positions(self.targets), self._sharing(prompts)
        for row, tokens in zip(positions, sharing, strict=True):
            outside = next((position for position in row if position not in tokens), None)
            if outside is not None:
                raise ValueError(
                    f"targets holds the token id {outside}, but attention is shared out among the tokens "
                    f"{shown_ranges(tokens)}; leave it out"
                )
        shared = torch.zeros(prompts.count, prompts.length, dtype=torch.bool)
        for index, tokens in enumerate(sharing):
            shared[index, tokens] = True
        return _Prepared(*(rows.repeat_interleave(call.images, 0) for rows in (padded(positions), shared)))

    def _sharing(self, prompts: Prompts) -> list[list[int]]:
        """Return the tokens that share attention, one list per prompt."""
        own = prompts.own()
        if self.text_only and own is None:
            raise ValueError(
                "text_only=True needs a prompt whose end of text is known; pass text instead of embeddings, or "
                "text_only=False"
            )
        if prompts.clip_alone and not self.text_only:
            return [list(range(1, prompts.length - 1))] * prompts.count
        return [list(range(prompts.length))] * prompts.count if own is None else own

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        context.prepared = prepared = context.prepared.to(maps.device)
        return max_attention_loss(
            maps,
            prepared.targets,
            context.grid,
            sharing=prepared.sharing,
            sharpness=None if context.joint else self.sharpness,
            sigma=self.sigma,
            kernel_size=self.kernel_size,
        )


class _Prepared(NamedTuple):
    """The facts of the prompts that the loss needs.

    targets: of every sample, `[B,T]`, padded with -1. sharing: which tokens share attention, `[B,N]` bool.
    """

    targets: Tensor
    sharing: Tensor

    def to(self, device: torch.device) -> _Prepared:
        return _Prepared(*(x.to(device) for x in self))


def max_attention_loss(
    maps: Tensor,
    targets: Tensor,
    grid: tuple[int, int],
    *,
    sharing: Tensor,
    sharpness: float | None = 100.0,
    sigma: float = 0.5,
    kernel_size: int = 3,
) -> Tensor:
    """Return Attend-and-Excite's loss: one minus the highest attention to the least attended target.

    Args:
        maps: attention to every token of the context, `[B,N,M]`.
        targets: the tokens that must be attended to, `[B,T]` int64, padded with -1; all of them share.
        grid: (height, width) with height*width == M.
        sharing: `[B,N]` bool, which tokens share the attention.
        sharpness: factor of the attention before the softmax by which they do; None for shares of their sum.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.

    Returns:
        The loss `[B]`, of the dtype of the maps.
    """
    outside = ~sharing[..., None]
    if sharpness is None:
        kept = maps.masked_fill(outside, 0.0)
        shares = kept / kept.sum(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    else:
        shares = (sharpness * maps).masked_fill(outside, -torch.inf).softmax(1)
    chosen = shares.gather(1, targets.clamp_min(0)[..., None].expand(-1, -1, maps.shape[2]))
    highest = ops.smooth_maps(chosen, grid, sigma=sigma, kernel_size=kernel_size).amax(2)
    return (1 - highest).clamp_min(0).masked_fill(targets < 0, 0).amax(1)
