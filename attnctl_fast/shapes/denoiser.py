"""What training and measuring need to know of a denoising model, and the two models that ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn


class Recorder(Protocol):
    """What one attention layer did in its last forward pass.

    probabilities: averaged over heads, with gradients, float32 `[B, M, N]`; column 1 + i is the text's word i.
    """

    probabilities: torch.Tensor | None


class Denoiser(Protocol):
    """A kind of model that draws shapes.

    layers: the names of the attention modules whose maps are to say where an object is. about: sentences of its card,
    of its `pipeline`, `model`, `loss` and `text` encoders.
    """

    layers: tuple[str, ...]
    about: Mapping[str, str]

    def build(self) -> nn.Module:
        """Build the model with random weights."""

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return what `errors` takes as texts: token ids, one row for each text."""

    def record(self, model: nn.Module) -> AbstractContextManager[dict[str, Recorder]]:
        """Record the probabilities of `layers` at every forward pass, by name; restore the model on leaving.

        Where a word stands in the texts of several encoders, a layer has a recorder for each.
        """

    def levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw how much noise training examples get, each from 0 (none) to 1 (nothing else), `[count]`."""

    def errors(
        self, model: nn.Module, latents: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on noised latents.

        Returns:
            The training loss of every sample `[B]`, and the share of the latents in what the model saw, 0 to 1, `[B]`.
        """

    def pipeline(self, vae: Any, model: nn.Module) -> Any:
        """Put a pipeline together."""


_HOMES = {"unet": ("unet", "UNetDenoiser"), "mmdit": ("mmdit", "MMDiTDenoiser")}
MODELS = tuple(_HOMES)


def denoiser_named(model: str, *, seed: int = 0, device: torch.device | str = "cpu") -> Denoiser:
    """Return the denoiser of a shipped model; its constructed text encoders come from the seed."""
    module, name = _HOMES[model]
    made: Denoiser = getattr(import_module(f".{module}", __package__), name)(seed, torch.device(device))
    return made


def denoised(pipe: Any) -> Any:
    """Return the denoising model of a pipeline."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer
