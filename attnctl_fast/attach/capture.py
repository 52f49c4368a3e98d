"""Attention maps for looking at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .attention import Attention
from .call import Call, Site
from .evaluation import Evaluation
from .layers import LayerChoice
from .prompts import Targets, one_hot, padded
from .protocol import Method, Run
from .rows import Rows, taken


class AttentionMaps(Mapping[str, Tensor]):
    """Attention of the image to the text in the last pipeline call, by layer in order of execution.

    It is averaged over the heads, and of the conditional rows. In joint attention it is the model's own softmax over
    image and text together, so that a place's maps of all tokens add up to less than one.

    `maps["down_blocks.2.attentions.0.transformer_blocks.0.attn2"]` is a float32 CPU tensor
    `[evaluations, B, n, height, width]`: one entry per evaluation of the model (and view, of a panorama), B images
    (prompt by prompt), n tokens. Of a video it is `[evaluations, B, n, frames, height, width]`, with the frames of the
    latents. Where a method edits the layer, its edited maps are shown.

    Attributes:
        token_ids: the positions captured, one list per prompt.
        tokens: their strings, or None with prompt embeddings.
        words: the positions of every captured word, one dict per prompt, or None where the words are unknown.
    """

    def __init__(self) -> None:
        self._maps: dict[str, list[Tensor]] = {}
        self.token_ids: list[list[int]] = []
        self.tokens: list[list[str]] | None = None
        self.words: list[dict[str, list[int]]] | None = None

    def __getitem__(self, layer: str) -> Tensor:
        return torch.stack(self._maps[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def mean(self, layers: Sequence[str] | None = None, *, steps: slice | None = None) -> Tensor:
        """Return the mean over layers and steps, `[B, n, height, width]`, on the largest of their grids (bilinear).

        Of a video it is `[B, n, frames, height, width]`.

        Args:
            layers: names of captured layers; None for all.
            steps: which evaluations, such as `slice(0, 10)`; None for all.

        Raises:
            ValueError: nothing was captured there.
        """
        names = list(self) if layers is None else list(layers)
        chosen = [self[name][steps or slice(None)] for name in names if name in self._maps]
        if not chosen or len(chosen) < len(names) or not len(chosen[0]):
            raise ValueError(
                f"no maps of {names} at {steps or 'any step'}; captured are {list(self) or 'none: call the pipeline'}"
            )
        size = max((maps.shape[-2:] for maps in chosen), key=lambda grid: grid[0] * grid[1])
        # Of a video the frames lie among the tokens meanwhile.
        means = [maps.mean(0).flatten(1, -3) for maps in chosen]
        resized = [F.interpolate(maps, size=tuple(size), mode="bilinear", antialias=False) for maps in means]
        return torch.stack(resized).mean(0).unflatten(1, chosen[0].shape[2:-2])

    def per_word(self, layers: Sequence[str] | None = None, *, steps: slice | None = None) -> list[dict[str, Tensor]]:
        """Return every word's map `[height, width]`, one dict per image or video (prompt by prompt).

        It is the mean over layers and evaluations, as in `mean`, and over the word's tokens.

        The words are those that were captured, as they were named (token ids by their digits), or all words of the
        prompt as the tokenizer normalises them (CLIP: lower case), a repeated one as "dog", "dog (2)".

        Args:
            layers: names of captured layers; None for all.
            steps: which evaluations, as in `mean`; None for all.

        Raises:
            ValueError: nothing was captured there, or all tokens of a prompt whose words are unknown.
        """
        maps = self.mean(layers, steps=steps)
        if self.words is None:
            raise ValueError(
                "the words of the prompt are unknown (prompt embeddings, or a long prompt in pieces); pass token ids, "
                "the positions in the context, as capture(pipe, tokens=[...])"
            )
        images = len(maps) // len(self.words)
        places = [{position: i for i, position in enumerate(row)} for row in self.token_ids]
        return [
            {
                word: of_image[[places[index // images][position] for position in positions]].mean(0)
                for word, positions in self.words[index // images].items()
            }
            for index, of_image in enumerate(maps)
        ]


@dataclass(frozen=True)
class Capture(Method):
    """Record attention maps.

    tokens: as targets of a method, None for all. maps: where they go.
    """

    tokens: Targets | None
    maps: AttentionMaps
    layers: LayerChoice = None

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Recording(self, call, sites)


class _Recording(Run):
    """A capture during one pipeline call."""

    def __init__(self, capture: Capture, call: Call, sites: list[Site]) -> None:
        prompts, maps, tokens = call.prompts, capture.maps, capture.tokens
        everything = [list(range(prompts.length))] * prompts.count
        ids = everything if tokens is None else prompts.positions(tokens, "tokens", within_prompt=False)
        maps._maps.clear()
        maps.token_ids = ids
        maps.tokens = prompts.strings(ids)
        maps.words = prompts.words(tokens, "tokens")
        self._maps, self._sites, self._samples = maps._maps, sites, call.samples
        for site in sites:
            site.last = ()
        self._rows: Rows | None = None
        self._all_ids = padded(ids).repeat_interleave(call.images, 0)

    def before_denoiser(self, evaluation: Evaluation) -> None:
        if self._rows is not evaluation.rows:
            self._rows = evaluation.rows
            # Of rows that carry the same picture (perturbed ones) the first.
            self._kept = evaluation.distinct if evaluation.rows.conditional else []
            self._token_ids = self._all_ids[evaluation.samples if self._kept else []].to(evaluation.sample.device)
        for site in self._sites:
            site.maps = None

    def attend(self, site: Site, attention: Attention) -> None:
        if attention.rows.conditional:
            site.maps = self._of(attention)

    def _of(self, attention: Attention) -> Tensor:
        """Return attention to the tokens, mean over heads, `[B,n,M]`, with the edit in it if there was one."""
        one, ids = attention.conditional, attention.column_ids(self._token_ids)
        if attention.text is None or attention.probabilities is not None:
            return mean_maps(one, ids, self._kept)
        with torch.no_grad():
            lse = attention.rows.take(attention.logsumexp())
            q, k, lse = (taken(x, self._kept) for x in (one.q, one.k, lse))
            bias = None if one.key_bias is None else taken(one.key_bias, self._kept)
            return ops.maps_from_lse(q, k, lse, ids, scale=one.scale, key_bias=bias)

    def after_denoiser(self, output: Tensor) -> Tensor:
        for site in self._sites if self._kept else ():
            if site.maps is not None:
                # Several views of a picture (panorama) one by one.
                site.last = site.maps.unflatten(2, (*site.frames, *site.grid)).cpu().split(self._samples)
            # Of a layer that a cache of diffusers has left out, its maps are those of the last time.
            if site.last:
                self._maps.setdefault(site.name, []).extend(site.last)
        return output


# Logits of one head that are held at a time.
TILE = 1 << 22


@torch.no_grad()
def mean_maps(attention: Attention, token_ids: Tensor, kept: list[int]) -> Tensor:
    """Return attention to the columns `token_ids`, mean over heads, `[B,n,M]`, at least float32.

    It has the edit in it if there was one. One head and some image tokens at a time: nothing of size M*N, let alone
    B*H*M*N.

    Args:
        attention: of the conditional rows.
        token_ids: of the rows that are kept, `[B,n]`, padded with -1.
        kept: which rows.
    """
    q, k, edited = attention.q, attention.k, attention.probabilities
    batch, heads, image, tokens = *q.shape[:3], k.shape[2]
    shared = heads // k.shape[1]
    total = torch.zeros(len(kept), token_ids.shape[1], image, device=q.device)
    chosen = one_hot(token_ids, len(kept), tokens, total)
    step = max(1, TILE // (batch * tokens))
    for head in range(heads):
        for start in range(0, image, step):
            rows = slice(start, min(start + step, image))
            logits = attention.scale * (q[:, head, rows].float() @ k[:, head // shared].float().mT)
            if attention.key_bias is not None:
                logits = logits + attention.key_bias[:, None]
            found = logits.softmax(-1) if edited is None else edited(logits, head, rows)
            total[..., rows] += chosen @ taken(found, kept).mT
    return total / heads
