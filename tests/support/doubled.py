"""Normalized attention guidance by hand: the model is called with a row more for every conditional one, which carries
the negative prompt, and its attention is looked at in the open.

The row's picture is of no use: where it would be attended to, the conditional row's own stands in.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Numbers = dict[str, float]


def guided(positive: Tensor, negative: Tensor, numbers: Numbers) -> Tensor:
    """The released code, with the heads `[B,H,M,d]` side by side."""
    flat = [x.transpose(1, 2).flatten(2) for x in (positive, negative)]
    extended = flat[0] * numbers["scale"] - flat[1] * (numbers["scale"] - 1)
    ratio = extended.norm(numbers["norm"], -1, True) / flat[0].norm(numbers["norm"], -1, True)
    out = extended * ratio.clamp(max=numbers["tau"]) / ratio * numbers["alpha"] + flat[0] * (1 - numbers["alpha"])
    return out.unflatten(2, (positive.shape[1], -1)).transpose(1, 2)


@contextmanager
def doubled(
    model: Any,
    rows: int,
    conditional: slice,
    tokens: int,
    negative: dict[str, Tensor],
    numbers: Numbers,
    order: str,
    turns: int = 1,
) -> Iterator[None]:
    """Have evaluations of so many rows guided away from `negative`, the arguments of the negative prompt's rows.

    tokens: the text's columns. order: "first" or "last" in the sequence of joint attention, "" for cross-attention.
    turns: of so many evaluations the first is the prompt's.
    """
    real, forward = F.scaled_dot_product_attention, model.forward
    count = len(range(*conditional.indices(rows)))

    lengths: set[int] = set()
    turn = [0]

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *more: Any, **how: Any) -> Tensor:
        q, k, v = query, key, value
        with_text = k.shape[2] in lengths if order else k.shape[2] == tokens
        if len(q) != rows + count or not with_text:
            return real(q, k, v, attn_mask, *more, **how)
        if order:
            image = slice(tokens, None) if order == "first" else slice(0, -tokens)
            q, k, v = (x.clone() for x in (q, k, v))
            for x in (q, k, v):
                x[rows:, :, image] = x[conditional][:, :, image]
            out = real(q, k, v, **how).clone()
            out[conditional, :, image] = guided(out[conditional][:, :, image], out[rows:, :, image], numbers)
            return out
        out = real(q, k, v, attn_mask, **how).clone()
        away = real(q[conditional], k[rows:], v[rows:], None if attn_mask is None else attn_mask[rows:], **how)
        out[conditional] = guided(out[conditional], away, numbers)
        return out

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs
        sample = given["sample" if "sample" in given else "hidden_states"]
        turn[0] += 1
        if turn[0] % turns != 1 % turns:
            return forward(**given)
        cells = sample.shape[1] if sample.ndim == 3 else sample.shape[2] * sample.shape[3] // 4
        lengths.add(cells + tokens)

        def with_more(name: str, x: Any) -> Any:
            if isinstance(x, dict):
                return {key: with_more(key, one) for key, one in x.items()}
            if (
                not isinstance(x, Tensor)
                or not x.ndim
                or len(x) != rows
                or name.endswith("_ids")
                and name != "time_ids"
            ):
                return x
            return torch.cat([x, negative.get(name, x[conditional])])

        out = forward(**{name: with_more(name, x) for name, x in given.items()})
        return (out[0][:rows],) if isinstance(out, tuple) else type(out)(out[0][:rows])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        patch.setattr(model, "forward", evaluate)
        yield
