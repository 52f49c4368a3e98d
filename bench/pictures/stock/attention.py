"""The methods that edit attention, and conjunction, at their best in stock PyTorch, without kernels of its own.

`scaled_dot_product_attention` wherever no map is needed, and the algebra of the methods that saves the rest: what that
is stands in each docstring.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl_fast import schedules
from attnctl_fast.attach.layers import Layer
from bench.pictures import ours
from bench.pictures.attention_layers import finished, keys_values, layers_of, queries, replaced, wide
from bench.pictures.regions import Dense
from bench.pictures.sampling import Drawn, Form, Setting, Text, encode, evaluate, nothing, sample
from bench.pictures.stock.nag import nag
from bench.pictures.stock.regulation import attention_regulation


class _Energy:
    """gammas `[2]`: of this step. context: what the next layer reads, or None for what the UNet hands to it."""

    def __init__(self, like: Tensor) -> None:
        self.gammas = like.new_zeros(2)
        self.context: Tensor | None = None


class _Updating:
    """A cross-attention layer that moves the context; `last`: nobody reads what it would be."""

    def __init__(self, energy: _Energy, last: bool) -> None:
        self.energy, self.last = energy, last

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        energy = self.energy
        context = wide(encoder_hidden_states) if energy.context is None else energy.context
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, context.to(encoder_hidden_states.dtype))
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        if not self.last:
            pull = F.scaled_dot_product_attention(k, q, q, scale=attn.scale).transpose(1, 2).flatten(2)
            keys = wide(k.transpose(1, 2).flatten(2))
            share = keys.square().sum(-1, keepdim=True).softmax(1)
            step = energy.gammas[0] * pull - (energy.gammas[1] * share) * keys
            energy.context = context + step.to(k.dtype) @ attn.to_k.weight
        return finished(attn, out, hidden_states)


def energy_context(setting: Setting) -> Drawn:
    """Two fused attentions, of the queries to the keys and of the keys to the queries, and one product with the weight
    of the keys' projection; nothing is left in memory, and self-attention is the pipeline's own."""
    method = ours.method("EnergyContext", setting)
    factors = schedules.factors(method.schedule, setting.steps)
    energy = _Energy(wide(setting.latents))
    table = energy.gammas.new_tensor([[f * method.gamma_attn, f * method.gamma_norm] for f in factors])
    layers = layers_of(setting.pipe, cross=True)
    last = [*layers][-1]

    def before(latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        energy.context, energy.gammas = None, table[step]
        return latents

    with replaced(layers, {name: _Updating(energy, name == last) for name in layers}):
        return Drawn(sample(setting, before=before))


class _Composing:
    """A cross-attention layer that averages attention to the prompt and to edits. edits: keys and values `[B,H,N,d]`
    of each, which are the same at every step."""

    def __init__(self, edits: list[tuple[Tensor, Tensor]], shares: list[float]) -> None:
        self.edits, self.shares = edits, shares

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, encoder_hidden_states)
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        half = len(q) // 2
        mean = out[half:].mul_(self.shares[0])
        for share, (k, v) in zip(self.shares[1:], self.edits, strict=True):
            mean.add_(F.scaled_dot_product_attention(q[half:], k, v, scale=attn.scale), alpha=share)
        return finished(attn, out, hidden_states)


def composition(setting: Setting) -> Drawn:
    """Attention to every context in the conditional rows alone, averaged before the one output projection; keys and
    values of the edits are made once."""
    method = ours.method("Composition", setting)
    layers = layers_of(setting.pipe, cross=True)
    with torch.no_grad():
        contexts = [encode(setting, edit.prompt).context for edit in method.edits]
        processors = {
            name: _Composing(
                [keys_values(layer.module, context) for context in contexts],
                method.shares([True] * len(contexts)),
            )
            for name, layer in layers.items()
        }
    with replaced(layers, processors):
        return Drawn(sample(setting))


class _Pulled:
    """A layer of DenseDiffusion's.

    A logit l becomes (1 - w) l + w high where image token and key share a mask and (1 - w) l + w low elsewhere: up to a
    number per row, (1 - w) l + w (high - low) [shared]. In self-attention that is again a product of queries and keys,
    with one more column for every set of masks that image tokens lie in, so that fused attention does it; only the
    extremes need the logits, and no more of them at once than the cache holds. In cross-attention the logits are few.
    """

    def __init__(self, inner: Any, layer: Layer, dense: _Dense) -> None:
        self.inner, self.layer, self.dense = inner, layer, dense
        self.sizes, self.sets, self.shared = dense.of(layer)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **rest: Any
    ) -> Tensor:
        if not self.dense.active:
            return self.inner(attn, hidden_states, encoder_hidden_states, **rest)
        q = queries(attn, hidden_states)
        k, v = keys_values(attn, hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        half = len(q) // 2
        plain = F.scaled_dot_product_attention(q[:half], k[:half], v[:half], scale=attn.scale)
        attend = _by_logits if self.layer.cross else _by_columns
        weight = (self.dense.time**self.dense.method.decay * self.sizes).to(q.dtype)
        pulled = attend(q[half:], k[half:], v[half:], weight, self.sets, self.shared, attn.scale)
        return finished(attn, torch.cat([plain, pulled]), hidden_states)


def _by_logits(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, sets: Tensor, shared: Tensor, scale: float) -> Tensor:
    """weight `[M,1]`; sets `[M,P]`: which set of masks an image token lies in, one-hot; shared `[N,P]`: which sets have
    a mask in common with a key's."""
    logits = (scale * q) @ k.mT
    reach = logits.amax(-1, keepdim=True) - logits.amin(-1, keepdim=True)
    pulled = logits.mul_(1 - weight).addcmul_(weight * reach, (sets @ shared.mT).to(q.dtype))
    return pulled.softmax(-1) @ v


def _by_columns(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, sets: Tensor, shared: Tensor, scale: float) -> Tensor:
    """The same by fused attention."""
    reach = torch.cat([_reach(rows, k) for rows in q.split(q.shape[2] if q.is_cuda else 128, 2)], 2)
    wide_q = torch.cat([(1 - weight) * q, weight * reach * sets.to(q.dtype)], 3)
    wide_k = torch.cat([k, shared.to(k.dtype).expand(*k.shape[:2], -1, -1)], 3)
    # Fused backends want all of one width.
    out = F.scaled_dot_product_attention(wide_q, wide_k, F.pad(v, (0, sets.shape[1])), scale=scale)
    return out[..., : q.shape[3]]


def _reach(q: Tensor, k: Tensor) -> Tensor:
    """The highest less the lowest product of every row `[B,H,M,1]`."""
    products = q @ k.mT
    return products.amax(-1, keepdim=True) - products.amin(-1, keepdim=True)


class _Dense(Dense):
    """DenseDiffusion, with what its layers need for the whole call."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._tokens = self.masks.new_zeros(setting.pipe.tokenizer.model_max_length, len(self.positions))
        for index, places in enumerate(self.positions):
            self._tokens[places] = 0
            self._tokens[places, index] = 1
        self._found: dict[tuple[tuple[int, int], bool, int], tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """What every image token's weight is but for the time `[M,1]`, and `sets` and `shared` of `_by_logits`."""
        width = layer.module.to_q.out_features // layer.module.heads
        key = layer.grid(self.setting.grid), layer.cross, width
        if key not in self._found:
            masks = self.at(key[0]).mT
            distinct, place = masks.unique(dim=0, return_inverse=True)
            sizes = 1 - self.method.area * (masks @ masks.mean(0))
            sets = F.one_hot(place, len(distinct)).to(masks.dtype)
            keys = self._tokens if layer.cross else masks
            shared = (keys @ distinct.mT > 0).to(masks.dtype)
            # Fused backends want q, k and v a multiple of 8 wide.
            sets, shared = (F.pad(x, (0, -(width + len(distinct)) % 8)) for x in (sets, shared))
            self._found[key] = (self.method.strength(layer) * sizes).unsqueeze(1), sets, shared
        return self._found[key]


def dense_diffusion(setting: Setting) -> Drawn:
    """Fused attention in all but the conditional rows' extremes, see `_Pulled`; the pipeline's own after the edited
    steps."""
    dense = _Dense(setting)
    layers = layers_of(setting.pipe)
    processors = {name: _Pulled(layer.module.processor, layer, dense) for name, layer in layers.items()}
    with replaced(layers, processors):
        return Drawn(sample(setting, before=dense.before, texts=dense.texts))


def composable_diffusion(setting: Setting) -> Drawn:
    """All prompts and the unconditional one as one batch."""
    method = ours.method("ComposableDiffusion", setting)
    weights = setting.guidance_scale * wide(setting.latents).new_tensor(method.weights).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        texts = nothing(setting), encode(setting, method.prompts[0])
        prompts = texts[1]
        for prompt in method.prompts[1:]:
            prompts = prompts.and_then(encode(setting, prompt))

    def predict(latents: Tensor, step: int, timestep: Tensor, negative: Text, positive: Text) -> Tensor:
        found = evaluate(setting, latents.repeat(1 + len(weights), 1, 1, 1), timestep, negative.and_then(prompts))
        without, *rest = wide(found).split(setting.batch)
        total = without + (weights * (torch.stack(rest) - without)).sum(0)
        return total.to(found.dtype)

    return Drawn(sample(setting, predict=predict, texts=texts))


FORMS: dict[str, Form] = {
    "AttentionRegulation": attention_regulation,
    "EnergyContext": energy_context,
    "Composition": composition,
    "DenseDiffusion": dense_diffusion,
    "ComposableDiffusion": composable_diffusion,
    "NAG": nag,
}
