"""Normalized attention guidance: a negative prompt in every layer, for models that draw without guidance too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_steps, step_count
from ..attach.attention import Attention, plain, with_logsumexp
from ..attach.beside import SecondText
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import FAMILIES, family_of
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Method, Run
from ..ops.normalized_guidance import check_guidance, guided


@dataclass(frozen=True)
class NAG(Method):
    """Move the attention to the prompt away from the attention to a negative prompt, by a bounded step, in every layer.

    Normalized attention guidance (arXiv 2505.21179). Unlike a pipeline's own negative prompt it needs no guidance, so
    that it works on models of few steps too; with guidance it acts on the prompt's half. In cross-attention the layers
    read the negative prompt as well; in SD 3 and FLUX its text runs through the model beside the prompt's.

    Args:
        negative_prompt: what the picture is not to be: a text, or a list of one text per prompt.
        scale: strength; 1 is plain attention.
        tau: how many times longer than plain attention an image token's guided attention may be.
        alpha: share of the guided attention in the result.
        norm: how that length is measured: 2, as the released code does, or 1, the sum of the numbers' sizes, as the
            paper's text has it.
        steps: the first steps, in which it acts; an int counts steps, a float is a share of them.
        layers: name prefixes, or `by_downsampling(n)`. None for every layer that attends to the text.

    Raises:
        ValueError: no negative prompt or a number out of range; at the pipeline's call, a list of texts whose
            length is not the number of prompts.
    """

    negative_prompt: str | Sequence[str]
    _: KW_ONLY
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: int = 2
    steps: int | float = 1.0
    layers: LayerChoice = None

    single = True
    sends_text = True
    # The negative text has to pass through those layers of a joint model too in which it guides nothing.
    everywhere = True

    def __post_init__(self) -> None:
        texts = (self.negative_prompt,) if isinstance(self.negative_prompt, str) else self.negative_prompt
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"negative_prompt is {self.negative_prompt!r}; pass a text, or a list of one text per prompt"
            )
        object.__setattr__(self, "negative_prompt", texts[0] if len(texts) == 1 else tuple(texts))
        check_number("scale", self.scale, 1.0)
        check_number("tau", self.tau, 0.0, open_low=True)
        check_number("alpha", self.alpha, 0.0, 1.0)
        check_guidance(self.scale, self.tau, self.alpha, self.norm)
        check_steps("steps", self.steps)
        object.__setattr__(self, "layers", check_choice(self.layers))

    @property
    def texts(self) -> list[str]:
        """The negative prompts: one, or one per prompt."""
        return [self.negative_prompt] if isinstance(self.negative_prompt, str) else list(self.negative_prompt)

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        family = family_of(pipe)
        if any(layer.text for layer in layers) and not family.beside:
            known = ", ".join(one.model for one in FAMILIES if one.beside)
            raise ValueError(
                f"the pipeline has a {family.model}, but NAG cannot send a second text through it; of models with "
                f"joint attention use one of {known}"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Guiding(self, call, any(site.layer.text for site in sites))


class _Guiding(Run):
    """The negative prompt in one call of a pipeline."""

    def __init__(self, method: NAG, call: Call, joint: bool) -> None:
        self.method, self.call, self._joint = method, call, joint
        texts, count, images = method.texts, call.prompts.count, call.images
        if len(texts) not in (1, count):
            raise ValueError(
                f"negative_prompt holds {len(texts)} texts, but there are {count} prompts; pass one text for all of "
                "them, or one per prompt"
            )
        found = call.encode(texts)

        def of_samples(x: Tensor) -> Tensor:
            return x.expand(call.samples, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(images, 0)

        self._contexts = of_samples(found.contexts)
        self._pooled = None if found.pooled is None else of_samples(found.pooled)
        self._mask = None if found.mask is None else of_samples(found.mask)
        self._more = {name: of_samples(x) for name, x in found.more.items()}
        self._context: Tensor | None = None
        self._bias: Tensor | None = None
        self._alpha: float | Tensor = method.alpha

    def encoded(self, embeddings: Tensor) -> Tensor:
        if self._contexts.shape[2] != embeddings.shape[2]:
            raise ValueError(
                f"the negative prompt's context has width {self._contexts.shape[2]} but the prompt's "
                f"{embeddings.shape[2]}; prompt embeddings must come from the pipeline's own text encoders"
            )
        return embeddings

    def before_denoiser(self, evaluation: Evaluation) -> None:
        method, rows, text = self.method, evaluation.rows, evaluation.text
        first = step_count(method.steps, self.call.steps)
        now = self.call.step < first
        self.used = first > 0
        self.active = self.used and (now or evaluation.compiled)
        self.beside = self._context = None
        if not self.active or not rows.conditional:
            return
        if evaluation.compiled:
            # One graph for all steps: those behind the last one have a share of 0.
            wide = torch.promote_types(text.dtype, torch.float32)
            self._alpha = torch.full((), method.alpha if now else 0.0, dtype=wide, device=text.device)
        negative = rows.of_samples(self._contexts.to(text))
        if self._joint:
            self.beside = SecondText(negative, None if self._pooled is None else rows.of_samples(self._pooled))
            return
        more = {name: rows.of_samples(x) for name, x in self._more.items()}
        own = evaluation.context_of(negative, more)
        # The others read it too, for the model's layers take one length for all rows.
        self._context = rows.merge(own, own.new_zeros(len(rows.others), *own.shape[1:]))
        if self._mask is not None:
            mask = rows.of_samples(self._mask).to(text.device)
            self._bias = torch.zeros(mask.shape, device=text.device).masked_fill(mask == 0, -torch.inf)

    def more_context(self, site: Site, text: Tensor, context: Tensor) -> Tensor | None:
        return self._context if site.chosen else None

    def attend(self, site: Site, attention: Attention) -> None:
        rows = attention.rows
        if not site.chosen or not rows.conditional or (self._joint and attention.beside is None):
            return
        method, one = self.method, attention.conditional
        numbers: dict[str, Any] = {"scale": method.scale, "tau": method.tau, "norm": method.norm}
        numbers["alpha"] = self._alpha
        bias = None if self._bias is None else self._bias[: len(one.q)]
        added = attention.columns(site) if attention.beside is None else attention.beside
        k, v = (rows.take(x) for x in added)
        if attention.conditional_set:
            # Somebody has edited the attention to the prompt.
            if self._joint:
                k, v = (torch.cat([x, one.parted(whole)[1]], 2) for x, whole in ((k, one.k), (v, one.v)))
            away = plain(one.q, k, v, bias, one.scale)
            attention.conditional_out = guided(attention.conditional_out, away, **numbers)
            return
        text, shared, key_bias = (one.k, one.v), None, one.key_bias
        if self._joint:
            (text_k, image_k), (text_v, image_v) = one.parted(one.k), one.parted(one.v)
            text, shared = (text_k, text_v), with_logsumexp(one.q, image_k, image_v, None, one.scale)
        attention.conditional_out = ops.normalized_guidance(
            one.q,
            *text,
            k,
            v,
            softmax_scale=one.scale,
            key_bias=key_bias,
            key_bias_negative=bias,
            shared=shared,
            **numbers,
        )
