"""One task for every form of every method: the same prompt, latents and steps, and a sampler written by hand.

The published and stock forms run in `sample`, which does what the pipelines of diffusers do and gives the same picture;
ours run in the pipeline itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PROMPT = "a red circle and a blue square"
NOUNS = ("circle", "square")
PAIRS = (("red", "circle"), ("blue", "square"))
PHRASES = ("a red circle", "a blue square")
EDIT = "a green triangle"


@dataclass(frozen=True)
class Setting:
    """What is drawn.

    latents: `[B,4,height,width]`, the same prompt for all. steps: of the sampler; edited: the first ones, in which a
    method is at work. layers: of latent guidance, for a UNet without the methods' default ones; None for the default.
    """

    pipe: Any
    latents: Tensor
    steps: int
    edited: int
    guidance_scale: float = 7.5
    layers: tuple[str, ...] | None = None

    @property
    def batch(self) -> int:
        return len(self.latents)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        return self.latents.shape[2], self.latents.shape[3]

    @property
    def pixels(self) -> tuple[int, int]:
        factor = self.pipe.vae_scale_factor
        return factor * self.grid[0], factor * self.grid[1]

    def positions(self, text: str) -> list[int]:
        """Where a word or phrase stands in the prompt, as positions in the context."""
        tokenizer = self.pipe.tokenizer
        ids, wanted = tokenizer(PROMPT).input_ids, tokenizer(text, add_special_tokens=False).input_ids
        first = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        return list(range(first, first + len(wanted)))

    def end(self) -> int:
        """Position of the prompt's end of text."""
        return len(self.pipe.tokenizer(PROMPT).input_ids) - 1


class Text(NamedTuple):
    """A context `[B,N,C]` and what SDXL's UNet is given beside it, else None."""

    context: Tensor
    added: dict[str, Tensor] | None

    def and_then(self, other: Text) -> Text:
        """Both as rows of one batch."""
        added = None
        if self.added is not None and other.added is not None:
            added = {name: torch.cat([x, other.added[name]]) for name, x in self.added.items()}
        return Text(torch.cat([self.context, other.context]), added)


class Drawn(NamedTuple):
    """images `[B,3,height,width]` in 0..1, float32 on the CPU. losses: of every descent of attention regulation, whose
    pictures may differ between correct forms, `[steps,B,H]`, or only the lowest `[1,B,1]`."""

    images: Tensor
    losses: list[Tensor] | None = None


Form = Callable[[Setting], Drawn]
Before = Callable[[Tensor, int, Tensor, Text], Tensor]
Predict = Callable[[Tensor, int, Tensor, Text, Text], Tensor]


def encode(setting: Setting, prompt: str) -> Text:
    """The prompt's context for every sample."""
    pipe, batch = setting.pipe, setting.batch
    how = {"device": setting.latents.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if getattr(pipe, "text_encoder_2", None) is None:
        return Text(pipe.encode_prompt([prompt] * batch, **how)[0], None)
    context, _, pooled, _ = pipe.encode_prompt([prompt] * batch, **how)
    return Text(context, _added(setting, pooled))


def nothing(setting: Setting) -> Text:
    """The context of the guidance batch's unconditional half: of an empty prompt, or zeros as SDXL has it."""
    second = getattr(setting.pipe, "text_encoder_2", None)
    if second is None:
        return encode(setting, "")
    tokens = setting.pipe.tokenizer.model_max_length
    like = setting.latents.new_zeros(setting.batch, tokens, setting.pipe.unet.config.cross_attention_dim)
    return Text(like, _added(setting, like.new_zeros(setting.batch, second.config.projection_dim)))


def _added(setting: Setting, pooled: Tensor) -> dict[str, Tensor]:
    times = torch.tensor([[*setting.pixels, 0, 0, *setting.pixels]], dtype=pooled.dtype, device=pooled.device)
    return {"text_embeds": pooled, "time_ids": times.expand(setting.batch, -1)}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses, maps and moves are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def evaluate(setting: Setting, latents: Tensor, timestep: Tensor, text: Text) -> Tensor:
    """The UNet's prediction."""
    return setting.pipe.unet(
        latents, timestep, encoder_hidden_states=text.context, added_cond_kwargs=text.added, return_dict=False
    )[0]


def guided(setting: Setting, latents: Tensor, step: int, timestep: Tensor, negative: Text, positive: Text) -> Tensor:
    """Classifier-free guidance: both halves in one batch."""
    both = evaluate(setting, torch.cat([latents] * 2), timestep, negative.and_then(positive))
    without, with_text = both.chunk(2)
    return without + setting.guidance_scale * (with_text - without)


def sample(
    setting: Setting,
    *,
    before: Before | None = None,
    predict: Predict | None = None,
    texts: tuple[Text, Text] | None = None,
) -> Tensor:
    """Draw images `[B,3,height,width]` in 0..1, float32 on the CPU: encode, denoise, decode.

    Args:
        before: what becomes of the latents before each step: of (latents, step, timestep, the prompt's text).
        predict: what stands in for classifier-free guidance: of (latents, step, timestep, negative text, text).
        texts: negative and positive, where they are encoded already.
    """
    pipe = setting.pipe
    with torch.no_grad():
        negative, positive = texts or (nothing(setting), encode(setting, PROMPT))
        pipe.scheduler.set_timesteps(setting.steps, device=setting.latents.device)
        latents = setting.latents * pipe.scheduler.init_noise_sigma
        for step, timestep in enumerate(pipe.scheduler.timesteps):
            if before is not None:
                latents = before(latents, step, timestep, positive)
            if predict is not None:
                noise = predict(latents, step, timestep, negative, positive)
            else:
                noise = guided(setting, latents, step, timestep, negative, positive)
            latents = pipe.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return decode(setting, latents)


def decode(setting: Setting, latents: Tensor) -> Tensor:
    pipe = setting.pipe
    images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pt").float().cpu()


def call(setting: Setting, **options: Any) -> Tensor:
    """The pipeline itself, as a user calls it; images as those of `sample`."""
    height, width = setting.pixels
    arguments: dict[str, Any] = {
        "prompt": [PROMPT] * setting.batch,
        "latents": setting.latents,
        "num_inference_steps": setting.steps,
        "guidance_scale": setting.guidance_scale,
        "height": height,
        "width": width,
        "output_type": "pt",
    }
    return setting.pipe(**(arguments | options)).images.float().cpu()
