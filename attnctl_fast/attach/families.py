"""The differences between models: where a pipeline keeps one, what its arguments are called, which layers it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from .layers import Layer, unet_layers


@dataclass(frozen=True)
class Family:
    """Models that are attached to in the same way.

    component: where a pipeline keeps the model. sample, timestep, text: the model's arguments. layers: its attention
    layers by name, in order of execution. context: what they are given as the text, from the model's arguments.
    """

    component: str
    sample: str
    timestep: str
    text: str
    layers: Callable[[Any], dict[str, Layer]]
    context: Callable[[Any, dict[str, Any]], Tensor]

    def model_of(self, pipe: Any) -> Any:
        """Return the pipeline's model as it was before torch.compile wrapped it."""
        model = getattr(pipe, self.component)
        return getattr(model, "_orig_mod", model)

    def arguments(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of `model(*args, **kwargs)` by name."""
        return dict(zip(_parameters(type(model).forward), args, strict=False)) | kwargs

    def replaced(
        self, model: Any, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return `given` by name as positional arguments, as many as `args`, and keywords.

        Hooks on the model look for arguments where pipelines put them, and torch.compile would take another place for
        another call.
        """
        names = _parameters(type(model).forward)[: len(args)]
        return tuple(given[name] for name in names), {name: x for name, x in given.items() if name not in names}


@cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _unet_context(unet: Any, given: dict[str, Any]) -> Tensor:
    text: Tensor = given["encoder_hidden_states"]
    if unet.encoder_hid_proj is None or unet.config.encoder_hid_dim_type == "ip_image_proj":
        return text
    # Kolors' text is another encoder's.
    return unet.process_encoder_hidden_states(text, given.get("added_cond_kwargs"))


UNET = Family("unet", "sample", "timestep", "encoder_hidden_states", unet_layers, _unet_context)


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline's model.

    Raises:
        ValueError: the pipeline has no model that methods attach to.
    """
    name = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise ValueError(f"{name} has no UNet; methods attach to UNet pipelines (SD 1.x, SD 2.x, SDXL and their kin)")
    from diffusers import UNet2DConditionModel

    model = UNET.model_of(pipe)
    if not any(layer.cross for layer in UNET.layers(model).values()):
        raise ValueError(f"the UNet of {name} has no cross-attention layer; use a text-to-image pipeline")
    if not isinstance(model, UNet2DConditionModel):
        raise ValueError(
            f"the UNet of {name} is a {type(model).__name__}; methods attach to those of images "
            "(UNet2DConditionModel), where every row of the batch is a picture"
        )
    return UNET
