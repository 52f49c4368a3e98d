"""Regional prompting by hand: the model is called with the regions' texts behind the prompt's, and every attention call
is made twice under masks of the whole sequence, as in the released code.

The texts of rows that are not the prompt's are zeros that nobody sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def seen_by_regions(texts: Sequence[int], masks: Tensor, prompt: int, isolated: bool) -> tuple[Tensor, Tensor]:
    """Who sees whom `[S,S]` in a region's text and its image tokens: where regions act, and where they do not. In the
    order of the prompt's text, the regions' texts and the image; `masks` bool [regions,M]."""
    starts = [prompt + sum(texts[:i]) for i in range(len(texts))]
    first, image = prompt + sum(texts), masks.shape[1]
    acting = torch.zeros(first + image, first + image, dtype=torch.bool)
    for mask, start, length in zip(masks, starts, texts, strict=True):
        own = slice(start, start + length)
        acting[own, own] = True
        acting[own, first:] |= mask
        acting[first:, own] |= mask[:, None]
        acting[first:, first:] |= (mask[:, None] & mask) if isolated else mask[:, None].expand(-1, image)
    everywhere = torch.zeros_like(acting)
    everywhere[prompt:, prompt:] = True
    return acting, everywhere


@contextmanager
def regional(
    model: Any,
    rows: int,
    conditional: slice,
    contexts: Tensor,
    masks: Sequence[Tensor],
    numbers: dict[str, Any],
    order: str,
    steps: int,
) -> Iterator[None]:
    """Have the first `steps` evaluations of so many rows drawn with regions.

    contexts: of every conditional row the regions' texts [regions,N,C]. masks: of every conditional row bool
    [regions,M]. numbers: `base`, `isolated`, `every`, and `doubles`, the number of blocks with two streams. order:
    where the text stands.
    """
    real, forward = F.scaled_dot_product_attention, model.forward
    count, length = contexts.shape[1:3]
    state: dict[str, Any] = {"evaluations": 0, "call": 0, "on": False}

    def moved(x: Tensor, dim: int, text: int) -> Tensor:
        """The model's sequence with its text first, and back."""
        return x if order == "first" else x.roll(text, dim)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **how: Any) -> Tensor:
        text = state.get("prompt", 0) + count * length
        image = masks[0].shape[1]
        if not state["on"] or key.shape[2] != text + image:
            return real(query, key, value, attn_mask, **how)
        call, doubles, prompt = state["call"], numbers["doubles"], state["prompt"]
        state["call"] += 1
        index = call if call < doubles else call - doubles
        q, k, v = (moved(x, 2, text) for x in (query, key, value))
        whole = torch.zeros(text + image, dtype=torch.bool)
        whole[:prompt] = whole[text:] = True
        out = torch.zeros_like(q)
        out[:, :, whole] = real(q[:, :, whole], k[:, :, whole], v[:, :, whole])
        for row, mask in zip(range(*conditional.indices(rows)), masks, strict=True):
            seen, everywhere = seen_by_regions([length] * count, mask, prompt, numbers["isolated"])
            seen = seen if index % numbers["every"] == 0 else everywhere
            logits = (q[row] @ k[row].mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
            found = logits.softmax(-1).nan_to_num() @ v[row]
            inside = torch.cat([torch.zeros(text, dtype=torch.bool), mask.any(0)])
            share = torch.where(inside, torch.tensor(numbers["base"], dtype=q.dtype), 1.0)
            share[prompt:text] = 0.0
            out[row] = share[:, None] * out[row] + (1 - share[:, None]) * found
        return moved(out, 2, -text)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
        state["evaluations"] += 1
        state["on"] = state["evaluations"] <= steps and len(given["hidden_states"]) == rows
        if state["on"]:
            text = given["encoder_hidden_states"]
            state["prompt"], state["call"] = text.shape[1], 0
            behind = text.new_zeros(rows, count * length, text.shape[2])
            behind[conditional] = contexts.flatten(1, 2).to(text)
            given["encoder_hidden_states"] = torch.cat([text, behind], 1)
            if "txt_ids" in given:
                given["txt_ids"] = torch.cat([given["txt_ids"]] * (1 + count), -2)
        return forward(**given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr(model, "forward", evaluate)
        yield
