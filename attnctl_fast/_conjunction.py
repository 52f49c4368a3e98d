"""Several prompts in one UNet call: rows added before it, predictions added up after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._unet_call import with_rows

if TYPE_CHECKING:
    from .methods import ComposableDiffusion
    from .methods._base import Call


class Conjunction:
    """The prompts of a `ComposableDiffusion` in one pipeline call.

    Raises:
        ValueError: the prompts do not fit the call.
    """

    def __init__(self, method: ComposableDiffusion, call: Call) -> None:
        assert method.weights is not None
        self._weights = method.weights
        self._samples = call.samples
        context, pooled = call.encode(method.texts(call.prompts.count))
        self._context = context.repeat_interleave(call.images, 0)
        self._pooled = None if pooled is None else pooled.repeat_interleave(call.images, 0)

    def expanded(self, given: dict[str, Any]) -> dict[str, Any]:
        """The UNet's arguments with conditional rows for every prompt, after the unconditional ones.

        Raises:
            ValueError: there are no unconditional rows, or contexts of another length.
        """
        samples, count = self._samples, len(self._weights)
        rows = len(given["sample"])
        if rows != 2 * samples:
            raise ValueError(
                f"the UNet was called with {rows} rows for {samples} images; ComposableDiffusion needs the "
                "unconditional and the conditional ones in one batch: call the pipeline with guidance_scale above 1, "
                "without callbacks that end guidance"
            )
        text = given["encoder_hidden_states"]
        if text.shape[1:] != self._context.shape[1:]:
            raise ValueError(
                f"the context has {tuple(text.shape[1:])} tokens and channels, the composed prompts' "
                f"{tuple(self._context.shape[1:])}; leave out prompt_embeds and negative_prompt_embeds"
            )

        def spread(x: Tensor) -> Tensor:
            return torch.cat([x[:samples], x[samples:].repeat(count, *[1] * (x.ndim - 1))])

        changed = {name: with_rows(value, rows, spread) for name, value in given.items()}
        changed["encoder_hidden_states"] = torch.cat([text[:samples], self._context.to(text)])
        added = changed.get("added_cond_kwargs") or {}
        if self._pooled is not None and "text_embeds" in added:
            kept = given["added_cond_kwargs"]["text_embeds"][:samples]
            changed["added_cond_kwargs"] = {**added, "text_embeds": torch.cat([kept, self._pooled.to(kept)])}
        return changed

    def merged(self, output: Any) -> Any:
        """The UNet's output, as it would be of one prompt."""
        if isinstance(output, tuple):
            return (self._sum(output[0]), *output[1:])
        output.sample = self._sum(output.sample)
        return output

    def _sum(self, predictions: Tensor) -> Tensor:
        wide = torch.promote_types(predictions.dtype, torch.float32)
        without, *conditional = predictions.to(wide).split(self._samples)
        total = without
        for weight, one in zip(self._weights, conditional, strict=True):
            total = total + weight * (one - without)
        return torch.cat([without, total]).to(predictions.dtype)
