"""Energy-based cross-attention: the context moves along the gradient of its energy from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import ops, schedules
from .._numbers import check_number
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.contexts import Cascade, at_site, moving_mask
from ..attach.evaluation import Evaluation
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.prompts import Prompts, Target
from ..attach.protocol import Method, Run
from ..ops.context_update import CONVENTIONS

TokenWeights: TypeAlias = "Mapping[Target, float] | Sequence[Mapping[Target, float]]"


@dataclass(frozen=True)
class EnergyContext(Method):
    """Take one gradient step on the text embeddings in each cross-attention layer, and pass them on.

    The Bayesian context update of energy-based cross-attention (arXiv 2306.09869, NeurIPS 2023).

    Every cross-attention layer moves the text's context a step down its energies and hands it to the next layer; each
    evaluation of the model begins with the text encoder's own. Conditional and unconditional rows are both moved, as
    published. Models with joint attention (SD 3, FLUX), whose blocks change the text themselves, are refused.

    Args:
        gamma_attn: step on the energy of the attention; 0.01 to 0.025 is typical for generation and inpainting.
        gamma_norm: step on the energy of the keys' norms. With both at zero the pipeline's own attention stays in
            place, bit for bit.
        layers: name prefixes, or `by_downsampling(n)`: the layers that move the context. All later ones read it. None
            for every cross-attention layer.
        schedule: factor of both steps over the call: one of `attnctl_fast.schedules`, a function of the share of the
            steps that are done, or one number per step.
        token_weights: factors of gamma_attn for words, phrases or token ids of the prompt, such as `{"crown": 2.5}`, in
            the conditional rows; one mapping for every prompt, or a list with one per prompt.
        alpha: weight of the keys' squared norm in the attention's energy; the released code has none.
        convention: `"official"` (the released code: the softmax of ||k||^2) or `"paper"` (of ||k||^2 / 2).
        mask: which places of the image move the context, `[height, width]` or one per image `[images, height, width]`
            in 0..1, of the picture's proportions. None takes the mask of an inpainting pipeline's call, and the whole
            image elsewhere.

    Raises:
        ValueError: an argument out of range. Token weights that do not fit the prompts are reported when the pipeline
            is called, a mask or a schedule that does not fit the call before its first step.
    """

    gamma_attn: float
    gamma_norm: float
    _: KW_ONLY
    layers: LayerChoice = None
    schedule: schedules.ScheduleLike = schedules.constant()
    token_weights: TokenWeights | None = None
    alpha: float = 0.0
    convention: str = "official"
    mask: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_number("gamma_attn", self.gamma_attn, 0.0)
        check_number("gamma_norm", self.gamma_norm, 0.0)
        object.__setattr__(self, "layers", check_choice(self.layers))
        object.__setattr__(self, "schedule", schedules.check_schedule(self.schedule))
        object.__setattr__(self, "token_weights", _check_token_weights(self.token_weights))
        check_number("alpha", self.alpha, 0.0)
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"convention is {self.convention!r}; it must be one of {', '.join(map(repr, CONVENTIONS))}"
            )
        _check_mask(self.mask)

    @classmethod
    def official(cls, gamma_attn: float = 0.01, gamma_norm: float = 0.02, **overrides: Any) -> EnergyContext:
        """Construct the released code, with the steps that its README gives for several concepts in one picture."""
        return cls(gamma_attn, gamma_norm, **overrides)

    @classmethod
    def paper(
        cls, gamma_attn: float = 0.01, gamma_norm: float = 0.02, *, alpha: float = 1.0, **overrides: Any
    ) -> EnergyContext:
        """Construct the paper's energies.

        They have the keys' squared norm, with weight `alpha`, in that of the attention, and the softmax of ||k||^2 / 2
        in the other's gradient. The steps are the released code's.
        """
        return cls(gamma_attn, gamma_norm, **{"alpha": alpha, "convention": "paper", **overrides})

    single = everywhere = True

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        if any(layer.text for layer in layers):
            raise ValueError(
                f"the layers of {type(pipe).__name__} attend to text and image in one, and change the text themselves, "
                "so there is no context for EnergyContext to move; use a model with cross-attention (UNets, PixArt, "
                "Sana, HunyuanDiT, Wan, LTX)"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Moving(self, call, sites)

    def weight_rows(self, prompts: Prompts) -> Tensor | None:
        """Return the factor of every token, `[prompts, N]`, or None where all are one.

        Raises:
            ValueError: token weights that do not fit the prompts.
        """
        if self.token_weights is None:
            return None
        rows: Any = self.token_weights
        if len(rows) not in (1, prompts.count):
            raise ValueError(
                f"token_weights holds {len(rows)} mappings, but there are {prompts.count} prompts; pass one for all of "
                "them, or one per prompt"
            )
        weights = torch.ones(prompts.count, prompts.length, dtype=torch.float64)
        for index in range(prompts.count):
            for item, factor in rows[index % len(rows)]:
                weights[index, prompts.find(item, index, "token_weights")] = factor
        return weights


class _Moving(Run):
    """The prompt's context on its way through the layers of one call."""

    def __init__(self, method: EnergyContext, call: Call, sites: list[Site]) -> None:
        self.method, self.call, self._sites = method, call, sites
        self._weights = method.weight_rows(call.prompts)
        if method.mask is not None:
            # The call's, for whatever moves contexts.
            call.mask = _of_samples(method.mask, call.samples)
        for site in sites:
            # What the last layer would move nobody reads.
            site.updates = site.chosen and site is not sites[-1]
        self._gammas: Tensor | None = None
        self._shape: tuple[Any, ...] = ()
        self._context: Cascade
        self._token_weight: Tensor | None = None
        self._table: Tensor
        self._now: Tensor

    def before_denoiser(self, evaluation: Evaluation) -> None:
        method, call, text = self.method, self.call, evaluation.text
        wide = torch.promote_types(text.dtype, torch.float32)
        if self._gammas is None:
            factors = torch.tensor(schedules.factors(method.schedule, call.steps), dtype=torch.float64)
            self._gammas = factors[:, None] * torch.tensor([method.gamma_attn, method.gamma_norm], dtype=torch.float64)
            self._moves = self._gammas.any(1).tolist()
            self.used = any(self._moves)
        shape = (evaluation.rows.conditional, text.shape, text.dtype, text.device, call.latents)
        if shape != self._shape:
            self._allocate(evaluation, wide)
            self._shape = shape
        # A call may run past the schedule's end: a callback that repeats steps, say.
        step = min(call.step, len(self._gammas) - 1)
        self.active = self._moves[step]
        self._now = self._table[step].clone()
        self._context.reset(evaluation.context_of(text))

    def _allocate(self, evaluation: Evaluation, wide: torch.dtype) -> None:
        assert self._gammas is not None
        text, rows, samples = evaluation.text, evaluation.rows, self.call.samples
        self._table = self._gammas.to(text.device, wide)
        self._context = Cascade(evaluation.context_of(text))
        if self._weights is not None:
            weights = torch.ones(rows.total, self._weights.shape[1], dtype=torch.float64)
            weights[list(rows.conditional)] = rows.of_samples(self._weights.repeat_interleave(self.call.images, 0))
            self._token_weight = weights.to(text.device, wide)
        mask = moving_mask(self.call)
        for site in self._sites:
            site.mask = at_site(mask, site, text)
            if site.mask is not None:
                site.mask = site.mask.repeat(rows.total // samples, 1)

    def context(self, site: Site, text: Tensor) -> Tensor:
        return self._context.read().to(text.dtype)

    def attend(self, site: Site, attention: Attention) -> None:
        if not site.updates:
            return
        q, k, v, bias = attention.q, attention.k, attention.v, attention.key_bias
        out, pull = ops.attention_with_context_gradient(
            q, k, v, query_weight=site.mask, scale=attention.scale, key_bias=bias
        )
        attention.fill(out)
        self._context.add(
            ops.context_update(
                pull,
                k,
                attention.module.to_k,
                gamma_attn=self._now[0],
                gamma_norm=self._now[1],
                token_weight=self._token_weight,
                alpha=self.method.alpha,
                convention=self.method.convention,
                key_bias=bias,
            )
        )


def _check_token_weights(weights: Any) -> tuple[tuple[tuple[Target, float], ...], ...] | None:
    """Return token weights in hashable form, one row of (word, factor) per mapping."""
    if weights is None:
        return None
    rows = [weights] if isinstance(weights, Mapping) else weights
    if isinstance(rows, tuple) and all(isinstance(row, tuple) for row in rows):
        rows = [dict(row) for row in rows]
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(
            f"token_weights is {weights!r}; pass a mapping such as {{'crown': 2.5}}, or a list of one per prompt"
        )
    for row in rows:
        for item, factor in row.items():
            word = isinstance(item, str) and item.strip()
            if not word and (isinstance(item, (str, bool)) or not isinstance(item, int) or item < 0):
                raise ValueError(f"token_weights holds {item!r}; its keys are words, phrases or token ids from 0 on")
            check_number(f"token_weights[{item!r}]", factor, 0.0)
    return tuple(tuple((item, float(factor)) for item, factor in row.items()) for row in rows)


def _of_samples(mask: Tensor, samples: int) -> Tensor:
    """Return the mask `[samples,1,height,width]`."""
    mask = mask if mask.ndim == 3 else mask[None]
    if len(mask) not in (1, samples):
        raise ValueError(f"mask holds {len(mask)} masks for {samples} images; pass one, or one per image")
    return mask[:, None].expand(samples, -1, -1, -1)


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {shape}; it must be a tensor [height, width] or [images, height, width]")
    if not (mask.ge(0) & mask.le(1)).all():
        raise ValueError("mask holds numbers outside 0..1 or NaN; it must hold shares, 1 where the context is moved")
