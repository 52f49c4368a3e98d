"""The rows of a batch that carry the prompt's text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# One entry per IP-Adapter, not per row.
_OF_ADAPTERS = ("ip_adapter_masks",)


class Rows:
    """The conditional rows of a batch, those that carry the prompt's text.

    total: rows in the batch. conditional: the indices of those, rising. samples: which sample of the call each of them
    is. others: the indices of all other rows. alone: the conditional rows as a batch of their own. layout: what
    `Evaluation` has found out about the latents that they carry. parts: how it takes this
    batch apart, in which those of the latents are "conditional", and the rows of both parts.
    """

    layout: tuple[list[int], list[int]] | None = None
    parts: tuple[Rows, Rows, Rows] | None = None

    def __init__(self, total: int, conditional: Sequence[int], samples: Sequence[int]) -> None:
        self.total, self.conditional, self.samples = total, tuple(conditional), tuple(samples)
        self.others = tuple(sorted(set(range(total)) - set(conditional)))
        self.alone = Rows(len(self.samples), range(len(self.samples)), samples) if self.others else self
        first = self.conditional[0] if conditional else 0
        together = self.conditional == tuple(range(first, first + len(conditional)))
        self._before = first if together else -1
        self._order = [(*self.conditional, *self.others).index(row) for row in range(total)]

    def take(self, x: Tensor) -> Tensor:
        """Return the conditional rows of `x` `[total,..]`."""
        return taken(x, self.conditional)

    def rest(self, x: Tensor) -> Tensor:
        """Return the other rows of `x` `[total,..]`."""
        return taken(x, self.others)

    def merge(self, conditional: Tensor, rest: Tensor) -> Tensor:
        """Return the batch `[total,..]` made of its conditional rows and of the others."""
        if not self.others:
            return conditional
        if not self.conditional:
            return rest
        at = self._before
        if at < 0:
            return torch.cat([conditional, rest])[self._order]
        if at == 0:
            return torch.cat([conditional, rest])
        if at == len(self.others):
            return torch.cat([rest, conditional])
        return torch.cat([rest[:at], conditional, rest[at:]])

    def of_samples(self, x: Tensor) -> Tensor:
        """Return what belongs to the conditional rows of `x` `[samples,..]`."""
        return x if self.samples == tuple(range(len(x))) else x[list(self.samples)]

    def of(self, rows: Sequence[int]) -> Rows:
        """Return some rows as a batch of their own."""
        sample = dict(zip(self.conditional, self.samples, strict=True))
        kept = [index for index, row in enumerate(rows) if row in sample]
        return Rows(len(rows), kept, [sample[rows[index]] for index in kept])

    def first(self, total: int) -> Rows:
        """Return the rows of a smaller batch that begins with these: perturbed ones come last."""
        if total == self.total:
            return self
        return self.of(range(total))


def taken(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return rows of `x`, as a view where they lie at equal distances."""
    if len(rows) == len(x):
        return x
    if not rows:
        return x[:0]
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and list(rows) == list(range(rows[0], rows[-1] + 1, step)):
        return x[rows[0] : rows[-1] + 1 : step]
    return x[list(rows)]


def with_rows(value: Any, rows: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with `change` made to every tensor of so many rows within.

    Lists are copied: the UNet empties some.
    """
    if isinstance(value, Tensor):
        return change(value) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        return {key: item if key in _OF_ADAPTERS else with_rows(item, rows, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_rows(item, rows, change) for item in value)
    return value


def conditional_rows(
    text: Tensor,
    prompts: list[Tensor],
    others: list[Tensor],
    samples: int,
    images: int,
    *,
    guided: bool,
    told: bool = False,
    first: bool = False,
) -> Rows:
    """Return which rows of a batch carry the prompt.

    Args:
        text: the contexts that the model is given, `[R,N,C]`.
        prompts: contexts of the prompts `[samples,N,C]`: the call's own, then those that it changed to.
        others: contexts `[samples,N,C]` that are not the prompts': of negative prompts.
        samples: how many pictures the call makes.
        images: how many of them for each prompt.
        guided: whether the prompt is combined with a negative one.
        told: the user has said which contexts are the prompt's.
        first: the pipeline stacks them before the negative prompts'.

    Raises:
        ValueError: neither the text nor the number of rows tells which ones are conditional.
    """
    rows = len(text)
    carried = (_prompts_of(text, context, samples, images) for context in prompts)
    matches: list[set[int]] = next((found for found in carried if any(found)), [set()] * rows)
    groups = [matches[at : at + samples] for at in range(0, rows, samples)] if rows % samples == 0 else []
    whole = [group for group, found in enumerate(groups) if all(i // images in found[i] for i in range(samples))]
    negative = [False] * rows
    for context in others:
        found = _prompts_of(text, context, samples, images)
        negative = [known or bool(prompts) for known, prompts in zip(negative, found, strict=True)]
    if whole:
        if guided and len(whole) == len(groups) > 1 and any(negative):
            # The negative prompt is the prompt; diffusers mostly stacks it first.
            whole = whole[:-1] if first else whole[1:]
        chosen = [group * samples + sample for group in whole for sample in range(samples)]
        return Rows(rows, chosen, [row % samples for row in chosen])
    if any(matches):
        chosen = [row for row, found in enumerate(matches) if found]
        seen: Counter[int] = Counter()
        each = []
        for row in chosen:
            prompt = min(matches[row])
            each.append(prompt * images + seen[prompt] % images)
            seen[prompt] += 1
        return Rows(rows, chosen, each)
    if all(negative) or (told and not others):
        return Rows(rows, (), ())
    # Embeddings that the pipeline has changed beyond recognition: their order tells.
    if rows == 2 * samples and guided:
        return Rows(rows, range(samples) if first else range(samples, rows), range(samples))
    if rows == samples and not guided:
        return Rows(rows, range(rows), range(rows))
    raise ValueError(
        f"the model was called with {rows} rows for {samples} images {'with' if guided else 'without'} guidance, and "
        "none of them carries the prompt's text; call it with the contexts that encode_prompt or handle.begin returned"
    )


def _prompts_of(text: Tensor, context: Tensor, samples: int, images: int) -> list[set[int]]:
    """Return the prompts whose context each row of `text` is, one set per row."""
    found: list[set[int]] = [set() for _ in range(len(text))]
    # Pipelines pad contexts, and cut them.
    length = min(context.shape[1], text.shape[1])
    if context.shape[2] == text.shape[2] and len(context) == samples:
        each = context[::images, :length].to(text)
        same = torch.stack([(text[:, :length] == one).flatten(1).all(1) for one in each], 1)
        for row, prompt in same.nonzero().tolist():
            found[row].add(prompt)
    return found
