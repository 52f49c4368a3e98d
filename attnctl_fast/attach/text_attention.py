"""Self-attention of a prompt's tokens within the text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prompts import Prompts


def text_attention(pipe: Any, prompts: Prompts) -> Tensor:
    """Return the prompts' self-attention within the pipeline's CLIP text encoders, `[prompts,N,N]`.

    Mean over layers and heads, then over the encoders where there are two (SDXL); the encoders' dtype, but at least
    float32. N is the longest prompt with its start and end of text; what follows a prompt's own end means nothing. The
    encoders run once more, as they are: any attention implementation, dtype, device or offloading.

    Raises:
        ValueError: no text, no text encoder, an encoder that is not CLIP's, or texts that differ between the encoders.
    """
    remedy = "pass text_similarity=, and targets= for the tokens that it is about"
    if prompts.ends() is None or prompts.tokens is None:
        raise ValueError(
            f"which words the prompt has is unknown (prompt embeddings, or a long prompt in pieces); {remedy}"
        )
    ids = [tokens.ids for tokens in prompts.tokens]
    if prompts.second is not None and [tokens.ids for tokens in prompts.second] != ids:
        raise ValueError(f"prompt and prompt_2 differ, so their tokens have no self-attention in common; {remedy}")
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    encoders = [encoder for encoder in encoders if encoder is not None]
    if not encoders:
        raise ValueError(f"{type(pipe).__name__} has no text encoder; load the pipeline with it, or {remedy}")
    longest = max(map(len, ids))
    # The attention is causal, so what the shorter ones are padded with does not matter.
    rows = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in ids])
    found = [_attention(encoder, rows, getattr(pipe, "_execution_device", None), remedy) for encoder in encoders]
    return torch.stack([one.to(found[0].device) for one in found]).mean(0)


def _attention(encoder: Any, ids: Tensor, device: torch.device | None, remedy: str) -> Tensor:
    """Return an encoder's causal attention, mean over its layers and heads, `[B,N,N]`."""
    encoder = getattr(encoder, "_orig_mod", encoder)
    layers = [module for module in encoder.modules() if hasattr(module, "q_proj") and hasattr(module, "num_heads")]
    if not layers:
        raise ValueError(f"{type(encoder).__name__} is not a CLIP text encoder; {remedy}")
    words = encoder.get_input_embeddings().num_embeddings
    if int(ids.max()) >= words:
        raise ValueError(
            f"the prompt has a token {int(ids.max())}, but {type(encoder).__name__} knows {words}; load the textual "
            f"inversion into every text encoder, or {remedy}"
        )
    maps: list[Tensor] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        maps.append(_probabilities(module, args[0] if args else kwargs["hidden_states"]))

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        # A compiled encoder would not see the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            encoder(ids.to(encoder.device if device is None else device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([one.to(maps[0].device) for one in maps]).mean(0)


def _probabilities(layer: Any, hidden: Tensor) -> Tensor:
    """Return a layer's causal attention, mean over its heads, `[B,N,N]`."""
    q, k = (
        projection(hidden).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj)
    )
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    tokens = hidden.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).triu(1)
    with torch.autocast(hidden.device.type, enabled=False):
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1).mean(1)
