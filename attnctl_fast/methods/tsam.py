"""T-SAM: the maps of the prompt's words become as alike as the text encoder's self-attention says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._impl import resolve
from .._numbers import check_number, check_smoothing
from ..attach.call import Call
from ..attach.prompts import Prompts, Targets, check_targets
from ..attach.text_attention import content_attention
from ..ops.map_similarity import KERNEL_TOKENS
from .latent_guidance import Bounds, LatentGuidance, sampled
from .map_guidance import GuidanceContext

VARIANTS = ("cosine", "normalised_cosine", "absolute")
REFINEMENT: Mapping[int, float | None] = {0: None, 10: None, 20: None}


@dataclass(frozen=True)
class TSAM(LatentGuidance):
    """Move the latents until words that belong together in the text have similar attention maps.

    T-SAM (arXiv 2411.15236, CVPR 2025).

    The loss compares the cosine similarities of the words' smoothed maps with the self-attention of the same words
    within the text encoder: mean over its layers and heads, without start and end of text, to the power gamma, rows
    normalised. With two text encoders side by side (SDXL, SD 3; the released code knows neither) it is the mean of the
    two, and of texts one behind the other (SD 3) the words of the first are compared. The self-attention of T5 (PixArt,
    FLUX, Chroma) is bidirectional; what the loss reads of it, below the diagonal, is normalised all the same. Language
    models (of Sana, Qwen-Image and others) are not supported. A prompt of one token has no loss, and one of two has
    none by the default variant.

    Prompts of more than 64 tokens are compared by PyTorch operations on a GPU too.

    Args:
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, as in `LatentGuidance`.
        steps: the first steps to guide, a count or a share, as in `LatentGuidance`.
        scale: length of the step on the latents.
        schedule: its factor over the call, as in `attnctl_fast.schedules`.
        refinement: at which steps the latents are moved again and again: by default `max_refinements` times at steps 0,
            10 and 20, as far as the call runs them. The released code stops after 20 of its 30 moves where the loss of
            a prompt of n = 5, 6 or 7 tokens is then above 0.14 (n - 1), and fails at other lengths; that is left out.
        max_refinements: how often at most.
        gamma: power of the self-attention.
        variant: which loss, as in `ops.similarity_loss`.
        weight: its weight; None for the variant's own.
        sigma: width of the smoothing in cells, as in `ops.smooth_maps`.
        kernel_size: its cells along an axis, odd.
        text_similarity: what the maps' similarities are compared with, instead of the self-attention: `[n,n]` for every
            prompt or `[prompts,n,n]`, used as it is below the diagonal (and on it, depending on the variant).
        targets: the n tokens that `text_similarity` is about, as words, phrases or token ids: one list for every
            prompt, or one list per prompt. None for all words of the prompt.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. What does not fit the call (embeddings instead of a prompt without
            `text_similarity` and `targets`, an empty prompt, another number of tokens) is reported when the pipeline is
            called, before its first step.
    """

    _: KW_ONLY
    steps: int | float = 30
    scale: float = 5.0
    refinement: Bounds = field(default_factory=lambda: dict(REFINEMENT))
    max_refinements: int = 30
    gamma: float = 3.0
    variant: str = "cosine"
    weight: float | None = None
    sigma: float = 0.5
    kernel_size: int = 3
    text_similarity: Tensor | None = field(default=None, compare=False)
    targets: Targets | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, 0.0, open_low=True)
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; it must be one of {', '.join(map(repr, VARIANTS))}")
        if self.weight is not None:
            check_number("weight", self.weight, 0.0)
        check_smoothing(self.sigma, self.kernel_size)
        _check_similarity(self.text_similarity)
        if self.targets is not None:
            if self.text_similarity is None:
                raise ValueError("targets names the tokens of text_similarity; pass both, or neither")
            object.__setattr__(self, "targets", check_targets(self.targets))

    @classmethod
    def official(cls, **overrides: Any) -> TSAM:
        """Construct the authors' released code: the defaults of this class."""
        return cls(**overrides)

    @classmethod
    def paper(cls, **overrides: Any) -> TSAM:
        """Construct the paper's gamma, 4; everything else is the released code's."""
        return cls(**{"gamma": 4.0, **overrides})

    def bounds(self, steps: int) -> dict[int, float | None]:
        return sampled("refinement", dict(self.refinement), steps, REFINEMENT)

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        if self.targets is not None:
            return prompts.positions(self.targets)
        content = prompts.content()
        if content is None:
            raise ValueError(
                "TSAM compares the words of the prompt, which are unknown (prompt embeddings, or a long prompt in "
                "pieces); pass a prompt, or text_similarity= and targets="
            )
        if not all(content[0]):
            raise ValueError("TSAM compares the words of the prompt, but one is empty; give every image a prompt")
        return content[0]

    def prepare(self, call: Call) -> _Prepared:
        prompts = call.prompts
        lengths = torch.tensor([len(row) for row in self.tokens(prompts)])
        longest = int(lengths.max())
        text = self.text_similarity
        if text is None:
            text = content_attention(call.pipe, prompts)
            real = torch.arange(longest, device=text.device) < lengths.to(text.device)[:, None]
            text = text_similarity(text, self.gamma).where(real[..., None], 0.0)
        elif text.shape[-1] != longest or text.shape[:-2] not in ((), (prompts.count,)):
            raise ValueError(
                f"text_similarity has shape {tuple(text.shape)}; for these prompts it must be [{longest}, {longest}] "
                f"or [{prompts.count}, {longest}, {longest}]"
            )
        text = text.detach().expand(prompts.count, -1, -1)
        return _Prepared(text.repeat_interleave(call.images, 0), lengths.repeat_interleave(call.images))

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        context.prepared = prepared = context.prepared.to(maps)
        return ops.similarity_loss(
            maps,
            prepared.text,
            context.grid,
            lengths=prepared.lengths,
            variant=self.variant,
            weight=self.weight,
            sigma=self.sigma,
            kernel_size=self.kernel_size,
            impl="eager" if _too_many(maps) else None,
        )


def _too_many(maps: Tensor) -> bool:
    """Return whether the kernels would be asked to compare more maps than they take: prompts go up to 75 tokens."""
    return maps.shape[1] > KERNEL_TOKENS and resolve(None, maps.device) == "triton"


class _Prepared(NamedTuple):
    """The targets of the similarities `[B,n,n]`, and the number of tokens of every sample `[B]`."""

    text: Tensor
    lengths: Tensor

    def to(self, maps: Tensor) -> _Prepared:
        return _Prepared(self.text.to(maps.device, maps.dtype), self.lengths.to(maps.device))


def text_similarity(attention: Tensor, gamma: float) -> Tensor:
    """Return attention `[..,n,n]` to the power gamma over its rows' sums."""
    # Over the largest first, so that a large power does not underflow.
    powered = (attention / attention.amax(-1, keepdim=True)) ** gamma
    return powered / powered.sum(-1, keepdim=True)


def _check_similarity(text: Tensor | None) -> None:
    if text is None:
        return
    if not isinstance(text, Tensor) or text.ndim not in (2, 3) or text.shape[-1] != text.shape[-2]:
        shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        raise ValueError(f"text_similarity is {shape}; it must be a tensor [n,n] or [prompts,n,n]")
    if not text.dtype.is_floating_point or not text.isfinite().all():
        raise ValueError(f"text_similarity ({text.dtype}) must hold finite floating-point numbers")
