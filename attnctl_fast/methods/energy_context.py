"""Energy-based cross-attention: the context moves along the gradient of its energy from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .. import schedules
from .._layers import LayerChoice, check_choice
from .._numbers import check_number
from ..ops.context_update import CONVENTIONS

if TYPE_CHECKING:
    from .._layers import Layer
    from .._tokens import Prompts, Target

TokenWeights: TypeAlias = "Mapping[Target, float] | Sequence[Mapping[Target, float]]"


@dataclass(frozen=True)
class EnergyContext:
    """Bayesian context update (arXiv 2306.09869, NeurIPS 2023, "Bayesian context update"; MATH.md section 2).

    Every cross-attention layer moves the text's context a step down its energies and hands it to the next layer; each
    evaluation of the UNet begins with the text encoder's own. Conditional and unconditional rows are both moved, as
    published.

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
        """The released code, with the steps that its README gives for several concepts in one picture."""
        return cls(gamma_attn, gamma_norm, **overrides)

    @classmethod
    def paper(
        cls, gamma_attn: float = 0.01, gamma_norm: float = 0.02, *, alpha: float = 1.0, **overrides: Any
    ) -> EnergyContext:
        """The paper's energies: the keys' squared norm, with weight `alpha`, in that of the attention, and the softmax
        of ||k||^2 / 2 in the other's gradient. The steps are the released code's."""
        return cls(gamma_attn, gamma_norm, **{"alpha": alpha, "convention": "paper", **overrides})

    def default_layers(self, layers: dict[str, Layer]) -> list[str]:
        return list(layers)

    def weight_rows(self, prompts: Prompts) -> Tensor | None:
        """The factor of every token, `[prompts, N]`, or None where all are one.

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


def _check_token_weights(weights: Any) -> tuple[tuple[tuple[Target, float], ...], ...] | None:
    """Token weights in hashable form, one row of (word, factor) per mapping; as they were where they are so already."""
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


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {shape}; it must be a tensor [height, width] or [images, height, width]")
    if not (mask.ge(0) & mask.le(1)).all():
        raise ValueError("mask holds numbers outside 0..1 or NaN; it must hold shares, 1 where the context is moved")
