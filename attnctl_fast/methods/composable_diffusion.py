"""Composable Diffusion: the predictions for several prompts, added up."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._numbers import check_number
from ..attach.call import Call, Site
from ..attach.evaluation import Evaluation
from ..attach.families import check_unet
from ..attach.layers import Layer
from ..attach.protocol import Method, Run
from ..attach.rows import with_rows

Texts: TypeAlias = Sequence[str] | Sequence[Sequence[str]]


# Options of pipelines with a third row per image: perturbed attention guidance, InstructPix2Pix.
_THREE = ("pag_scale", "image_guidance_scale")


@dataclass(frozen=True)
class ComposableDiffusion(Method):
    """Add up the predictions for several prompts, or take some away.

    Composable Diffusion (arXiv 2206.01714, ECCV 2022): conjunction and negation of prompts.

    The conditional prediction becomes `e + sum_i w_i (e_i - e)`, with e the unconditional prediction and e_i that for
    the i-th prompt; the pipeline's guidance scale multiplies the sum as it always does. These prompts take the place of
    the one that the pipeline is called with, which is not evaluated; its negative prompt stays. All prompts and the
    unconditional one run through the UNet as one batch. It does not go together with other methods, and is for UNets;
    transformers are refused.

    Args:
        prompts: one or more texts, the same for every image; or one list of as many texts per prompt of the call.
        weights: of the prompts; a negative one takes away what its prompt says. None for 1 each.

    Raises:
        ValueError: an empty prompt, or weights that are not one finite number per prompt. Lists of texts whose number
            is not that of the call's prompts, and calls without guidance, are reported when the pipeline is called.
    """

    prompts: Texts
    weights: Sequence[float] | None = None
    _: KW_ONLY

    alone = True

    def __post_init__(self) -> None:
        given = self.prompts
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise ValueError(f"prompts is {given!r}; pass a list of texts, or one list of texts per prompt")
        nested = [not isinstance(item, str) for item in given]
        if any(nested) and not all(nested):
            raise ValueError(f"prompts is {given!r}; pass texts, or lists of texts, not a mix")
        rows = [tuple(row) for row in given] if all(nested) else [tuple(given)]
        for row in rows:
            for text in row or [""]:
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f"prompts holds {text!r}; every prompt must say what to add or to take away")
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"prompts holds lists of {sorted({len(row) for row in rows})} texts; make them as long")
        object.__setattr__(self, "prompts", tuple(rows) if all(nested) else rows[0])
        weights = (1.0,) * len(rows[0]) if self.weights is None else tuple(self.weights)
        if len(weights) != len(rows[0]):
            raise ValueError(f"weights holds {len(weights)} numbers for {len(rows[0])} prompts; pass one for each")
        for weight in weights:
            check_number("a weight", weight, -float("inf"))
        object.__setattr__(self, "weights", weights)

    def check(self, pipe: Any, layers: list[Layer]) -> None:
        check_unet(pipe, "ComposableDiffusion adds rows to the arguments of a UNet")
        options = inspect.signature(type(pipe).__call__).parameters
        if three := next((name for name in _THREE if name in options), None):
            raise ValueError(
                f"{type(pipe).__name__} has rows of its own beside the conditional and unconditional ones ({three}), "
                "which ComposableDiffusion cannot add up; use a pipeline without them"
            )

    def start(self, call: Call, sites: list[Site]) -> Run:
        return _Adding(self, call)

    def texts(self, count: int) -> list[str]:
        """Return the prompts in turn, each for all of `count` prompts of a call.

        Raises:
            ValueError: lists of texts for another number of prompts.
        """
        rows = (self.prompts,) * count if isinstance(self.prompts[0], str) else self.prompts
        if len(rows) != count:
            raise ValueError(f"prompts holds {len(rows)} lists, but the call has {count} prompts; pass one per prompt")
        return [text for column in zip(*rows, strict=True) for text in column]


class _Adding(Run):
    """The prompts in one pipeline call: rows added before the model runs, predictions added up after it."""

    def __init__(self, method: ComposableDiffusion, call: Call) -> None:
        assert method.weights is not None
        self._weights, self.call = method.weights, call
        found = call.encode(method.texts(call.prompts.count))
        self._context = found.contexts.repeat_interleave(call.images, 0)
        self._pooled = None if found.pooled is None else found.pooled.repeat_interleave(call.images, 0)

    def before_denoiser(self, evaluation: Evaluation) -> None:
        """Give the model conditional rows for every prompt, after the unconditional ones.

        Raises:
            ValueError: there are no unconditional rows, or contexts of another length.
        """
        samples, given, text = self.call.samples, evaluation.given, evaluation.text
        rows, count = evaluation.rows.total, len(self._weights)
        if rows != 2 * samples or evaluation.rows.conditional != tuple(range(samples, rows)):
            scale = getattr(self.call.pipe, "guidance_scale", None)
            remedy = (
                "call the pipeline with guidance_scale above 1"
                if scale is not None and scale <= 1
                else f"{type(self.call.pipe).__name__} does not make them with this model and these arguments"
            )
            raise ValueError(
                f"the model was called with {rows} rows for {samples} images; ComposableDiffusion needs the "
                f"unconditional and the conditional ones in one batch, in this order, in all steps: {remedy}"
            )
        if text.shape[1:] != self._context.shape[1:]:
            raise ValueError(
                f"the context has {tuple(text.shape[1:])} tokens and channels, the composed prompts' "
                f"{tuple(self._context.shape[1:])}; leave out prompt_embeds and negative_prompt_embeds"
            )

        def spread(x: Tensor) -> Tensor:
            return torch.cat([x[:samples], x[samples:].repeat(count, *[1] * (x.ndim - 1))])

        kept = (given.get("added_cond_kwargs") or {}).get("text_embeds")
        given.update({name: with_rows(value, rows, spread) for name, value in given.items()})
        given["encoder_hidden_states"] = torch.cat([text[:samples], self._context.to(text)])
        if self._pooled is not None and kept is not None:
            given["added_cond_kwargs"]["text_embeds"] = torch.cat([kept[:samples], self._pooled.to(kept)])

    def after_denoiser(self, output: Tensor) -> Tensor:
        wide = torch.promote_types(output.dtype, torch.float32)
        without, *conditional = output.to(wide).split(self.call.samples)
        total = without
        for weight, one in zip(self._weights, conditional, strict=True):
            total = total + weight * (one - without)
        return torch.cat([without, total]).to(output.dtype)
