"""PLADIS: cross-attention moved from softmax towards a sparse attention, and beyond it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._numbers import check_number, check_steps, step_count
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import family_of
from ..attach.layers import Layer, LayerChoice, check_choice
from ..attach.protocol import Edited, Method, Run
from ..ops.entmax_attention import mixed


@dataclass(frozen=True)
class PLADIS(Method):
    """Move cross-attention from softmax to 1.5-entmax, which gives weight to few words, and beyond it.

    PLADIS (arXiv 2503.07677): dense + scale (sparse - dense), in all rows of the batch, with guidance or without. It
    is for models with cross-attention.

    Args:
        scale: 0 is softmax, 1 is entmax, 2 goes as far again.
        steps: the first steps, in which it acts; an int counts steps, a float is a share of them.
        layers: name prefixes, or `by_downsampling(n)`. None for every cross-attention layer.

    Raises:
        ValueError: a number out of range; when it is put on, a model with joint attention.
    """

    scale: float = 2.0
    _: KW_ONLY
    steps: int | float = 1.0
    layers: LayerChoice = None

    edits_attention = True

    def __post_init__(self) -> None:
        check_number("scale", self.scale, 0.0)
        check_steps("steps", self.steps)
        object.__setattr__(self, "layers", check_choice(self.layers))

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        if any(layer.text for layer in layers):
            raise ValueError(
                f"the pipeline has a {family_of(pipe).model}, but PLADIS is for layers that attend to the text by "
                "itself (UNets, PixArt, Sana, HunyuanDiT, Wan, LTX)"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Sparse(self, call)


class _Sparse(Run):
    def __init__(self, method: PLADIS, call: Call) -> None:
        self.method, self.call = method, call
        self._weight: float | Tensor = method.scale

    def before_denoiser(self, evaluation: Evaluation) -> None:
        first, text = step_count(self.method.steps, self.call.steps), evaluation.text
        now = self.call.step < first
        self.used = first > 0 and self.method.scale > 0
        self.active = self.used and (now or evaluation.compiled)
        if evaluation.compiled:
            # One graph for all steps.
            wide = torch.promote_types(text.dtype, torch.float32)
            self._weight = torch.full((), self.method.scale if now else 0.0, dtype=wide, device=text.device)

    def _of(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
        return ops.entmax_attention(q, k, v, weight=self._weight, scale=scale, key_bias=key_bias)

    def edit(self, site: Site, attention: Attention) -> Edited:
        out = self._of(attention.q, attention.k, attention.v, attention.key_bias, attention.scale)
        return Edited(out, lambda logits, head, rows: mixed(logits, self._weight))

    def attend(self, site: Site, attention: Attention) -> None:
        rows = attention.rows
        if rows.others:
            q, k, v = (rows.rest(x) for x in (attention.q, attention.k, attention.v))
            key_bias = None if attention.key_bias is None else rows.rest(attention.key_bias)
            attention.unconditional_out = self._of(q, k, v, key_bias, attention.scale)
