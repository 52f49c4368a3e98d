"""Latent guidance by hand: the loop as it is published, with the whole UNet, eager attention and full maps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Kept:
    """A processor that keeps its probabilities, `[B,N,M]`, mean over heads."""

    def __init__(self, maps: list[Tensor]) -> None:
        self.maps = maps

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, k, v = (
            attn.head_to_batch_dim(x)
            for x in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        probabilities = (attn.scale * q @ k.mT).softmax(-1)
        self.maps.append(probabilities.unflatten(0, (-1, attn.heads)).mean(1).mT)
        return attn.to_out[0](attn.batch_to_head_dim(probabilities @ v))


def maps_of(unet: Any, layers: list[str], run: Callable[[], Any]) -> Tensor:
    """Attention maps `[B,N,M]` of one evaluation of the UNet, mean over heads and layers."""
    maps: list[Tensor] = []
    own = dict(unet.attn_processors)
    unet.set_attn_processor(
        {name: Kept(maps) if name.removesuffix(".processor") in layers else one for name, one in own.items()}
    )
    try:
        run()
    finally:
        unet.set_attn_processor(own)
    return torch.stack(maps).mean(0)


def sample(
    pipe: Any,
    prompt: str,
    latents: Tensor,
    *,
    layers: list[str],
    loss: Callable[[Tensor], Tensor],
    sizes: list[float],
    steps: int,
    bounds: dict[int, float] | None = None,
    late_check: bool = True,
    max_refinements: int = 20,
    guidance_scale: float = 7.5,
    rounding: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, list[float]]:
    """The final latents of one prompt, guided at the first `len(sizes)` steps, and the loss at each evaluation.

    The UNet is evaluated and differentiated within `rounding`.
    """
    rounding = rounding or nullcontext()
    scheduler, unet, losses = pipe.scheduler, pipe.unet, []
    positive, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
    scheduler.set_timesteps(steps)
    latents = latents.to(positive) * scheduler.init_noise_sigma

    def gradient(x: Tensor, t: Any) -> tuple[Tensor, float]:
        # The step is one on the model's input, which the latents follow.
        model_input = scheduler.scale_model_input(x.detach(), t).detach().requires_grad_()
        factor = scheduler.scale_model_input(torch.ones(1, 1, 1, 1, dtype=x.dtype), t)
        with torch.enable_grad(), rounding:
            maps = maps_of(unet, layers, lambda: unet(model_input, t, encoder_hidden_states=positive))
            value = loss(maps)
            losses.append(value.item())
            return torch.autograd.grad(value, model_input)[0] / factor, value.item()

    for index, t in enumerate(scheduler.timesteps):
        step = index // scheduler.order
        bound = (bounds or {}).get(step) if index == step * scheduler.order else None
        if step < len(sizes) or bound is not None:
            size = sizes[min(step, len(sizes) - 1)]
            move, value = gradient(latents, t)
            moves, previous = 0, value
            while bound is not None and previous > bound and moves < max_refinements:
                latents = latents - size * move
                moves, previous = moves + 1, value
                move, value = gradient(latents, t)
                previous = previous if late_check else value
            if step < len(sizes):
                latents = latents - size * move
        with torch.no_grad():
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            with rounding:
                both = unet(model_input, t, encoder_hidden_states=torch.cat([negative, positive])).sample
            without, with_text = both.chunk(2)
            latents = scheduler.step(without + guidance_scale * (with_text - without), t, latents).prev_sample
    return latents.detach(), losses
