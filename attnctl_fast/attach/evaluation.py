"""One evaluation of the model as the pipeline asked for it, which methods may change before it happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import Rows, taken, with_rows

if TYPE_CHECKING:
    from .call import Call
    from .families import Family
    from .scheduler import SchedulerTap


class Evaluation:
    """One evaluation of the model.

    Attributes:
        call: the call it belongs to.
        model: the model, not compiled.
        rows: which rows are conditional.
        given: the model's arguments by name; changing them changes what it is called with.
        moved: the latents have been moved already, by an evaluation of the same ones before this one.
        compiled: any part of the model is compiled, and runs one graph at all steps.
    """

    def __init__(
        self,
        call: Call,
        family: Family,
        model: Any,
        rows: Rows,
        tap: SchedulerTap,
        args: tuple[Any, ...],
        given: dict[str, Any],
    ) -> None:
        self.call, self.model, self.rows, self.given = call, model, rows, given
        self.moved = self.compiled = False
        self._family, self._tap = family, tap
        self._args = args
        self._sample = self.sample
        self._channels = family.channels(model) if tap.latents is None else tap.latents.shape[1]
        self._latents: Tensor | None = None
        self._leaf: Tensor | None = None

    @property
    def sample(self) -> Tensor:
        """The model's input, `[R,C,height,width]`: the noisy latents, with what some models read besides them.

        Of models with packed latents (FLUX, LTX) it is `[R,M,C]`, an image token's latents in a row.
        """
        return self.given[self._family.sample]

    @property
    def text(self) -> Tensor:
        """The context of every row, `[R,N,C]`."""
        return self.given[self._family.text]

    @property
    def columns(self) -> int:
        """How many columns of the text joint attention has."""
        return self._family.columns(self.given)

    def context_of(self, text: Tensor, more: dict[str, Tensor] | None = None) -> Tensor:
        """Return what the layers are given for a text, `[R,N,C]`: of some models not the text encoder's own.

        Args:
            text: its context.
            more: what `Call.encode` gave besides; the model's present arguments by default.
        """
        return self._family.context(self.model, {**self.given, **(more or {}), self._family.text: text})

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the model is called with."""
        return self._family.replaced(self.model, self._args, self.given)

    @property
    def latents(self) -> Tensor:
        """The latents of the conditional rows in the space of the model's input, `[B,C,height,width]` or packed.

        What several rows carry is there once. Assigning moves the latents in all rows that carry them, and the
        scheduler's next step starts from there.
        """
        if self._latents is None:
            chosen, _ = self._layout()
            self._latents = self._own(taken(self._sample, chosen))
        return self._latents

    @latents.setter
    def latents(self, latents: Tensor) -> None:
        self.replay(latents)
        chosen, carried = self._layout()
        own = self._tap.latents
        factor = None if own is None else self._tap.factor(self.given[self._family.timestep], latents)
        if factor is None or own is None:
            self._tap.moved = latents
        else:
            # Only the move is scaled back: what the pipeline's latents hold beyond the model's precision stays.
            own = taken(own, chosen) if len(own) == len(carried) else own[-len(chosen) :]
            moved = (latents - self._own(taken(self._sample, chosen))) / factor
            self._tap.moved = own.to(latents.dtype) + moved.to(latents.dtype)

    def replay(self, latents: Tensor) -> None:
        """Give the model latents that the scheduler knows of already."""
        self._latents = latents
        _, carried = self._layout()
        inputs, count = latents.to(self._sample.dtype), len(latents)
        stacked = carried == [row % count for row in range(len(carried))]
        rows = torch.cat([inputs] * (len(carried) // count)) if stacked else inputs[carried]
        self.given[self._family.sample] = self._with(rows, self._sample)

    def _own(self, sample: Tensor) -> Tensor:
        """Return the latents within the model's input: other channels are inpainting's, other tokens a picture's."""
        if not self._family.positions:
            return sample[:, : self._channels]
        tokens = math.prod((*self.call.frames, *self.call.latents)) // self._family.cell**2
        return sample[:, :tokens, : self._channels]

    def _with(self, latents: Tensor, sample: Tensor) -> Tensor:
        """Return the model's input with these latents in it."""
        latents = latents.to(sample.dtype)
        if not self._family.positions:
            return torch.cat([latents, sample[:, self._channels :]], 1)
        tokens = latents.shape[1]
        whole = torch.cat([latents, sample[:, :tokens, self._channels :]], 2)
        return torch.cat([whole, sample[:, tokens:]], 1)

    @property
    def distinct(self) -> list[int]:
        """The conditional rows that `latents` are of: the first ones that carry them."""
        return [self.rows.conditional.index(row) for row in self._layout()[0]]

    @property
    def samples(self) -> list[int]:
        """The sample of the call that each of `latents` belongs to."""
        return [self.rows.samples[index] for index in self.distinct]

    def conditional_arguments(self, latents: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to call the model with for the rows of `latents` alone, in the space of its input."""
        chosen, carried = self._layout()

        def sliced(x: Tensor) -> Tensor:
            x = taken(x, chosen)
            # Tensors of inference mode cannot be kept for a gradient.
            return x.clone() if x.is_inference() else x

        given = {name: with_rows(value, len(carried), sliced) for name, value in self.given.items()}
        given[self._family.sample] = self._with(latents, sliced(self._sample))
        return self._family.replaced(self.model, self._args, given)

    def parts(self) -> list[Evaluation]:
        """Return two evaluations of fewer rows: of the rows of `latents`, and of all others."""
        rows = self.rows
        if rows.parts is None:
            chosen, _ = self._layout()
            parts = Rows(rows.total, chosen, range(len(chosen)))
            rows.parts = parts, rows.of(parts.conditional), rows.of(parts.others)
        parts, first, second = rows.parts
        return [self._part(parts.take, first), self._part(parts.rest, second)]

    def _part(self, take: Callable[[Tensor], Tensor], rows: Rows) -> Evaluation:
        given = {name: with_rows(x, self.rows.total, take) for name, x in self.given.items()}
        return Evaluation(self.call, self._family, self.model, rows, self._tap, self._args, given)

    def joined(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the batch made of what the two `parts` have."""
        assert self.rows.parts is not None
        return self.rows.parts[0].merge(first, second)

    def track(self) -> Tensor:
        """Return `latents` as a leaf of the graph that the model's evaluation will make."""
        if self._leaf is not None:
            return self._leaf
        total = self.rows.total
        # Tensors of inference mode cannot be kept for a gradient.
        self.given = {
            name: with_rows(x, total, lambda x: x.clone() if x.is_inference() else x) for name, x in self.given.items()
        }
        self._sample = self.sample
        self._leaf = self.latents.detach().clone().requires_grad_()
        self.replay(self._leaf)
        return self._leaf

    def correct(self, correction: Tensor) -> None:
        """Add to the prediction from which the scheduler makes its next step, `[B,C,height,width]` or packed."""
        self._tap.add(correction)

    def _layout(self) -> tuple[list[int], list[int]]:
        """Return the first rows that carry their latents, and for every row which of those it carries."""
        rows = self.rows
        if rows.layout is None:
            total, samples, conditional = rows.total, self.call.samples, list(rows.conditional)
            count = len(conditional)
            step = conditional[1] - conditional[0] if count > 1 else 1
            if not conditional:
                rows.layout = list(range(samples)), [row % samples for row in range(total)]
            elif total % samples == 0 and tuple(row % samples for row in conditional) == rows.samples:
                rows.layout = self._groups(samples)
            elif total == step * count and conditional == list(range(conditional[0], total, step)):
                # [unconditional, conditional] of one sample after the other.
                rows.layout = conditional, [row // step for row in range(total)]
            else:
                raise ValueError(
                    f"of {total} rows of the model's batch {conditional} are the prompt's, an order in which their "
                    "latents cannot be moved; leave latent guidance off in this pipeline"
                )
        return rows.layout

    def _groups(self, samples: int) -> tuple[list[int], list[int]]:
        """Return the layout of groups with one row per sample each: copies of the samples, or several views."""
        total, conditional = self.rows.total, list(self.rows.conditional)
        first = conditional[:samples]
        if len(conditional) == samples:
            return first, [row % samples for row in range(total)]
        latents = self._own(self._sample).unflatten(0, (-1, samples))
        same = (latents[:, None] == latents[None]).flatten(2).all(2).tolist()
        views: list[int] = []
        for group in dict.fromkeys(row // samples for row in conditional):
            if not any(same[group][view] for view in views):
                views.append(group)
        # A group that carries none of them goes with the first.
        of = [next((i for i, view in enumerate(views) if same[group][view]), 0) for group in range(total // samples)]
        chosen = [view * samples + sample for view in views for sample in range(samples)]
        return chosen, [of[row // samples] * samples + row % samples for row in range(total)]
