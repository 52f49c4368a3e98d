"""DenseDiffusion: phrases drawn where their masks are, by modulated cross- and self-attention."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_steps, step_count
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Edited, Method, Run
from ..attach.rows import Rows
from ._masks import Masks, Row, check_masks, on_grid

CONVENTIONS = ("official", "paper")


@dataclass(frozen=True)
class DenseDiffusion(Method):
    """Draw phrases where their masks are.

    DenseDiffusion (arXiv 2308.12964, ICCV 2023).

    In the first sampling steps, in the conditional rows, logits are pulled towards the highest of their row where image
    token and key belong together, and towards the lowest where they do not (`ops.region_attention`). In
    cross-attention, an image token belongs to the tokens of the phrases in whose masks it lies; start and end of text
    and words without a mask belong to none. In self-attention, image tokens belong together that share a mask. The
    weight is `strength * (t/T)**decay * (1 - area * S)` with t of T the timestep and S the image token's share of the
    picture, the area of its masks.

    Args:
        masks: a mapping from phrases (words that stand side by side in the prompt, all their tokens at their first
            occurrence), token ids or tuples of these to masks `[height, width]` of zeros and ones, as tensors, arrays
            or nested lists: all of one size, of the picture's proportions. One mapping for every prompt, or a list of
            one per prompt. Masks may overlap and leave cells free; a token that several name is the last one's. They
            are resized to the latents and then to every layer's grid, to the nearest cell, and hold in every frame of a
            video.
        layers: name prefixes or `by_downsampling(n)`, of cross- and self-attention. None takes all.
        edit_steps: the first steps to edit; an int counts them, a float is a share of the steps that the call runs,
            rounded down (but at least one step), and with the paper's convention of the noise schedule: the steps with
            t/T > 1 - edit_steps.
        cross_strength: w in cross-attention. At zero the pipeline's own attention stays in place; with both strengths
            at zero its picture, bit for bit.
        self_strength: w in self-attention, likewise, and in joint attention (SD 3, FLUX), where text and image share
            rows; there image tokens belong together with text tokens and with image tokens as above.
        decay: exponent of the timestep.
        area: how much the size of a mask counts against its strength.
        encode_phrases: encode every phrase by itself as well, and give its tokens in the prompt these embeddings, in
            all steps. Phrases given as token ids keep those of the prompt, and so do all phrases in transformers, whose
            text is not CLIP's alone.
        convention: `"official"` (the released code) or `"paper"`. They differ in what a share of steps is, and where
            masks overlap: in the released code the areas of an image token's masks are added, in the paper it is the
            area that they cover.

    Raises:
        ValueError: an argument out of range, or a mask that is empty or not of zeros and ones. Phrases that are not in
            the prompt, and masks of other proportions than the picture, are reported when the pipeline is called,
            before its first step.
    """

    masks: Masks
    _: KW_ONLY
    layers: LayerChoice = None
    edit_steps: int | float = 0.3
    cross_strength: float = 1.0
    self_strength: float = 0.3
    decay: float = 5.0
    area: float = 1.0
    encode_phrases: bool = True
    convention: str = "official"

    edits_attention = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", check_masks(self.masks))
        object.__setattr__(self, "layers", check_choice(self.layers))
        check_steps("edit_steps", self.edit_steps)
        check_number("cross_strength", self.cross_strength, 0.0)
        check_number("self_strength", self.self_strength, 0.0)
        check_number("decay", self.decay, 0.0)
        check_number("area", self.area, 0.0, 1.0)
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"convention is {self.convention!r}; it must be one of {', '.join(map(repr, CONVENTIONS))}"
            )

    @classmethod
    def official(cls, masks: Masks, **overrides: Any) -> DenseDiffusion:
        """Construct the authors' released code: the defaults of this class."""
        return cls(masks, **overrides)

    @classmethod
    def paper(cls, masks: Masks, **overrides: Any) -> DenseDiffusion:
        """Construct the paper's equations.

        In 50 steps of DDIM, with masks that do not overlap, they are those of the released code.
        """
        return cls(masks, **{"convention": "paper", **overrides})

    def strength(self, layer: Layer) -> float:
        return self.cross_strength if layer.cross and not layer.text else self.self_strength

    def reaches(self, layer: Layer) -> bool:
        """Return whether it acts on a layer: cross- and self-attention, but what a strength of zero leaves alone."""
        return self.strength(layer) > 0 or not self.works()

    def works(self) -> bool:
        """Return whether there is anything to do."""
        return max(self.cross_strength, self.self_strength) > 0 and self.edit_steps > 0

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Modulating(self, call, sites)


class _Modulating(Run):
    """DenseDiffusion during one pipeline call."""

    def __init__(self, method: DenseDiffusion, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        rows: Any = method.masks
        count = call.prompts.count
        if len(rows) not in (1, count):
            raise ValueError(
                f"masks holds {len(rows)} mappings, but there are {count} prompts; pass one for all of them, or one "
                "per prompt"
            )
        self._rows: list[Row] = [rows[index % len(rows)] for index in range(count)]
        self._places = [
            [[call.prompts.find(target, index, "masks") for target in targets] for targets, _ in row]
            for index, row in enumerate(self._rows)
        ]
        self._columns = self._column_regions()
        alone = method.works() and method.encode_phrases and call.prompts.clip_alone
        self._phrases = self._encoded() if alone else {}
        self._grids: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._batch: Rows | None = None
        self._columns_here: Tensor
        self.used = method.works()

    def _column_regions(self) -> Tensor:
        """Return the regions of every text token, `[samples,N]`."""
        columns = torch.zeros(len(self._rows), self.call.prompts.length, dtype=torch.int32)
        for index, phrases in enumerate(self._places):
            for region, places in enumerate(phrases):
                columns[index, sum(places, [])] = 1 << region
        return columns.repeat_interleave(self.call.images, 0)

    def _encoded(self) -> dict[str, Tensor]:
        """Return the contexts `[N,C]` of the phrases that are given as text, each encoded by itself."""
        targets = [target for row in self._rows for targets, _ in row for target in targets]
        texts = list(dict.fromkeys(target.strip() for target in targets if isinstance(target, str)))
        return dict(zip(texts, self.call.encode(texts).contexts, strict=True)) if texts else {}

    def encoded(self, embeddings: Tensor) -> Tensor:
        if not self._phrases:
            return embeddings
        embeddings = embeddings.clone()
        samples = embeddings.unflatten(0, (len(self._rows), self.call.images))
        for index, row in enumerate(self._rows):
            for (targets, _), phrases in zip(row, self._places[index], strict=True):
                for target, places in zip(targets, phrases, strict=True):
                    if isinstance(target, str):
                        # After the start of text.
                        alone = self._phrases[target.strip()][1 : 1 + len(places)]
                        samples[index][:, places] = alone.to(embeddings)
        return embeddings

    def before_denoiser(self, evaluation: Evaluation) -> None:
        method, call, rows = self.method, self.call, evaluation.rows
        if not self.used or not rows.conditional:
            return
        if method.convention == "paper" and isinstance(method.edit_steps, float):
            self.active = call.time() > 1 - method.edit_steps
        else:
            self.active = call.step < step_count(method.edit_steps, call.steps)
        strength = call.time() ** method.decay if self.active else 0.0
        sample = evaluation.sample
        wide = torch.promote_types(sample.dtype, torch.float32)
        if self._batch is not rows:
            self._batch, self._grids = rows, {}
            self._columns_here = rows.of_samples(self._columns.to(sample.device))
            self._text = evaluation.columns if any(site.layer.text for site in self._sites) else 0
        weights: dict[tuple[tuple[int, int], float], Tensor] = {}
        for site in self._sites:
            if site.grid not in self._grids:
                regions, sizes = self._row_regions(site.grid)
                found = regions.to(sample.device), sizes.to(sample.device, wide)
                self._grids[site.grid] = rows.of_samples(found[0]), rows.of_samples(found[1])
            regions, sizes = self._grids[site.grid]
            site.rows, site.columns_of = regions, self._columns_of(site.layer, regions)
            key = site.grid, method.strength(site.layer)
            if key not in weights:
                weights[key] = sizes * (key[1] * strength)
            site.weight = weights[key]

    def _columns_of(self, layer: Layer, regions: Tensor) -> Tensor:
        """Return the regions of a layer's keys, `[B,N]`: text tokens, image tokens, or both as they stand in it."""
        if not layer.cross:
            return regions
        text = self._columns_here
        if not layer.text:
            return text
        text = text[:, : self._text]
        if layer.text == "last":
            image = regions.shape[1]
            return torch.cat([F.pad(regions, (0, layer.text_start(image) - image)), text], 1)
        # The model's own tokens belong to no region.
        return torch.cat([F.pad(text, (layer.before, 0)), regions], 1)

    def edit(self, site: Site, attention: Attention) -> Edited:
        # Of perturbed attention guidance's self-attention the plain rows alone, which come first.
        rows, columns, weight = (x[: len(attention.q)] for x in (site.rows, site.columns_of, site.weight))
        # Keys beyond text and image (another picture to look at) belong to no region.
        columns = F.pad(columns, (0, attention.k.shape[2] - columns.shape[1]))
        bias = attention.key_bias
        out = ops.region_attention(
            attention.q, attention.k, attention.v, rows, columns, weight, scale=attention.scale, key_bias=bias
        )

        def probabilities(logits: Tensor, head: int, here: slice) -> Tensor:
            kept = logits.isfinite()
            shared = (rows[:, here, None] & columns[:, None, :]) != 0
            lowest = logits.where(kept, torch.inf).amin(-1, keepdim=True)
            pull = torch.where(shared, logits.amax(-1, keepdim=True), lowest)
            return logits.lerp(pull, weight[:, here, None].to(logits.dtype)).where(kept, -torch.inf).softmax(-1)

        return Edited(out, probabilities)

    def _row_regions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the regions of every image token and 1 - area * S, `[samples,M]`."""
        regions, sizes = [], []
        for row in self._rows:
            masks = on_grid(row, self.call.latents, grid)
            bits = (masks.int() << torch.arange(len(row), dtype=torch.int32)[:, None]).sum(0, dtype=torch.int32)
            regions.append(bits)
            sizes.append(1 - self.method.area * self._shares(masks.double(), bits))
        # In every frame of a video they are the same.
        frames, images = math.prod(self.call.frames), self.call.images
        return tuple(torch.stack(x).repeat(1, frames).repeat_interleave(images, 0) for x in (regions, sizes))  # type: ignore[return-value]

    def _shares(self, masks: Tensor, bits: Tensor) -> Tensor:
        """Return S of every image token, `[M]`."""
        if self.method.convention == "official":
            return masks.mT @ masks.mean(1)
        distinct, place = bits.unique(return_inverse=True)
        return ((distinct[:, None] & bits) != 0).double().mean(1)[place]
