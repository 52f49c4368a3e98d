"""Energy-based cross-attention as its released code does it (arXiv 2306.09869), written from the equations.

What is kept of that code's structure: all attention, the image's own too, with its logits in memory and a transposed
softmax of them; the step of the context in every layer, also where nobody reads it (self-attention, the last layer) or
its gammas are zero; the keys' norms as the diagonal of their product with themselves; one pass through attention and
its output projection per context, for both halves; contexts at the precision of the pipeline.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnctl_fast import schedules
from bench.pictures import ours
from bench.pictures.attention_layers import flat_heads, flat_logits, flat_output, layers_of, replaced
from bench.pictures.sampling import PROMPT, Drawn, Setting, Text, encode, nothing, sample


class _Contexts:
    """The contexts of one evaluation of the UNet. gammas: of the prompt. edits: unconditional and conditional rows of
    every edit's context, its signed weight and its gammas."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.gammas = (0.0, 0.0)
        self.edits: list[tuple[float, tuple[float, float]]] = []
        self.main: Tensor | None = None
        self.unconditional: Tensor
        self.conditional: list[Tensor] = []

    def projected(self, attn: Any, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layer's output, and queries, keys and logits."""
        q, k, v = flat_heads(attn, hidden_states, context)
        logits = flat_logits(attn, q, k)
        return flat_output(attn, logits.softmax(-1).to(q.dtype), v), q, k, logits

    def step(self, attn: Any, q: Tensor, k: Tensor, logits: Tensor, gammas: tuple[float, float]) -> Tensor:
        """The increment of a context."""
        pull = attn.batch_to_head_dim(torch.bmm(logits.mT.softmax(-1).to(q.dtype), q)) * gammas[0]
        keys = attn.batch_to_head_dim(k)
        share = torch.diagonal(keys @ keys.mT, dim1=-2, dim2=-1).softmax(-1)
        pull -= keys * share.unsqueeze(-1) * gammas[1]
        return pull @ attn.to_k.weight.detach()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        own = encoder_hidden_states is None
        if self.main is None and not own:
            self.main = encoder_hidden_states
        context = hidden_states if own else self.main
        assert context is not None
        out, q, k, logits = self.projected(attn, hidden_states, context)
        moved: list[Tensor] = []
        if not own and self.edits:
            out, moved = self._composed(attn, hidden_states, out)
        increment = self.step(attn, q, k, logits, self.gammas)
        if not own:
            self.main = context + increment
        for index, one in enumerate(moved):
            unconditional, conditional = one.chunk(2)
            self.conditional[index] = self.conditional[index] + conditional
            self.unconditional = self.unconditional + unconditional / len(moved)
        return out / attn.rescale_output_factor

    def _composed(self, attn: Any, hidden_states: Tensor, out: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The mean of the outputs, and the increments of the edits' contexts."""
        total, moved = 1.0, []
        for (weight, gammas), context in zip(self.edits, self.conditional, strict=True):
            both = torch.cat([self.unconditional, context])
            one, q, k, logits = self.projected(attn, hidden_states, both)
            moved.append(self.step(attn, q, k, logits, gammas))
            out, total = out + weight * one, total + weight
        return out / total, moved

    def draw(self, before: Any, texts: tuple[Text, Text] | None = None) -> Drawn:
        layers = layers_of(self.setting.pipe)
        with replaced(layers, dict.fromkeys(layers, self)):
            return Drawn(sample(self.setting, before=before, texts=texts))


def energy_context(setting: Setting) -> Drawn:
    """The context update; see the top of this file."""
    method, contexts = ours.method("EnergyContext", setting), _Contexts(setting)
    factors = schedules.factors(method.schedule, setting.steps)

    def before(latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        contexts.main = None
        contexts.gammas = factors[step] * method.gamma_attn, factors[step] * method.gamma_norm
        return latents

    return contexts.draw(before)


def composition(setting: Setting) -> Drawn:
    """Compositional averaging, after the output projections; see the top of this file."""
    method, contexts = ours.method("Composition", setting), _Contexts(setting)
    with torch.no_grad():
        texts = nothing(setting), encode(setting, PROMPT)
        unconditional = texts[0].context
        edits = [encode(setting, edit.prompt).context for edit in method.edits]
    runs = [edit.runs(setting.steps) for edit in method.edits]

    def before(latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        on = [index for index, run in enumerate(runs) if run[step]]
        contexts.main, contexts.unconditional = None, unconditional
        contexts.conditional = [edits[index] for index in on]
        contexts.edits = [
            (edit.direction * edit.weight, (edit.gamma_attn, edit.gamma_norm))
            for edit in (method.edits[index] for index in on)
        ]
        return latents

    return contexts.draw(before, texts)
