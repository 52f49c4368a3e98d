"""Velocity guidance: the model's prediction is corrected so that the latents descend a loss on attention maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._numbers import check_number, step_count
from ..attach.attention import Attention
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.guidance import frozen
from ..attach.layers import Layer
from ..attach.protocol import Run
from ..attach.scheduler import prediction_type
from .map_guidance import MapGuidance, MapRun, set_own


@dataclass(frozen=True)
class VelocityGuidance(MapGuidance):
    """Correct the velocity by which the latents flow, by a loss on maps of attention to the text.

    Optimal control of a flow (arXiv 2510.02315, CVPR 2026 workshop), for any loss: subclass it and give `loss`.

    With x the latents, s the share of noise in them (1 at the start) and f the loss, the velocity v, of noise minus
    picture, becomes `v + strength * sigma * s * df/dx`, where `sigma = 2 (s + 0.001) / (1 - s + 0.001)`. Models that
    predict something else than a velocity (Stable Diffusion) are corrected by what that means for their prediction.
    The maps are those of the denoising step itself, whose conditional rows are evaluated by themselves: guidance costs
    a backward pass, and no evaluation of the model. Other methods act in it too; the maps are those before their edits.
    A sample whose loss or gradient is not finite is not corrected, and a RuntimeWarning says so after the call. Guided
    steps are not compiled.

    Args:
        layers: name prefixes, or `by_downsampling(n)`: layers with text, of one grid, whose maps are averaged.
            None takes `by_downsampling(4)`, 16x16 for Stable Diffusion at 512x512, and of a transformer all blocks
            with text but those of a single stream.
        steps: the first steps to guide; an int counts them, a float is a share of the steps that the call runs, rounded
            down.
        strength: factor of the correction, lambda in the paper; 1 to 5 there.

    Raises:
        ValueError: an argument out of range. Layers of different grids, and schedulers whose prediction cannot be
            corrected, are reported when it is put on a pipeline.
    """

    _: KW_ONLY
    steps: int | float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0.0)

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        super().check(pipe, layers)
        prediction_type(pipe.scheduler)
        if hasattr(pipe, "set_pag_applied_layers"):
            raise ValueError(
                f"{type(pipe).__name__} perturbs some rows of a batch, which {type(self).__name__} would take apart; "
                "use the pipeline without perturbed attention guidance"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Correcting(self, call, sites)


VelocityGuidance.__setattr__ = set_own  # type: ignore[assignment, method-assign]


class _Correcting(MapRun):
    """One method at work during one pipeline call."""

    method: VelocityGuidance

    def __init__(self, method: VelocityGuidance, call: Call, sites: list[Site]) -> None:
        super().__init__(method, call, sites)
        self._maps: list[Tensor] | None = None
        self._tokens: Tensor | None = None

    def apart(self) -> bool:
        return self.method.strength > 0 and self.call.step < step_count(self.method.steps, self.call.steps)

    def denoise(self, evaluation: Evaluation, evaluate: Callable[[], Any]) -> Any:
        """Evaluate the model, and correct what it predicts, where this step is guided."""
        if not evaluation.rows.conditional or not self.apart():
            return evaluate()
        ids = self.begin(evaluation)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            frozen(evaluation.model),
        ):
            latents = evaluation.track()
            self._tokens, self._maps = ids, []
            try:
                output = evaluate()
                maps = self._maps
            finally:
                self._tokens = self._maps = None
            # Another guidance may want the graph after this one.
            point = self.point(latents, maps[0] if len(maps) == 1 else torch.stack(maps).mean(0), keep=True)
        gradient = point.gradient.to(torch.promote_types(point.gradient.dtype, torch.float32))
        finite = self.finite(point).reshape(-1, *[1] * (gradient.ndim - 1))
        evaluation.correct(torch.where(finite, self._factor() * gradient, 0.0))
        self.look(point)
        return output

    def _factor(self) -> float:
        """Return the factor of the loss's gradient by the model's input in the correction of its prediction.

        The model's input is `z` of a flow, and `(alpha x0 + sigma eps)` with `alpha^2 + sigma^2 = 1` elsewhere, which
        is `(alpha + sigma) z`; so the velocity's correction, `c` by z, is `c` times a factor of the prediction's.
        """
        share = self.call.noise_share()
        sigma = 2 * (share + 1e-3) / (1 - share + 1e-3)
        alpha, noise = (x / math.hypot(share, 1 - share) for x in (1 - share, share))
        kind = prediction_type(self.call.pipe.scheduler)
        of_kind = {"flow": 1.0, "v_prediction": 1.0, "epsilon": alpha, "sample": -noise}[kind]
        return self.method.strength * sigma * share * of_kind

    def attend(self, site: Site, attention: Attention) -> None:
        # Guided steps are not compiled.
        if not torch.compiler.is_compiling() and self._maps is not None:
            self._maps.append(attention.maps(self._tokens, self.call.prompts.length))
