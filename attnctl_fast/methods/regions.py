"""Regional prompting: prompts of their own for regions of the picture, in joint attention."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._numbers import check_count, check_number, check_steps, step_count
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import FAMILIES, family_of
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Method, Run
from ..ops.grouped_attention import KERNEL_GROUPS
from ._masks import Masks, Row, check_masks, on_grid, prompt_of


@dataclass(frozen=True)
class Regions(Method):
    """Draw a prompt of its own in every region of the picture.

    Regional prompting (arXiv 2411.02395), for joint attention: SD 3, FLUX.1 and FLUX.2. The regions' prompts, encoded
    as the pipeline encodes prompts, run through the model beside the prompt's text. Each sees itself and the image
    tokens in its mask; these see it and image tokens that share a mask with them (`ops.grouped_attention`). In the
    conditional rows, an image token's attention is `base` times that to the prompt and all of the image, plus
    `1 - base` times that within its regions. What the pooled embedding modulates, it modulates by the prompt's.

    Args:
        masks: a mapping from the regions' prompts to masks `[height, width]` of zeros and ones, as tensors, arrays or
            nested lists: all of one size, of the picture's proportions. One mapping for every prompt, or a list of one
            per prompt. Masks may overlap: an image token then sees the texts of all its regions.
        base: the share of the attention to the prompt, 0 to 1; at 1 the regions' texts have no effect.
        background: a prompt for what no mask covers. Without one, image tokens there keep the attention to the prompt,
            and no region sees them.
        steps: the first steps, in which it acts; an int counts steps, a float is a share of them, rounded down (but at
            least one step).
        every: regions act in every so many blocks, counted in each of the model's lists of blocks from the first one
            on. In the others the regions' texts and all of the image see each other.
        isolated: whether image tokens in a region see only those that share a mask with them, as in the released code;
            else they see all of the image.
        layers: name prefixes, or `by_downsampling(n)`: the layers in which regions act, as with `every`. None takes
            all.

    Raises:
        ValueError: an argument out of range, or a mask that is empty or not of zeros and ones. Masks of other
            proportions than the picture, or with too many different overlaps, are reported when the pipeline is called,
            before its first step.
    """

    masks: Masks
    _: KW_ONLY
    base: float = 0.1
    background: str | None = None
    steps: int | float = 0.4
    every: int = 1
    isolated: bool = True
    layers: LayerChoice = None

    single = True
    everywhere = True
    sends_text = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", check_masks(self.masks, prompt_of))
        object.__setattr__(self, "layers", check_choice(self.layers))
        check_number("base", self.base, 0.0, 1.0)
        check_steps("steps", self.steps)
        check_count("every", self.every, 1)
        if self.background is not None and (not isinstance(self.background, str) or not self.background.strip()):
            raise ValueError(f"background is {self.background!r}; pass a prompt, or None")

    def reaches(self, layer: Layer) -> bool:
        """Return whether it may act on a layer: on those of joint attention."""
        return bool(layer.text)

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        family = family_of(pipe)
        if not family.beside:
            known = ", ".join(one.model for one in FAMILIES if one.beside)
            raise ValueError(
                f"the pipeline has a {family.model}, but Regions sends the regions' prompts through {known} only; use "
                "DenseDiffusion, which draws phrases of the prompt where their masks are"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Drawing(self, call, sites)


class _Drawing(Run):
    """The regions' prompts in one call of a pipeline."""

    def __init__(self, method: Regions, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        rows: Any = method.masks
        count = call.prompts.count
        if len(rows) not in (1, count):
            raise ValueError(
                f"masks holds {len(rows)} mappings, but there are {count} prompts; pass one for all of them, or one "
                "per prompt"
            )
        self._rows: list[Row] = [rows[index % len(rows)] for index in range(count)]
        self._contexts = self._encoded()
        self._groups: tuple[Tensor, Tensor, Tensor, Tensor]
        self._here: tuple[Any, ...] = ()
        for site in sites:
            site.acts = site.chosen and int(site.layer.block.rpartition(".")[2]) % method.every == 0

    def _prompts(self, row: Row) -> list[str]:
        """Return the prompts of a sample's regions, that of the background last."""
        background = self.method.background
        return [str(text) for (text,), _ in row] + ([] if background is None else [background])

    def _encoded(self) -> Tensor:
        """Return the texts of every sample one after the other, `[samples,L,C]`, zeros where it has fewer regions."""
        texts = list(dict.fromkeys(text for row in self._rows for text in self._prompts(row)))
        contexts = self.call.encode(texts).contexts
        own = [torch.cat([contexts[texts.index(text)] for text in self._prompts(row)]) for row in self._rows]
        self._length = contexts.shape[1]
        return torch.nn.utils.rnn.pad_sequence(own, batch_first=True).repeat_interleave(self.call.images, 0)

    def encoded(self, embeddings: Tensor) -> Tensor:
        if self._contexts.shape[2] != embeddings.shape[2]:
            raise ValueError(
                f"the regions' context has width {self._contexts.shape[2]} but the prompt's {embeddings.shape[2]}; "
                "prompt embeddings must come from the pipeline's own text encoders"
            )
        return embeddings

    def before_denoiser(self, evaluation: Evaluation) -> None:
        method, rows, text = self.method, evaluation.rows, evaluation.text
        first = step_count(method.steps, self.call.steps)
        now = self.call.step < first
        self.used = first > 0 and method.base < 1
        self.active = self.used and (now or evaluation.compiled)
        self.more_text = None
        if not self.active or not rows.conditional:
            return
        self.more_text = rows.of_samples(self._contexts.to(text))
        here = rows, evaluation.columns, self._sites[0].grid, text.dtype, text.device
        if here != self._here:
            self._here, self._groups = here, self._grouped(evaluation)
        groups, acting, everywhere, share = self._groups
        # A compiled graph runs at all steps: behind the last one the attention is the prompt's.
        share = share if now else torch.ones_like(share)
        for site in self._sites:
            site.groups, site.allowed, site.share = groups, acting if site.acts else everywhere, share

    def _grouped(self, evaluation: Evaluation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what the sequence of every conditional row is.

        That is the group of each token `[E,S]`, which groups see which where regions act and where they do not `[G,G]`,
        and the share of the attention to the prompt `[E,1,S,1]`.
        """
        site = self._sites[0]
        count = self._contexts.shape[1] // self._length
        codes = torch.stack(
            [
                _codes(self._regions_of(row, site.grid), len(self._prompts(row)), count, self._length)
                for row in self._rows
            ]
        )
        texts, image = codes.split([count * self._length, site.grid[0] * site.grid[1]], 1)
        prompt = codes.new_zeros(len(codes), evaluation.columns)
        codes = torch.cat([texts, prompt, image] if site.layer.text == "first" else [image, prompt, texts], 1)
        kinds, groups = codes.unique(return_inverse=True)
        of_kind, acting, everywhere = _who_sees_whom(kinds, self.method.isolated)
        share = torch.ones(codes.shape, dtype=torch.float64)
        share[_regions(codes) > 0] = self.method.base
        share[_is_text(codes)] = 0.0
        rows, text = evaluation.rows, evaluation.text
        wide = torch.promote_types(text.dtype, torch.float32)
        groups, share = (x.repeat_interleave(self.call.images, 0) for x in (of_kind[groups], share[:, None, :, None]))
        return (
            rows.of_samples(groups.to(text.device)),
            acting.to(text.device),
            everywhere.to(text.device),
            rows.of_samples(share.to(text.device, wide)),
        )

    def _regions_of(self, row: Row, grid: tuple[int, int]) -> Tensor:
        """Return the regions of every image token as bits, `[M]`, int64."""
        masks = on_grid(row, self.call.latents, grid).long()
        bits = (masks << torch.arange(len(row))[:, None]).sum(0)
        return bits if self.method.background is None else bits.masked_fill(bits == 0, 1 << len(row))

    def sequence(self, site: Site, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
        # Another picture to look at stands behind the image, and has no region.
        beyond = q.shape[2] - site.groups.shape[1]
        groups, share = F.pad(site.groups, (0, beyond)), F.pad(site.share, (0, 0, 0, beyond), value=1.0)
        regional, _ = ops.grouped_attention(q, k, v, groups, groups, site.allowed, scale=scale, return_lse=True)
        return regional.to(share.dtype).lerp(out.to(share.dtype), share).to(out.dtype)


# A token of the sequence as a number: 0 takes no part, an image token in the regions of some bits is twice these and 1,
# a token of a region's text twice the region's bit and 2.
def _codes(bits: Tensor, own: int, count: int, length: int) -> Tensor:
    """Return the tokens of the texts, `own` of `count` with so many each, and those of the image with these regions."""
    texts = [2 + (2 << i) if i < own else 0 for i in range(count)]
    return torch.cat([torch.tensor(texts).repeat_interleave(length), 2 * bits + 1])


def _is_text(codes: Tensor) -> Tensor:
    return (codes % 2 == 0) & (codes > 0)


def _regions(codes: Tensor) -> Tensor:
    """Return the regions of tokens as bits."""
    return torch.where(codes % 2 == 1, codes, codes - 2).clamp(min=0) // 2


def _who_sees_whom(kinds: Tensor, isolated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the group of every kind of token, and which groups see which where regions act and where they do not.

    Kinds that see and are seen alike are one group. Group 0 takes no part.

    Raises:
        ValueError: more groups than the kernels take.
    """
    regions, image, part = _regions(kinds), kinds % 2 == 1, kinds > 0
    inside = regions > 0
    acting = (regions[:, None] & regions) != 0
    if not isolated:
        acting |= (image & inside)[:, None] & image
    everywhere = inside[:, None] & part
    alike = torch.cat([acting, acting.mT, everywhere, everywhere.mT], 1)
    distinct, of_kind = alike.unique(dim=0, return_inverse=True)
    count = len(distinct)
    if count > KERNEL_GROUPS:
        raise ValueError(
            f"the masks and their overlaps make {count} kinds of tokens, of which {KERNEL_GROUPS} are supported; draw "
            "fewer regions, or such that overlap less"
        )
    # One size, for one compiled graph.
    groups = torch.zeros(2, KERNEL_GROUPS, KERNEL_GROUPS, dtype=torch.bool)
    groups[0, of_kind[:, None], of_kind], groups[1, of_kind[:, None], of_kind] = acting, everywhere
    return of_kind, groups[0], groups[1]
