"""The contexts of one pipeline call: what the cross-attention layers read, and how each moves it for the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, schedules
from ._projections import keys_values

if TYPE_CHECKING:
    from ._layers import Layer
    from .methods import Composition, EnergyContext
    from .methods._base import Call


class Cascade:
    """A context that layers move on, `[.., N, C]`: in place where nothing is differentiated, so that a compiled UNet
    keeps its memory, else as a new tensor."""

    def __init__(self, like: Tensor, *shape: int) -> None:
        # At the precision of the context a small step would be rounded away.
        wide = torch.promote_types(like.dtype, torch.float32)
        self._buffer = torch.empty(shape, dtype=wide, device=like.device)
        self._value = self._buffer

    def reset(self, source: Tensor) -> None:
        if torch.is_grad_enabled():
            self._value = source.to(self._buffer.dtype).expand_as(self._buffer)
        else:
            self._buffer.copy_(source)

    def read(self) -> Tensor:
        return self._value if torch.is_grad_enabled() else self._buffer

    def add(self, increment: Tensor) -> None:
        if torch.is_grad_enabled():
            self._value = self._value + increment
        else:
            self._buffer.add_(increment)


@dataclass(eq=False)
class Slot:
    """What one layer does with the contexts.

    first: it is the first one and resets them. updates: it moves the prompt's context for a later layer. composes: it
    attends to the edits. moves: it moves theirs. mask: which image tokens move contexts, `[samples,M]`, or None for
    all.
    """

    contexts: Contexts
    layer: Layer
    first: bool
    updates: bool
    composes: bool
    moves: bool
    mask: Tensor | None = None

    def acts(self) -> bool:
        """Whether attention here is anything but the pipeline's own, at this step."""
        return (self.updates and self.contexts.updating) or (self.composes and self.contexts.composing)


class _On(NamedTuple):
    """What is on: the prompt's context is moved, edits are composed with it, their contexts are moved."""

    updating: bool = False
    composing: bool = False
    moving: bool = False


@dataclass(frozen=True)
class _Plan:
    """What happens at every step of the call, worked out before the first one.

    now: `[steps, 5 + 3 E]`: gamma_attn and gamma_norm of the prompt, then of the edits' unconditional context, then
    the share of the prompt, and of E edits the shares, gamma_attn and gamma_norm.
    """

    now: Tensor
    on: list[_On]

    @classmethod
    def of(cls, energy: EnergyContext | None, composition: Composition | None, steps: int) -> _Plan:
        factors = [0.0] * steps if energy is None else schedules.factors(energy.schedule, steps)
        edits = () if composition is None else composition.edits
        runs = [edit.runs(steps) for edit in edits]
        rows, on_at = [], []
        for index, factor in enumerate(factors):
            main = [0.0, 0.0] if energy is None else [factor * energy.gamma_attn, factor * energy.gamma_norm]
            started = [run[index] for run in runs]
            shares = [1.0] if composition is None else composition.shares(started)
            steps_of_edits = [
                [on * getattr(edit, name) for edit, on in zip(edits, started, strict=True)]
                for name in ("gamma_attn", "gamma_norm")
            ]
            means = [sum(gammas) / max(len(edits), 1) for gammas in steps_of_edits]
            rows.append([*main, *means, *shares, *steps_of_edits[0], *steps_of_edits[1]])
            on_at.append(_On(any(main), any(shares[1:]), any(means)))
        return cls(torch.tensor(rows, dtype=torch.float64), on_at)


class Contexts:
    """The contexts of one call of a pipeline.

    Whatever depends on the step lies in tensors that are filled before the UNet runs. Where torch.compile traces, what
    is on at any step counts as on at every step (its gammas and shares are zero where it is not), so that one graph
    serves all steps.

    Raises:
        ValueError: the methods do not fit the prompts, or an edit's context the prompt's.
    """

    def __init__(
        self,
        call: Call,
        embeddings: Tensor,
        layers: dict[str, Layer],
        energy: tuple[EnergyContext, list[str]] | None,
        composition: tuple[Composition, list[str]] | None,
    ) -> None:
        self.call = call
        self.energy: EnergyContext | None
        self.composition: Composition | None
        self.energy, updating = energy or (None, [])
        self.composition, composing = composition or (None, [])
        last = [*layers][-1]
        self.slots = {
            name: Slot(
                self,
                layer,
                first=index == 0,
                # What the last layer would move nobody reads.
                updates=name in updating and name != last,
                composes=name in composing,
                moves=name in composing[:-1],
            )
            for index, (name, layer) in enumerate(layers.items())
        }
        self.first_conditional = 0
        self._weight_rows = None if self.energy is None else self.energy.weight_rows(call.prompts)
        self._edits = None if self.composition is None else self._encoded(self.composition, embeddings)
        self._plan: _Plan | None = None
        self.prepared = False
        self._shape: tuple[Any, ...] = ()
        self._now: Tensor
        self._kept: Tensor
        self._table: Tensor
        self._here = self._ever = _On()
        self._shares: list[float] = []
        self._token_weight: Tensor | None = None
        self._main: Cascade
        self._unconditional: Cascade
        self._moved: Cascade

    def _encoded(self, composition: Composition, embeddings: Tensor) -> Tensor:
        """The edits' contexts, `[E, samples or 1, N, C]`."""
        count, images = self.call.prompts.count, self.call.images
        texts = [edit.texts for edit in composition.edits]
        for row in texts:
            if len(row) not in (1, count):
                raise ValueError(
                    f"an edit holds {len(row)} texts, but there are {count} prompts; pass one text for all of them, or "
                    "one per prompt"
                )
        encoded, _ = self.call.encode([text for row in texts for text in row])
        if encoded.shape[2] != embeddings.shape[2]:
            raise ValueError(
                f"the edits' context has width {encoded.shape[2]} but the prompt's {embeddings.shape[2]}; prompt "
                "embeddings must come from the pipeline's own text encoders"
            )
        parts = encoded.split([len(row) for row in texts])
        if any(len(row) > 1 for row in texts):
            return torch.stack([part.expand(count, -1, -1).repeat_interleave(images, 0) for part in parts])
        return torch.stack(parts)

    @property
    def cascades(self) -> bool:
        """Whether any context is moved at any step."""
        return self._ever.updating or self._ever.moving

    def on(self) -> bool:
        """Whether anything differs from the plain pipeline, at this step (in a compiled graph: at any step)."""
        return self.updating or self.composing

    @property
    def updating(self) -> bool:
        return self._ever.updating if torch.compiler.is_compiling() else self._here.updating

    @property
    def composing(self) -> bool:
        return self._ever.composing if torch.compiler.is_compiling() else self._here.composing

    @property
    def moving(self) -> bool:
        return self._ever.moving if torch.compiler.is_compiling() else self._here.moving

    def prepare(self, first_conditional: int, rows: int, text: Tensor) -> None:
        """Before an evaluation of the UNet on so many rows, the conditional ones last, with this context.

        Raises:
            ValueError: a schedule, a mask or weights that do not fit the call.
        """
        call = self.call
        if self._plan is None:
            self._plan = plan = _Plan.of(self.energy, self.composition, call.steps)
            self._ever = _On(*(any(column) for column in zip(*plan.on, strict=True)))
        shape = (first_conditional, rows, tuple(text.shape), text.dtype, text.device, call.latents)
        if shape != self._shape:
            self._allocate(first_conditional, rows, text)
            self._shape = shape
        self.prepared = True
        # A call may run past the schedule's end: a callback that repeats steps, say.
        step = min(call.step, len(self._table) - 1)
        self._here = self._plan.on[step]
        if torch.is_grad_enabled():
            # Autograd has kept the last step's.
            self._now = self._table[step]
        else:
            self._now = self._kept.copy_(self._table[step])
        self._shares = self._plan.now[step, 4 : 5 + self._edit_count].tolist()

    @property
    def _edit_count(self) -> int:
        return 0 if self._edits is None else len(self._edits)

    def _allocate(self, first_conditional: int, rows: int, text: Tensor) -> None:
        assert self._plan is not None
        call = self.call
        samples, width = call.samples, next(iter(self.slots.values())).layer.module.cross_attention_dim
        self.first_conditional = first_conditional
        self._main = Cascade(text, rows, text.shape[1], width)
        self._unconditional = Cascade(text, samples, text.shape[1], width)
        wide = torch.promote_types(text.dtype, torch.float32)
        self._table = self._plan.now.to(text.device, wide)
        self._kept = self._table[0].clone()
        if self._edits is not None:
            self._edits = self._edits.to(text)
            self._moved = Cascade(text, len(self._edits), samples, *self._edits.shape[2:])
        if self._weight_rows is not None:
            conditional = self._weight_rows.repeat_interleave(call.images, 0)
            weights = torch.cat([torch.ones(first_conditional, conditional.shape[1]), conditional])
            self._token_weight = weights.to(text.device, wide)
        mask = self._mask()
        for slot in self.slots.values():
            slot.mask = None if mask is None else _resized(mask, slot.layer.grid(call.latents)).to(text.device, wide)

    def _mask(self) -> Tensor | None:
        """The mask that moves contexts, `[samples,1,height,width]`: the method's own, or that of the call."""
        call = self.call
        given = None if self.energy is None else self.energy.mask
        if given is None:
            return call.mask
        given = given if given.ndim == 3 else given[None]
        height, width = given.shape[1:]
        if len(given) not in (1, call.samples):
            raise ValueError(f"mask holds {len(given)} masks for {call.samples} images; pass one, or one per image")
        if height * call.latents[1] != width * call.latents[0]:
            raise ValueError(
                f"mask is {height}x{width}, which has not the proportions of the picture (latents "
                f"{call.latents[0]}x{call.latents[1]}); draw it at the picture's size"
            )
        return given[:, None].expand(call.samples, -1, -1, -1)

    def reset(self, text: Tensor) -> None:
        """At the first layer, to what the UNet hands to every layer.

        At every step, whatever is on: of two layers one may lie in a compiled graph and one outside.
        """
        if self._ever.updating:
            self._main.reset(text)
        if self._ever.moving:
            self._moved.reset(self._edit_contexts())
            if self.first_conditional:
                self._unconditional.reset(text[: self.first_conditional])

    def read(self, text: Tensor) -> Tensor:
        """The prompt's context at this layer, `[R,N,C]`; `text` is what the UNet hands to every layer."""
        return self._main.read().to(text.dtype) if self.updating else text

    def _edit_contexts(self) -> Tensor:
        assert self._edits is not None
        return self._edits

    def attend(
        self, slot: Slot, attn: Any, text: Tensor, q: Tensor, k: Tensor, v: Tensor, conditional: Tensor | None
    ) -> Tensor:
        """Attention of all rows, `[R,H,M,d]`, and the step of the contexts.

        Args:
            text: what the UNet hands to every layer.
            q, k, v: of the context that `read` gave.
            conditional: attention of the conditional rows to the prompt, where another method has edited it.
        """
        rows, scale = self.first_conditional, attn.scale
        whole = None
        if slot.updates and self.updating:
            mask = slot.mask if slot.mask is None or not rows else torch.cat([slot.mask] * 2)
            whole, pull = ops.attention_with_context_gradient(q, k, v, query_weight=mask, scale=scale)
            assert self.energy is not None
            self._main.add(
                ops.context_update(
                    pull,
                    k,
                    attn.to_k,
                    gamma_attn=self._now[0],
                    gamma_norm=self._now[1],
                    token_weight=self._token_weight,
                    alpha=self.energy.alpha,
                    convention=self.energy.convention,
                )
            )
        composes = slot.composes and self.composing
        if whole is not None and conditional is None and not composes:
            return whole
        if conditional is None and whole is not None:
            conditional = whole[rows:]
        if composes:
            conditional = self._composed(slot, attn, text, q[rows:], k[rows:], v[rows:], conditional)
        assert conditional is not None
        if not rows:
            return conditional
        if whole is not None:
            unconditional = whole[:rows]
        else:
            unconditional = F.scaled_dot_product_attention(q[:rows], k[:rows], v[:rows], scale=scale)
        if composes and (self.updating or self.moving):
            unconditional = self._composed_unconditional(slot, attn, text, q[:rows], unconditional)
        return torch.cat([unconditional, conditional])

    def _composed(
        self, slot: Slot, attn: Any, text: Tensor, q: Tensor, k: Tensor, v: Tensor, plain: Tensor | None
    ) -> Tensor:
        """Attention of the conditional rows to the prompt (`plain`, if it is there) and to the edits."""
        count, moving = self._edit_count, self.moving
        contexts = self._moved.read() if moving else self._edit_contexts()
        ks, vs = keys_values(attn, contexts.flatten(0, 1).to(text.dtype))
        ks, vs = (x.to(q.dtype).unflatten(0, (count, -1)).expand(-1, len(q), -1, -1, -1) for x in (ks, vs))
        if plain is None and not (moving and slot.moves):
            compiled = torch.compiler.is_compiling()
            weights = self._now[4 : 5 + count] if compiled else self._shares
            return ops.composed_attention(q, [k, *ks], [v, *vs], weights, scale=attn.scale)
        if plain is None:
            plain = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        out, pulls = self._now[4] * plain.to(self._now.dtype), []
        for index in range(count):
            if moving and slot.moves:
                one, pull = ops.attention_with_context_gradient(
                    q, ks[index], vs[index], query_weight=slot.mask, scale=attn.scale
                )
                pulls.append(pull)
            else:
                one = F.scaled_dot_product_attention(q, ks[index], vs[index], scale=attn.scale)
            out = out + self._now[5 + index] * one
        if pulls:
            gammas = self._now[5 + count :].unflatten(0, (2, count)).repeat_interleave(len(q), 1)
            step = ops.context_update(
                torch.cat(pulls), ks.flatten(0, 1), attn.to_k, gamma_attn=gammas[0], gamma_norm=gammas[1]
            )
            self._moved.add(step.unflatten(0, (count, -1)))
        return out.to(q.dtype)

    def _composed_unconditional(self, slot: Slot, attn: Any, text: Tensor, q: Tensor, plain: Tensor) -> Tensor:
        """The same of the unconditional rows: every edit's unconditional context is one and the same."""
        context = self._unconditional.read() if self.moving else text[: len(q)]
        k, v = (x.to(q.dtype) for x in keys_values(attn, context.to(text.dtype)))
        if self.moving and slot.moves:
            one, pull = ops.attention_with_context_gradient(q, k, v, query_weight=slot.mask, scale=attn.scale)
            step = ops.context_update(pull, k, attn.to_k, gamma_attn=self._now[2], gamma_norm=self._now[3])
            self._unconditional.add(step)
        else:
            one = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        share = self._now[4]
        return (share * plain.to(share.dtype) + (1 - share) * one).to(q.dtype)


def _resized(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mask at a layer's grid, `[samples,M]`."""
    return F.interpolate(mask.float(), size=grid).flatten(1)
