"""The autoencoder that both shapes models draw through: pictures of 64x64 pixels from latents of 4x16x16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LATENT_SIZE = 16


def build_vae() -> AutoencoderKL:
    """Build a randomly initialised autoencoder, 0.7 M parameters.

    It maps images `[B,3,64,64]` to latents `[B,4,16,16]`.
    """
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=4 * LATENT_SIZE,
        scaling_factor=1.0,
    )


@torch.no_grad()
def standardise_latents(vae: Any, images: torch.Tensor) -> None:
    """Give the latents of `images` mean 0 and variance 1 in every channel, by changing the 1x1 convolutions in place.

    A Stable Diffusion pipeline knows one scaling factor for all channels and no shift; what is decoded is unchanged.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in images.split(64)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)
