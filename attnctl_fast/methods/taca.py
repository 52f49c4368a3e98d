"""TACA: image tokens that look at the text more sharply in the first steps."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from .._numbers import check_number, check_steps, step_count
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import family_of
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Method, Run


@dataclass(frozen=True)
class TACA(Method):
    """Multiply the logits of image rows and text columns by a factor, in the first steps.

    Temperature-adjusted cross-modal attention (arXiv 2506.07986), for joint attention, where a few text tokens share a
    softmax with thousands of image tokens. It is the model's own attention with the text's keys multiplied, for the
    image's rows alone: there is no mask. As in the released code it acts on all rows of the batch, those of guidance
    too.

    Args:
        factor: of these logits; 1.2 in the released code.
        steps: the first steps, in which it acts; an int counts steps, a float is a share of them.
        layers: name prefixes, or `by_downsampling(n)`. None for every layer of joint attention.

    Raises:
        ValueError: a number out of range; when it is put on, a model without joint attention.
    """

    factor: float = 1.2
    _: KW_ONLY
    steps: int | float = 3
    layers: LayerChoice = None

    single = True

    def __post_init__(self) -> None:
        check_number("factor", self.factor, 0.0, open_low=True)
        check_steps("steps", self.steps)
        object.__setattr__(self, "layers", check_choice(self.layers))

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        if not all(layer.text for layer in layers):
            raise ValueError(
                f"the pipeline has a {family_of(pipe).model}, but TACA is for joint attention, where image and text "
                "share a softmax (SD 3, FLUX)"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Sharpening(self, call)


class _Sharpening(Run):
    def __init__(self, method: TACA, call: Call) -> None:
        self.method, self.call = method, call
        self._factor: float | torch.Tensor = method.factor

    def before_denoiser(self, evaluation: Evaluation) -> None:
        first = step_count(self.method.steps, self.call.steps)
        now = self.call.step < first
        self.used = first > 0
        self.active = self.used and (now or evaluation.compiled)
        if evaluation.compiled:
            # One graph for all steps.
            factor = self.method.factor if now else 1.0
            self._factor = torch.full((), factor, dtype=evaluation.text.dtype, device=evaluation.text.device)

    def keys(self, site: Site, attention: Attention) -> None:
        attention.sharpen(self._factor)
