"""The shapes model of Stable Diffusion 3's kind: a small transformer that text and picture run through together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from .autoencoder import LATENT_SIZE
from .t5 import T5_LENGTH, T5_WIDTH, build_t5_encoder, build_t5_tokenizer
from .text import MAX_LENGTH, POOLED, build_projected_text_encoder, build_tokenizer

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from diffusers.models.attention_processor import Attention

HEADS, HEAD_WIDTH, BLOCKS = 4, 32, 4
# The longest caption has 11 words and an end; one column more stands for all of the padding behind it.
SHORT_LENGTH = 13


def build_transformer() -> SD3Transformer2DModel:
    """Build a randomly initialised transformer, every token of which is one cell of the latents.

    The modulations start at one and zero, whatever the time, so that blocks start as a plain transformer's.
    """
    from diffusers import SD3Transformer2DModel

    width = HEADS * HEAD_WIDTH
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * POOLED,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and ".linear." in name or name.startswith("proj_out"):
                parameter.zero_()
                # Shift, scale and gate of attention, then of the MLP; the last text has no gates.
                if name.endswith("bias") and len(parameter) == 6 * width:
                    parameter.view(6, width)[[2, 5]] = 1
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the straight path from noise to pictures."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


class Columns:
    """A recorder of `denoiser.py` of the text of one encoder, whose words begin behind `start` columns.

    What a place of the picture attends to is shared out among the text, and counted twice: as a word stands in the text
    of both encoders, it has all of the attention to the text when both of its columns have half.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.probabilities: torch.Tensor | None = None

    def take(self, text: torch.Tensor) -> None:
        """Record the attention to the text `[B, M, N]`, which may add up to less than one."""
        self.probabilities = 2 * (text / text.sum(-1, keepdim=True).clamp(min=1e-8))[..., self.start :]


class JointProcessor:
    """Plain joint attention that hands the attention of the picture to the text to recorders, with gradients.

    Written out in matrix products, which on a processor trains twice as fast as the fused kernel.
    """

    def __init__(self, recorders: Sequence[Columns] = ()) -> None:
        self.recorders = recorders

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        column_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = hidden_states.shape[1]
        sources = (hidden_states,) * 3, (encoder_hidden_states,) * 3
        names = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        norms = ("norm_q", "norm_k", ""), ("norm_added_q", "norm_added_k", "")
        parts = [
            [self._heads(attn, *one) for one in zip(*stream, strict=True)]
            for stream in zip(names, norms, sources, strict=True)
        ]
        query, key, value = (torch.cat(both, dim=2) for both in zip(*parts, strict=True))
        logits = (query * attn.scale) @ key.mT
        if column_bias is not None:
            logits = logits + column_bias.to(logits.dtype)
        probabilities = logits.softmax(dim=-1, dtype=logits.dtype)
        for recorder in self.recorders:
            recorder.take(probabilities[:, :, :image, image:].float().mean(dim=1))
        out = (probabilities @ value).transpose(1, 2).flatten(2)
        text = out[:, image:]
        return attn.to_out[1](attn.to_out[0](out[:, :image])), text if attn.context_pre_only else attn.to_add_out(text)

    def _heads(self, attn: Any, projection: str, norm: str, source: torch.Tensor) -> torch.Tensor:
        heads = getattr(attn, projection)(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return getattr(attn, norm)(heads) if norm else heads


@contextmanager
def record_attention(model: SD3Transformer2DModel, layers: Sequence[str]) -> Iterator[dict[str, Columns]]:
    """Record the attention to the words of CLIP's and of T5's text in the named blocks; restore all on leaving."""
    previous = model.attn_processors
    # T5's first word stands right behind CLIP's text: one column earlier begins what a start of text would be.
    starts = {"CLIP": 0, "T5": MAX_LENGTH - 1}
    recorders = {layer: {name: Columns(start) for name, start in starts.items()} for layer in layers}
    processors = {name: JointProcessor() for name in previous}
    processors |= {f"{layer}.processor": JointProcessor([*both.values()]) for layer, both in recorders.items()}
    model.set_attn_processor(processors)
    try:
        yield {f"{layer} {name}": one for layer, both in recorders.items() for name, one in both.items()}
    finally:
        model.set_attn_processor(dict(previous))


class MMDiTDenoiser:
    """Flow matching at logit-normal times (Esser et al., arXiv 2403.03206), a denoiser of `denoiser.py`."""

    layers = tuple(f"transformer_blocks.{block}.attn" for block in range(1, BLOCKS))
    about: Mapping[str, str] = MappingProxyType(
        {
            "pipeline": "a `StableDiffusion3Pipeline`",
            "model": "Joint transformer, a token for each of the 16x16 cells, trained by Muon and AdamW",
            "loss": "flow matching at logit-normal times",
            "text": "Text encoders: two equal ones of CLIP's kind, 128 wide, and one of T5's, 256 wide, each with one "
            "layer that does something, set by\n  construction and frozen. The pooled text is zero: it says nothing of "
            "the prompt. Trained at every length of\n  T5's padding up to 256 tokens; see `text.py` and `t5.py`",
        }
    )

    def __init__(self, seed: int, device: torch.device) -> None:
        self.tokenizers = build_tokenizer(), build_t5_tokenizer()
        self.clip = build_projected_text_encoder(seed).to(device)
        self.t5 = build_t5_encoder(seed).to(device)

    def build(self) -> SD3Transformer2DModel:
        """Build the transformer."""
        return build_transformer()

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the token ids of CLIP and, behind them, of T5, `[n, 20 + 13]`."""
        lengths = (MAX_LENGTH, SHORT_LENGTH)
        padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return torch.cat(
            [
                tokenizer(list(texts), max_length=length, **padded).input_ids
                for tokenizer, length in zip(self.tokenizers, lengths, strict=True)
            ],
            dim=1,
        )

    def record(self, model: Any) -> Any:
        """Record `layers`, each twice."""
        return record_attention(model, self.layers)

    def levels(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw logit-normal times."""
        return torch.randn(count, generator=generator).sigmoid()

    def errors(
        self, model: Any, latents: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the squared errors of the predicted velocities, and the shares of the latents.

        While attention is recorded, T5's last column stands for a random number of equal ones, as padding to any length
        up to 256 gives them: tokens that are equal remain so, and k equal keys are one whose logit is higher by log k.
        """
        share = levels.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noise
        clip, t5 = tokens.split([MAX_LENGTH, SHORT_LENGTH], dim=1)
        words = self.clip(clip, output_hidden_states=True).hidden_states[-2]
        text = torch.cat([torch.cat([words, words], dim=-1), self.t5(t5).last_hidden_state], dim=1)
        pooled = text.new_zeros(len(text), 2 * POOLED)
        # The rank of the first number of the noise is as good as another random number, and needs no generator.
        bias = noise.new_zeros(len(text), 1, 1, latents[0, 0].numel() + text.shape[1])
        bias[..., -1] = torch.special.ndtr(noise[:, :1, 0, 0])[..., None] * math.log(T5_LENGTH - SHORT_LENGTH + 1)
        times, extra = 1000 * levels, {"column_bias": bias}
        predicted = model(noisy, text, pooled, times, joint_attention_kwargs=extra).sample
        return ((predicted.float() - (noise - latents)) ** 2).mean(dim=(1, 2, 3)), 1 - levels

    def pipeline(self, vae: Any, model: Any) -> StableDiffusion3Pipeline:
        """Put a `StableDiffusion3Pipeline` together, whose two encoders of CLIP's kind are one."""
        from diffusers import StableDiffusion3Pipeline

        # The pipeline adds a shift to the latents, which the UNet's autoencoder does without.
        vae.register_to_config(shift_factor=0.0)
        clip, t5 = self.tokenizers
        return StableDiffusion3Pipeline(
            transformer=model,
            scheduler=build_scheduler(),
            vae=vae,
            text_encoder=self.clip,
            tokenizer=clip,
            text_encoder_2=self.clip,
            tokenizer_2=clip,
            text_encoder_3=self.t5,
            tokenizer_3=t5,
        )
