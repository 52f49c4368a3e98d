"""T-SAM (arXiv 2411.15236): github.com/t-sam-diffusion/code."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnctl_fast import ops
from attnctl_fast.attach.text_attention import _probabilities
from bench.official import repository
from bench.official.repository import SEED, Adapter, Clone, Comparison, Results, attention_layer, projected
from bench.pictures.attention_layers import keys_values, queries

REPOSITORY = "T-SAM"
MARKER = "models/sd1_5/clip_sdpa_attention_x.py"
PIPELINE = "models.sd1_5.pipeline_stable_diffusion_x_2"
WORDS, TOKENS = 8, repository.LAYER.tokens
# Of CLIP's ViT-L/14 text encoder.
TEXT_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}


def loss(clone: Clone, device: torch.device, method: str, variant: str) -> Comparison:
    """A loss and its gradient by the maps of all tokens, [16,16,77] as the released code keeps them."""
    compute = getattr(clone.load(PIPELINE, ("pytorch_metric_learning",)).StableDiffusionPipelineX_2, method)
    grid = repository.LAYER.grid
    generator = torch.Generator().manual_seed(SEED)
    maps = torch.randn(*grid, TOKENS, generator=generator).softmax(-1).to(device)
    text = torch.rand(WORDS, WORDS, generator=generator).tril()
    text = (text / text.sum(-1, keepdim=True)).to(device)
    config = SimpleNamespace(
        softmax_normalize=False,
        softmax_normalize_attention_maps=False,
        do_smoothing=True,
        smoothing_sigma=0.5,
        smoothing_kernel_size=3,
        cos1_or_cos2="cos2",
        loss_type="abs_loss" if variant == "absolute" else "cos_loss",
        row_weight=1.0,
    )

    @torch.enable_grad()
    def theirs() -> Results:
        leaf = maps.detach().requires_grad_()
        value = compute(leaf, None, config, avg_text_sa_norm=text)
        return value, torch.autograd.grad(value, leaf)[0]

    @torch.enable_grad()
    def ours() -> Results:
        leaf = maps.detach().requires_grad_()
        words = leaf[..., 1 : 1 + WORDS].flatten(0, 1).mT[None]
        (value,) = ops.similarity_loss(words, text, grid, variant=variant)
        return value, torch.autograd.grad(value, leaf)[0]

    return Comparison(f"n{WORDS} M{grid[0] * grid[1]}", theirs, ours, 1e-3)


def maps(clone: Clone, device: torch.device) -> Comparison:
    """A layer's output, its maps and the gradient of both by the image tokens, from its inputs."""
    processor = clone.load("models.processors").AttnProcessorX_2()
    attn, image, text = attention_layer(device)
    image, text = image[1:], text[1:]
    generator = torch.Generator().manual_seed(SEED)
    grads = [
        torch.randn(1, n, m, generator=generator).to(device) for n, m in (image.shape[1:], (TOKENS, image.shape[1]))
    ]

    def pulled(out: Tensor, maps: Tensor, leaf: Tensor) -> Results:
        return out, maps, torch.autograd.grad((out, maps), leaf, grads)[0]

    @torch.enable_grad()
    def theirs() -> Results:
        leaf = image.detach().requires_grad_()
        out = processor(attn, leaf, encoder_hidden_states=text)
        return pulled(out, processor.attn_data_x.mT[None], leaf)

    @torch.enable_grad()
    def ours() -> Results:
        leaf = image.detach().requires_grad_()
        out, found = ops.attention_with_maps(
            queries(attn, leaf), *keys_values(attn, text), token_ids=None, scale=attn.scale
        )
        return pulled(projected(attn, out), found, leaf)

    return Comparison(repository.LAYER._replace(batch=1).sizes, theirs, ours, 1e-3)


def text_attention(clone: Clone, device: torch.device) -> Comparison:
    """A layer of the text encoder and the mean over its heads of what its tokens attend to."""
    module: Any = clone.load("models.sd1_5.clip_sdpa_attention_x")
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPAttention

    config = CLIPTextConfig(**TEXT_ENCODER, attn_implementation="sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        own = CLIPAttention(config).eval().requires_grad_(False).to(device)
        their = module.CLIPSdpaAttentionX(config).eval().requires_grad_(False).to(device)
    their.load_state_dict(own.state_dict())
    generator = torch.Generator().manual_seed(SEED)
    hidden = 3 * torch.randn(1, TOKENS, config.hidden_size, generator=generator).to(device)
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).triu(1)
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device=device).masked_fill(later, -torch.inf)

    def theirs() -> Results:
        # It keeps the maps of its first call only, until this is reset.
        their.dummy = 0
        out, _ = their(hidden, causal_attention_mask=mask)
        return out, their.attn_data_x[None]

    def ours() -> Results:
        found = _probabilities(own, hidden)
        return own(hidden, attention_mask=mask)[0], found

    shape = f"H{config.num_attention_heads} N{TOKENS} d{config.hidden_size // config.num_attention_heads}"
    return Comparison(shape, theirs, ours, 1e-4)


def _loss(method: str, variant: str) -> Adapter:
    return Adapter(
        f"StableDiffusionPipelineX_2.{method}",
        f"similarity_loss, {variant!r}, and its gradient",
        partial(loss, method=method, variant=variant),
    )


ADAPTERS = (
    _loss("_compute_self_attn_loss_cos", "cosine"),
    _loss("_compute_self_attn_loss_cos_attn_like", "normalised_cosine"),
    _loss("_compute_self_attn_loss_cos_attn_like", "absolute"),
    Adapter("AttnProcessorX_2.__call__", "attention_with_maps and its gradient", maps),
    Adapter("CLIPSdpaAttentionX.forward", "text self-attention of TSAM", text_attention),
)
