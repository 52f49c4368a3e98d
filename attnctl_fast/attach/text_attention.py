"""Self-attention of a prompt's tokens within the text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .prompts import Prompts
from .tokens import Segment

# What a layer calls its queries, keys and number of heads, and what else it has.
_CLIP, _T5, _BERT = (
    ("q_proj", "k_proj", "num_heads", "out_proj"),
    ("q", "k", "n_heads", "o"),
    ("query", "key", "num_attention_heads", "value"),
)
_REMEDY = "pass text_similarity=, and targets= for the tokens that it is about"


def text_attention(pipe: Any, prompts: Prompts) -> Tensor:
    """Return the prompts' self-attention within the encoders of the first part of the text, `[prompts,N,N]`.

    Mean over layers and heads, then over the encoders where two lie side by side (SDXL, SD 3); the encoders' dtype, but
    at least float32. Of CLIP, T5 and Bert; CLIP's is causal. N is the longest prompt with its start and end of text;
    what follows a prompt's own end means nothing. The encoders run once more, as they are and as in the pipeline: any
    attention implementation, dtype, device or offloading, and T5 with its padding where the pipeline has it attended to
    (FLUX.1).

    Raises:
        ValueError: no text, no text encoder, an encoder of another kind (Sana's Gemma), or texts that differ between
            the encoders.
    """
    if prompts.ends() is None or prompts.tokens is None:
        raise ValueError(
            f"which words the prompt has is unknown (prompt embeddings, or a long prompt in pieces); {_REMEDY}"
        )
    segment, ids = prompts.segments[0], [tokens.ids for tokens in prompts.tokens]
    if prompts.second is not None and [tokens.ids for tokens in prompts.second] != ids:
        raise ValueError(f"prompt and prompt_2 differ, so their tokens have no self-attention in common; {_REMEDY}")
    encoders = [getattr(pipe, name, None) for name in segment.encoders]
    encoders = [encoder for encoder in encoders if encoder is not None]
    if not encoders:
        raise ValueError(f"{type(pipe).__name__} has no text encoder; load the pipeline with it, or {_REMEDY}")
    device = getattr(pipe, "_execution_device", None)
    found = [_attention(encoder, ids, segment, device) for encoder in encoders]
    return torch.stack([one.to(found[0].device) for one in found]).mean(0)


def content_attention(pipe: Any, prompts: Prompts) -> Tensor:
    """Return `text_attention` among the tokens of `prompts.content()[0]` alone, `[prompts,n,n]`, n the longest's.

    What follows a prompt's own tokens means nothing.
    """
    attention = text_attention(pipe, prompts)
    assert prompts.tokens is not None
    begin, longest = prompts.tokens[0].begin, max(tokens.end - tokens.begin for tokens in prompts.tokens)
    return attention[:, begin : begin + longest, begin : begin + longest]


def _attention(encoder: Any, ids: list[tuple[int, ...]], segment: Segment, device: torch.device | None) -> Tensor:
    """Return an encoder's attention, mean over its layers and heads, `[B,N,N]`."""
    encoder = getattr(encoder, "_orig_mod", encoder)
    layers = [module for module in encoder.modules() if _kind(module) is not None]
    if not layers:
        raise ValueError(f"{type(encoder).__name__} is not a CLIP, T5 or Bert text encoder; {_REMEDY}")
    words, largest = encoder.get_input_embeddings().num_embeddings, max(map(max, ids))
    if largest >= words:
        raise ValueError(
            f"the prompt has a token {largest}, but {type(encoder).__name__} knows {words}; load the textual "
            f"inversion into every text encoder, or {_REMEDY}"
        )
    device = encoder.device if device is None else device
    lengths = torch.tensor([[len(row)] for row in ids], device=device)
    longest = int(lengths.max())
    # Where padding is not attended to, it does not matter what it is and how much.
    causal = _kind(layers[0]) is _CLIP
    width, padding = (longest, ids[0][-1]) if causal else (segment.length, segment.tokenizer.pad_token_id)
    rows = torch.tensor([[*row, *[padding] * (width - len(row))] for row in ids], device=device)
    real = torch.arange(width, device=device) < lengths
    masked = torch.zeros(real.shape, device=device).masked_fill(~real, -torch.inf)[:, None, None]
    added = masked if segment.masked else torch.zeros_like(masked)
    maps: list[Tensor] = []
    bias = 0.0

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal bias
        if getattr(module, "has_relative_attention_bias", False):
            # T5's first layer has it for all.
            bias = module.compute_bias(width, width, device=device)
        found = _probabilities(module, args[0] if args else kwargs["hidden_states"], added + bias)
        maps.append(found[:, :longest, :longest])

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        # A compiled encoder would not see the hooks.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            encoder(rows, **({"attention_mask": real.long()} if segment.masked else {}))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([one.to(maps[0].device) for one in maps]).mean(0)


def _kind(module: Any) -> tuple[str, ...] | None:
    return next((names for names in (_CLIP, _T5, _BERT) if all(hasattr(module, name) for name in names)), None)


def _probabilities(layer: Any, hidden: Tensor, added: Tensor | float = 0.0) -> Tensor:
    """Return a layer's attention, mean over its heads, `[B,N,N]`; CLIP's is causal. added: to the logits."""
    kind = _kind(layer)
    assert kind is not None
    query, key, heads, _ = kind
    q, k = (
        getattr(layer, name)(hidden).unflatten(-1, (getattr(layer, heads), -1)).transpose(1, 2) for name in (query, key)
    )
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scale = 1.0 if kind is _T5 else q.shape[-1] ** -0.5
    with torch.autocast(hidden.device.type, enabled=False):
        logits = q @ k.mT * scale + added
        if kind is _CLIP:
            tokens = hidden.shape[1]
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        return logits.softmax(-1).mean(1)
