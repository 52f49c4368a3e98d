"""SynGen: the maps of a noun and of its modifiers overlap with each other, and with nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import schedules
from ..attach.call import Call
from ..attach.prompts import Prompts, Targets, check_targets, shown_ranges
from ._groups import Groups, Places, check_groups, places
from ._syntax import parsed_places
from .latent_guidance import LatentGuidance
from .map_guidance import GuidanceContext


@dataclass(frozen=True)
class SynGen(LatentGuidance):
    """Move the latents until the maps of a noun and its modifiers overlap, and no others do.

    SynGen (Linguistic Binding in Diffusion Models, arXiv 2306.08877, NeurIPS 2023), as in the authors' released code.

    With D the symmetric KL divergence of two maps, each over its sum, the loss is a sum over all pairs of a modifier m
    and its noun n: `D_mn - mean_u (D_mu + D_nu) / 2`, where u runs over the tokens of the prompt that belong neither to
    the noun nor to any of its modifiers; start and end of text are none. Between words of several tokens, D is the
    largest of all combinations.

    Args:
        pairs: which words modify which, as (modifier, noun) or (modifier, .., modifier, noun): words, phrases (all
            their tokens) or token ids, such as `[("red", "bag"), ("green", "apple")]`, for every prompt, or one such
            list per prompt. Of a word that the prompt repeats, a noun stands for the first occurrence that no earlier
            noun took, a modifier for the occurrence nearest to its noun. None finds them with spaCy, and leaves alone
            what has none.
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, as in `LatentGuidance`.
        steps: the first steps to guide, a count or a share, as in `LatentGuidance`.
        scale: length of the step on the latents.
        schedule: its factor over the call; the released code's step is the same at all 25 steps.
        refinement: at which steps the latents are moved again and again, as in `LatentGuidance`; the released code has
            none.
        max_refinements: how often at most.
        unrelated: the tokens u, in place of all others of the prompt; as `targets` of other methods. Prompt embeddings
            need it, and token ids in `pairs`.
        parser: where pairs is None, the name of a spaCy model, or a function from a text to its parsed words. The
            default is the released code's.
        late_check: end the refinement one move after the bound is met, as the released codes do.
        truncate: leave out what comes after the last layer that the loss reads; False only to measure the effect.
        freeze: keep the weights out of the gradient; False only to measure the effect.

    Raises:
        ValueError: an argument out of range. What does not fit the prompts, and spaCy missing, is reported when the
            pipeline is called, before its first step.
    """

    pairs: Groups | None = None
    _: KW_ONLY
    steps: int | float = 25
    schedule: schedules.ScheduleLike = field(default_factory=schedules.constant)
    unrelated: Targets | None = None
    parser: str | Callable[[str], Any] = "en_core_web_trf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is not None:
            object.__setattr__(self, "pairs", check_groups(self.pairs, "pairs", least_groups=1, least_words=2))
        if self.unrelated is not None:
            object.__setattr__(self, "unrelated", check_targets(self.unrelated, "unrelated"))
        if not callable(self.parser) and not (isinstance(self.parser, str) and self.parser):
            raise ValueError(f"parser is {self.parser!r}; pass the name of a spaCy model, or a function of a text")

    @classmethod
    def official(cls, pairs: Groups | None = None, **overrides: Any) -> SynGen:
        """Construct the authors' released code: the defaults of this class."""
        return cls(pairs, **overrides)

    def _places(self, prompts: Prompts) -> Places:
        return parsed_places(self.parser, prompts) if self.pairs is None else places(self.pairs, prompts, "pairs")

    def _tokens(self, prompts: Prompts, found: Places) -> list[list[int]]:
        words = prompts.own()
        if self.unrelated is None:
            if words is None:
                raise ValueError(
                    "SynGen pushes away from all other words of the prompt, which are unknown (prompt embeddings, or a "
                    "long prompt in pieces); pass a prompt, or token ids as unrelated="
                )
            others = words
        else:
            others = prompts.positions(self.unrelated, "unrelated")
        named = [{position for group in row for word in group for position in word} for row in found]
        known = [list(range(1, prompts.length))] * prompts.count if words is None else words
        for row, inside in zip(named, known, strict=True):
            outside = next((position for position in row if position not in inside), None)
            if outside is not None:
                raise ValueError(
                    f"pairs holds the token id {outside}, but the prompt's words are tokens {shown_ranges(inside)}"
                )
        rows = [sorted(row | set(other)) for row, other in zip(named, others, strict=True)]
        if not any(rows):
            raise ValueError("SynGen reads the words of the prompt, but it is empty; give the image a prompt")
        return rows

    def tokens(self, prompts: Prompts) -> list[list[int]]:
        return self._tokens(prompts, self._places(prompts))

    def prepare(self, call: Call) -> _Bindings:
        found = self._places(call.prompts)
        rows = self._tokens(call.prompts, found)
        others = rows if self.unrelated is None else call.prompts.positions(self.unrelated, "unrelated")
        longest = max(map(len, rows))
        words = max(sum(map(len, row)) for row in found)
        each = [_bindings(*one, words, longest) for one in zip(found, rows, others, strict=True)]
        return _Bindings(*(torch.stack(parts).repeat_interleave(call.images, 0) for parts in zip(*each, strict=True)))

    def loss(self, maps: Tensor, context: GuidanceContext) -> Tensor:
        context.prepared = prepared = context.prepared.to(maps)
        return symmetric_kl_loss(maps, *prepared)


class _Bindings(NamedTuple):
    """As in `symmetric_kl_loss`; pieces is bool."""

    pieces: Tensor
    attract: Tensor
    repel: Tensor

    def to(self, maps: Tensor) -> _Bindings:
        return _Bindings(self.pieces.to(maps.device), *(part.to(maps.device, maps.dtype) for part in self[1:]))


def _bindings(groups: list[list[list[int]]], row: list[int], others: list[int], words: int, tokens: int) -> _Bindings:
    """Return the bindings of one prompt, whose maps are those of the tokens in `row`."""
    column = {position: index for index, position in enumerate(row)}
    pieces = torch.zeros(words, tokens, dtype=torch.bool)
    attract = torch.zeros(words, words, dtype=torch.float64)
    repel = torch.zeros(words, tokens, dtype=torch.float64)
    first = 0
    for group in groups:
        noun = first + len(group) - 1
        inside = {position for word in group for position in word}
        outside = [column[position] for position in others if position not in inside]
        for index, word in enumerate(group, first):
            pieces[index, [column[position] for position in word]] = True
            pairs = len(group) - 1 if index == noun else 1
            if outside:
                repel[index, outside] = pairs / (2 * len(outside))
        attract[first:noun, noun] = 1
        first = noun + 1
    return _Bindings(pieces, attract, repel)


def symmetric_kl_loss(maps: Tensor, pieces: Tensor, attract: Tensor, repel: Tensor) -> Tensor:
    """Return a weighted sum of symmetric Kullback-Leibler divergences between maps, each over its sum.

    The divergence is the mean of both directions, and of words the largest among their tokens. Where a map is (nearly)
    zero, its logarithm is that of the dtype's epsilon.

    Args:
        maps: `[B,n,M]`, not negative; float32 or float64.
        pieces: `[B,W,n]` bool, which maps are those of each of W words.
        attract: `[B,W,W]`, weights of the divergences between words; zero on the diagonal.
        repel: `[B,W,n]`, weights of the divergences between words and tokens, which are subtracted.

    Returns:
        The loss `[B]`.
    """
    distance = symmetric_kl(maps)
    lowest = -torch.inf
    to_token = torch.where(pieces[..., None], distance[:, None], lowest).amax(2)  # [B,W,n]
    to_word = torch.where(pieces[:, None], to_token[:, :, None], lowest).amax(3)  # [B,W,W]
    attracted = torch.where(attract != 0, to_word, 0.0) * attract
    repelled = torch.where(repel != 0, to_token, 0.0) * repel
    return attracted.sum((1, 2)) - repelled.sum((1, 2))


def symmetric_kl(maps: Tensor) -> Tensor:
    """Return the mean of both Kullback-Leibler divergences of every two maps `[B,n,M]` over their sums, `[B,n,n]`."""
    total = maps.sum(2, keepdim=True)
    p = torch.where(total > 0, maps / torch.where(total > 0, total, 1.0), 0.0)
    # sum (p - q) (log p - log q) / 2, as products. Moved by a constant each, so that less cancels.
    flat = 1 / maps.shape[2]
    logs = p.clamp_min(torch.finfo(p.dtype).eps).mul(maps.shape[2]).log()
    products = (p - flat) @ logs.mT
    own = products.diagonal(dim1=1, dim2=2)
    return (own[:, :, None] + own[:, None] - products - products.mT) / 2
