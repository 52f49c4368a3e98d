"""Attention of a real model recomputed by hand, in the open: what a family's entry is checked against.

A model's layers are watched by hooks, and `F.scaled_dot_product_attention` is replaced by plain matrix products, which
a test may look at and change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

# A layer's name and its logits [R,H,S,columns]; returns the probabilities that it attends with, None for its own.
Edit = Callable[[str, Tensor], Tensor | None]


class Layout(NamedTuple):
    """Where the text and the image stand in a layer's logits.

    rows: of the batch, those that are the prompt's. image: of the queries. text: of the keys. padding: how many tokens
    of the text behind these the model leaves out.
    """

    rows: slice
    image: slice
    text: slice
    padding: int = 0

    def maps(self, probabilities: Tensor) -> Tensor:
        """Maps of every token of the text, mean over heads, `[B,N,M]`."""
        maps = probabilities[self.rows, :, self.image, self.text].mean(1).mT
        return F.pad(maps, (0, 0, 0, self.padding))


def layout_of(kind: str, samples: int, text: int, image: int, guided: bool) -> Layout:
    """The layout of a kind of `tests.support.tiny_transformers`, as its paper and its pipeline in diffusers have it.

    guided: conditional and unconditional rows are in one batch, these first.
    """
    rows = slice(samples, 2 * samples) if guided else slice(0, samples)
    if kind == "sd3":
        return Layout(rows, slice(0, image), slice(image, image + text))
    if kind == "lumina2":
        # As many as `PROMPT` has behind the system's message.
        return Layout(rows, slice(27, 27 + image), slice(0, 27), text - 27)
    if kind == "zimage":
        # Both are filled up to a multiple of 32, and the prompts' rows come first.
        at = -(-image // 32) * 32
        return Layout(slice(0, samples), slice(0, image), slice(at, at + text))
    if kind in ("flux", "chroma", "qwen", "auraflow", "cogview4", "flux2", "flux2_klein"):
        before = 8 if kind == "auraflow" else 0
        return Layout(rows, slice(before + text, before + text + image), slice(before, before + text))
    return Layout(rows, slice(0, image), slice(0, text))


@contextmanager
def attending_by_hand(
    model: Any, edit: Edit, watch: Callable[[str, Tensor, Tensor], None] | None = None
) -> Iterator[None]:
    """Have the model attend by matrix products, with the probabilities that `edit` makes of its logits.

    watch: sees a layer's name, queries and keys before.

    Only the first attention call of a layer is its own; others (an IP-Adapter's) stay.
    """
    current: list[str] = []
    hooks = []

    def enter(name: str) -> None:
        current[:] = [name]

    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: current.clear()))
    real = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not current:
            return real(query, key, value, attn_mask, *args, **kwargs)
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        logits = scale * (query @ key.mT)
        if attn_mask is not None:
            allowed = attn_mask.dtype == torch.bool
            logits = logits.masked_fill(~attn_mask, -torch.inf) if allowed else logits + attn_mask
        name = current.pop()
        if watch is not None:
            watch(name, query, key)
        probabilities = edit(name, logits)
        if probabilities is None:
            return real(query, key, value, attn_mask, *args, **kwargs)
        return (probabilities.nan_to_num() @ value).to(query.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
