"""The shapes model of Stable Diffusion 1's kind: a small UNet with cross-attention at 16x16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .autoencoder import LATENT_SIZE
from .text import MAX_LENGTH, WIDTH, build_text_encoder, build_tokenizer

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

LAYERS = ("down_blocks.0", "up_blocks.2")
_SNR_LIMIT = 5.0


def build_unet() -> UNet2DConditionModel:
    """Build a randomly initialised UNet, 2.7 M parameters.

    It has cross-attention in the blocks of `LAYERS`, all at 16x16.

    The 8x8 and 4x4 blocks are plain, so that the prompt acts only where its attention maps have the finest grid.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class RecordingProcessor:
    """Plain cross-attention that keeps its head-averaged probabilities, `probabilities [B, M, N]`, with gradients."""

    def __init__(self) -> None:
        self.probabilities: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, source in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).float().softmax(dim=-1)
        self.probabilities = probabilities.mean(dim=1)
        out = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def record_attention(unet: UNet2DConditionModel, layers: tuple[str, ...]) -> Iterator[dict[str, RecordingProcessor]]:
    """Record the probabilities of the named cross-attention modules at each forward pass; restore them on leaving."""
    previous = unet.attn_processors
    recorders = {layer: RecordingProcessor() for layer in layers}
    unknown = [layer for layer in layers if f"{layer}.processor" not in previous]
    if unknown:
        known = [name.removesuffix(".processor") for name in previous]
        raise ValueError(f"no attention layers named {unknown}: the UNet has {known}")
    processors: dict[str, Any] = dict(previous)
    processors.update({f"{layer}.processor": recorder for layer, recorder in recorders.items()})
    unet.set_attn_processor(processors)
    try:
        yield recorders
    finally:
        unet.set_attn_processor(dict(previous))


class UNetDenoiser:
    """Noise prediction with min-SNR weights (Hang et al., arXiv 2303.09556), a denoiser of `denoiser.py`."""

    # All of them at 16x16, in order of execution.
    layers = (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.2.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.2.attentions.1.transformer_blocks.0.attn2",
    )
    about = MappingProxyType(
        {
            "pipeline": "a `StableDiffusionPipeline`",
            "model": "UNet with cross-attention at 16x16 only",
            "loss": "noise prediction with min-SNR weights",
            "text": "Text encoder: one causal layer of CLIP's kind, 128 wide, set by construction and frozen; see\n"
            "  `text.py`",
        }
    )

    def __init__(self, seed: int, device: torch.device) -> None:
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(seed).to(device)
        self.alphas = build_scheduler().alphas_cumprod.to(device)

    def build(self) -> UNet2DConditionModel:
        """Build the UNet."""
        return build_unet()

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return token ids `[n, 20]`."""
        padded = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True, "return_tensors": "pt"}
        ids: torch.Tensor = self.tokenizer(list(texts), **padded).input_ids
        return ids

    def record(self, model: Any) -> AbstractContextManager[dict[str, RecordingProcessor]]:
        """Record `layers`."""
        return record_attention(model, self.layers)

    def levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw time steps uniformly."""
        return torch.rand(count, generator=generator)

    def errors(
        self, model: Any, latents: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared errors of the predicted noise, and the square roots of alpha."""
        times = (levels * len(self.alphas)).long()
        alpha = self.alphas[times]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal.view(-1, 1, 1, 1) * latents + spread.view(-1, 1, 1, 1) * noise
        predicted = model(noisy, times, self.text_encoder(tokens).last_hidden_state).sample
        errors = ((predicted.float() - noise) ** 2).mean(dim=(1, 2, 3))
        snr = alpha / (1 - alpha)
        return errors * (snr.clamp(max=_SNR_LIMIT) / snr), signal

    def pipeline(self, vae: Any, model: Any) -> StableDiffusionPipeline:
        """Put a `StableDiffusionPipeline` together."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=model,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
