"""Cross-attention maps for looking at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._layers import ByDownsampling, Layer
from ._tokens import Targets, padded
from .methods._base import Call, Edited, Modulated


class AttentionMaps(Mapping[str, Tensor]):
    """Head-averaged cross-attention maps of the conditional rows in the last pipeline call, by layer in order of
    execution.

    `maps["down_blocks.2.attentions.0.transformer_blocks.0.attn2"]` is a float32 CPU tensor
    `[evaluations, B, n, height, width]`: one entry per UNet evaluation, B images (prompt by prompt), n tokens. Where a
    method edits the layer, its edited maps are shown.

    token_ids: the positions captured, one list per prompt. tokens: their strings, or None with prompt embeddings.
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
        """Mean over layers and evaluations, `[B, n, height, width]`, on the largest of the layers' grids (bilinear).

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
        resized = [F.interpolate(maps.mean(0), size=tuple(size), mode="bilinear", antialias=False) for maps in chosen]
        return torch.stack(resized).mean(0)

    def per_word(self, layers: Sequence[str] | None = None, *, steps: slice | None = None) -> list[dict[str, Tensor]]:
        """Every word's map `[height, width]`, one dict per image (prompt by prompt): mean over layers and evaluations
        as in `mean`, and over the word's tokens.

        The words are those that were captured, as they were named (token ids by their digits), or all words of the
        prompt as the tokenizer normalises them (CLIP: lower case), a repeated one as "dog", "dog (2)".

        Args:
            layers, steps: as in `mean`.

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
class Capture:
    """Records attention maps. tokens: as targets of a method, None for all. maps: where they go."""

    tokens: Targets | None
    layers: tuple[str, ...] | ByDownsampling | None
    maps: AttentionMaps

    def start(self, call: Call) -> Recording:
        prompts, maps = call.prompts, self.maps
        everything = [list(range(prompts.length))] * prompts.count
        ids = everything if self.tokens is None else prompts.positions(self.tokens, "tokens", within_prompt=False)
        maps._maps.clear()
        maps.token_ids = ids
        maps.tokens = prompts.strings(ids)
        maps.words = prompts.words(self.tokens, "tokens")
        return Recording(self, call, ids)


class Recording:
    """A capture during one pipeline call."""

    def __init__(self, capture: Capture, call: Call, ids: list[list[int]]) -> None:
        self.call = call
        self.maps = capture.maps._maps
        self.token_ids = padded(ids).repeat_interleave(call.images, 0)

    def record(self, layer: Layer, q: Tensor, k: Tensor, scale: float, edited: Edited | Modulated | None) -> None:
        """Add the maps of queries `[B,H,M,d]` and keys `[B,H,N,d]`, with the edit if there was one."""
        maps = _mean_maps(q, k, scale, self.token_ids.to(q.device), edited)
        self.maps.setdefault(layer.name, []).append(maps.unflatten(2, layer.grid(self.call.latents)).cpu())


def _one_hot(ids: Tensor, batch: int, tokens: int, like: Tensor) -> Tensor:
    """`[B,n,N]` from ids `[n]` or `[B,n]`; a padded id (-1) has a row of zeros."""
    return F.one_hot(ids.expand(batch, -1) + 1, tokens + 1)[..., 1:].to(like)


@torch.no_grad()
def _mean_maps(q: Tensor, k: Tensor, scale: float, ids: Tensor, edited: Edited | Modulated | None) -> Tensor:
    """Attention to the tokens `ids`, mean over heads, `[B,n,M]` in float32. One head at a time: nothing of size
    B*H*M*N."""
    batch, heads, image_tokens, _ = q.shape
    total = torch.zeros(batch, k.shape[2], image_tokens, device=q.device)
    targets = pinned = total
    if isinstance(edited, Edited):
        targets = _one_hot(edited.target_ids, batch, k.shape[2], total)
        pinned = _one_hot(edited.pinned_ids, batch, k.shape[2], total).sum(1).bool()[..., None]
    for head in range(heads):
        logits = scale * (k[:, head].float() @ q[:, head].float().mT)
        if isinstance(edited, Modulated):
            logits = edited.logits(logits.mT).mT
        probabilities = logits.softmax(1)
        if isinstance(edited, Edited):
            biased = (logits + targets.mT @ edited.bias[:, head].float()).softmax(1)
            probabilities = torch.where(pinned, probabilities, biased)
        total += probabilities
    return _one_hot(ids, batch, k.shape[2], total) @ total / heads
