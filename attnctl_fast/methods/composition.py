"""Composition of contexts: edit prompts added to the prompt, or taken away from it, in every cross-attention layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_steps, step_count
from ..attach.attention import Attention, plain
from ..attach.call import Call, Site
from ..attach.contexts import Cascade, at_site, moving_mask
from ..attach.evaluation import Evaluation
from ..attach.families import check_unet
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Method, Run
from ..attach.rows import Rows
from ..ops.composed_attention import check_weights

Texts: TypeAlias = str | Sequence[str]


@dataclass(frozen=True)
class Edit:
    """One edit prompt of a `Composition`.

    Args:
        prompt: the text, or a list of one text per prompt.
        weight: how much it counts; the prompt itself has weight 1.
        direction: +1 adds what the text says (conjunction), -1 takes it away (negation).
        gamma_attn: step of its own context update on the energy of the attention, as in `EnergyContext`, by the
            released code's convention and from the masked part of an inpainting call's picture; 4e-4 to 1e-3 is
            typical.
        gamma_norm: step of the same on the energy of the keys' norms.
        start: the step from which on it counts; an int counts steps, a float is a share of them, rounded down (but any
            share above zero is at least one step). Earlier starts change the picture's composition, later ones its
            details.

    Raises:
        ValueError: an empty prompt or an argument out of range.
    """

    prompt: Texts
    weight: float = 1.0
    _: KW_ONLY
    direction: int = 1
    gamma_attn: float = 0.0
    gamma_norm: float = 0.0
    start: int | float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            if not isinstance(self.prompt, Sequence) or not self.prompt:
                raise ValueError(f"the edit prompt is {self.prompt!r}; pass a text, or a list of one text per prompt")
            object.__setattr__(self, "prompt", tuple(self.prompt))
        for text in self.texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the edit prompt is {text!r}; it must say what to add or to take away")
        check_number("weight", self.weight, 0.0)
        if self.direction not in (1, -1):
            raise ValueError(f"direction is {self.direction!r}; it must be +1 (add) or -1 (take away)")
        check_number("gamma_attn", self.gamma_attn, 0.0)
        check_number("gamma_norm", self.gamma_norm, 0.0)
        check_steps("start", self.start)

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    def runs(self, steps: int) -> list[bool]:
        """Return whether it counts at each of so many steps."""
        first = step_count(self.start, steps)
        return [index >= first for index in range(steps)]


@dataclass(frozen=True)
class Composition(Method):
    """Add edit prompts to the prompt, or take them away, in every cross-attention layer.

    Compositional averaging of cross-attention outputs, CACAO (arXiv 2306.09869, NeurIPS 2023).

    The attention of the conditional rows becomes the weighted mean of the attention to the prompt (weight 1) and to
    every edit's text (direction times weight). Edits with gammas move their own contexts from layer to layer, and the
    unconditional rows then see one more context, moved by the edits' mean, as published. Without guidance there are no
    unconditional rows. It is for UNets; transformers are refused.

    Args:
        edits: one or more `Edit`.
        layers: name prefixes, or `by_downsampling(n)`. None for every cross-attention layer.

    Raises:
        ValueError: no edit, or weights that cancel each other with the prompt's: their sum is the mean's denominator.
            Edits that start at different steps are checked for every step before the first one of a call. A list of
            texts whose length is not the number of prompts is reported when the pipeline is called.
    """

    edits: Sequence[Edit]
    _: KW_ONLY
    layers: LayerChoice = None

    single = True

    def __post_init__(self) -> None:
        edits = (self.edits,) if isinstance(self.edits, Edit) else self.edits
        if isinstance(edits, str) or not isinstance(edits, Sequence) or not edits:
            raise ValueError(f"edits is {self.edits!r}; pass a list of at least one Edit('what to add')")
        for edit in edits:
            if not isinstance(edit, Edit):
                raise ValueError(f"edits holds {edit!r}; pass Edit('what to add') instances")
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "layers", check_choice(self.layers))
        self.shares([True] * len(edits))

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        check_unet(pipe, "Composition adds the contexts of its edits to layers that read a text without a mask")

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Composing(self, call, sites)

    def shares(self, runs: Sequence[bool]) -> list[float]:
        """Return the normalised weights of the prompt and of every edit, while the edits in `runs` count.

        Raises:
            ValueError: they sum to (nearly) zero.
        """
        signed = [edit.direction * edit.weight * run for edit, run in zip(self.edits, runs, strict=True)]
        return check_weights([1.0, *signed], 1 + len(signed))


class _Composing(Run):
    """The edits' contexts on their way through the layers of one call.

    The layers read them beside the prompt's: in the conditional rows all edits' contexts one after the other, in the
    unconditional rows the one that stands for each edit's unconditional context.
    """

    def __init__(self, method: Composition, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        self._texts = self._encoded()
        for site in sites:
            # What the last layer would move nobody reads.
            site.moves = site is not sites[-1]
        self._plan: list[list[float]] = []
        self._shape: tuple[Any, ...] = ()
        self._moving = self._ever_moving = False
        self._rows: Rows
        self._edits: Tensor
        self._moved: Cascade
        self._unconditional: Cascade
        self._table: Tensor
        self._now: Tensor
        self._shares: list[float]

    def _encoded(self) -> Tensor:
        """Return the edits' contexts, `[E, samples or 1, N, C]`."""
        count, images = self.call.prompts.count, self.call.images
        texts = [edit.texts for edit in self.method.edits]
        for row in texts:
            if len(row) not in (1, count):
                raise ValueError(
                    f"an edit holds {len(row)} texts, but there are {count} prompts; pass one text for all of them, or "
                    "one per prompt"
                )
        encoded = self.call.encode([text for row in texts for text in row]).contexts
        parts = encoded.split([len(row) for row in texts])
        if any(len(row) > 1 for row in texts):
            return torch.stack([part.expand(count, -1, -1).repeat_interleave(images, 0) for part in parts])
        return torch.stack(parts)

    def encoded(self, embeddings: Tensor) -> Tensor:
        if self._texts.shape[3] != embeddings.shape[2]:
            raise ValueError(
                f"the edits' context has width {self._texts.shape[3]} but the prompt's {embeddings.shape[2]}; prompt "
                "embeddings must come from the pipeline's own text encoders"
            )
        return embeddings

    def _planned(self) -> list[list[float]]:
        """Return the numbers of every step of the call.

        They are gamma_attn and gamma_norm of the edits' unconditional context, the share of the prompt, and of E edits
        the shares, gamma_attn and gamma_norm.
        """
        edits, steps = self.method.edits, self.call.steps
        runs = [edit.runs(steps) for edit in edits]
        rows = []
        for step in range(steps):
            started = [run[step] for run in runs]
            gammas = [
                [on * getattr(edit, name) for edit, on in zip(edits, started, strict=True)]
                for name in ("gamma_attn", "gamma_norm")
            ]
            means = [sum(each) / len(edits) for each in gammas]
            rows.append([*means, *self.method.shares(started), *gammas[0], *gammas[1]])
        return rows

    def before_denoiser(self, evaluation: Evaluation) -> None:
        text, count = evaluation.text, len(self._texts)
        if not self._plan:
            self._plan = self._planned()
            self.used = any(any(row[3 : 3 + count]) for row in self._plan)
            self._ever_moving = any(any(row[:2]) for row in self._plan)
        shape = (evaluation.rows.conditional, text.shape, text.dtype, text.device, self.call.latents)
        if shape != self._shape:
            self._allocate(evaluation)
            self._shape = shape
        # A call may run past the schedule's end: a callback that repeats steps, say.
        step = min(self.call.step, len(self._plan) - 1)
        row, self._now = self._plan[step], self._table[step].clone()
        self._shares = row[2 : 3 + count]
        self.active, self._moving = any(self._shares[1:]), any(row[:2])
        if self._ever_moving:
            self._moved.reset(self._edits)
            self._unconditional.reset(evaluation.rows.rest(evaluation.context_of(text)))

    def _allocate(self, evaluation: Evaluation) -> None:
        text, self._rows = evaluation.text, evaluation.rows
        wide = torch.promote_types(text.dtype, torch.float32)
        self._table = torch.tensor(self._plan, dtype=torch.float64).to(text.device, wide)
        edits = torch.stack([evaluation.context_of(one) for one in self._texts.to(text)])
        if edits.shape[1] > 1:
            edits = torch.stack([self._rows.of_samples(one) for one in edits])
        self._edits = edits.expand(-1, len(self._rows.conditional), -1, -1)
        self._moved = Cascade(self._edits)
        self._unconditional = Cascade(self._rows.rest(evaluation.context_of(text)))
        mask = moving_mask(self.call)
        for site in self._sites:
            site.mask = at_site(mask, site, text)

    def moving(self) -> bool:
        return self._ever_moving if torch.compiler.is_compiling() else self._moving

    def more_context(self, site: Site, text: Tensor, context: Tensor) -> Tensor | None:
        rows, moving = self._rows, self.moving()
        edits = (self._moved.read() if moving else self._edits).to(text.dtype).transpose(0, 1).flatten(1, 2)
        if not rows.others:
            return edits
        # Where neither context moves, the edits' unconditional one is the prompt's.
        rest = self._unconditional.read().to(text.dtype) if moving else rows.rest(text)
        if not moving and context is text:
            rest = rest[:, :0]
        length = max(edits.shape[1], rest.shape[1])
        return rows.merge(*(F.pad(x, (0, 0, 0, length - x.shape[1])) for x in (edits, rest)))

    def attend(self, site: Site, attention: Attention) -> None:
        if self.moving() or attention.moved:
            self._attend_unconditional(site, attention)
        if attention.rows.conditional:
            self._attend_conditional(site, attention)

    def _attend_conditional(self, site: Site, attention: Attention) -> None:
        """Mix the attention of the conditional rows to the prompt with that to the edits."""
        count, length, moving = *self._edits.shape[::2][:2], self.moving() and site.moves
        keys, values = (attention.rows.take(x)[:, :, : count * length] for x in attention.columns(site))
        ks, vs = keys.split(length, 2), values.split(length, 2)
        one = attention.conditional
        if not attention.conditional_set and not moving:
            weights = self._now[2 : 3 + count] if torch.compiler.is_compiling() else self._shares
            biases = None if one.key_bias is None else [one.key_bias, *[None] * count]
            attention.conditional_out = ops.composed_attention(
                one.q, [one.k, *ks], [one.v, *vs], weights, scale=one.scale, key_bias=biases
            )
            return
        out, pulls = self._now[2] * attention.conditional_out.to(self._now.dtype), []
        mask = None if site.mask is None else attention.rows.of_samples(site.mask)
        for index, (k, v) in enumerate(zip(ks, vs, strict=True)):
            if moving:
                to_edit, pull = ops.attention_with_context_gradient(one.q, k, v, query_weight=mask, scale=one.scale)
                pulls.append(pull)
            else:
                to_edit = plain(one.q, k, v, None, one.scale)
            out = out + self._now[3 + index] * to_edit
        if pulls:
            gammas = self._now[3 + count :].unflatten(0, (2, count)).repeat_interleave(len(one.q), 1)
            step = ops.context_update(
                torch.cat(pulls), torch.cat(ks), attention.module.to_k, gamma_attn=gammas[0], gamma_norm=gammas[1]
            )
            self._moved.add(step.unflatten(0, (count, -1)))
        attention.conditional_out = out.to(one.q.dtype)

    def _attend_unconditional(self, site: Site, attention: Attention) -> None:
        """Mix likewise in the unconditional rows: every edit's unconditional context is one and the same."""
        rows = attention.rows
        if not rows.others:
            return
        q, tokens = rows.rest(attention.q), self._unconditional.read().shape[1]
        k, v = (rows.rest(x)[:, :, :tokens] for x in attention.columns(site))
        if self.moving() and site.moves:
            mask = None if site.mask is None else site.mask.repeat(len(q) // len(site.mask), 1)
            one, pull = ops.attention_with_context_gradient(q, k, v, query_weight=mask, scale=attention.scale)
            step = ops.context_update(pull, k, attention.module.to_k, gamma_attn=self._now[0], gamma_norm=self._now[1])
            self._unconditional.add(step)
        else:
            one = plain(q, k, v, None, attention.scale)
        share = self._now[2]
        own = attention.unconditional_out
        attention.unconditional_out = (share * own.to(share.dtype) + (1 - share) * one).to(q.dtype)
