"""Latent guidance as its authors' code runs it: Attend-and-Excite, T-SAM, SynGen and CONFORM.

Written from the papers' equations with the structure of operations of the released codes
(yuval-alaluf/Attend-and-Excite, t-sam-diffusion/code, RoyiRa/Linguistic-Binding-in-Diffusion-Models,
gemlab-vt/CONFORM), which share one loop. Every attention layer of the UNet, self-attention too, materialises its maps
for the whole call, and those of cross-attention are kept in lists. The whole UNet is evaluated for one sample at a
time, with weights that require gradients; all but SynGen evaluate it so before every step, also where the latents stay.
Losses go through tokens and pairs of tokens in Python, and the host waits for each of them.

Where the codes cannot give our result they are amended: latents, losses and maps are float32 in a float16 pipeline
too; CONFORM compares every sample with its own maps of the step before; T-SAM averages over both text encoders of SDXL.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from bench.ops.rivals import published_similarity_loss
from bench.pictures import ours
from bench.pictures.attention_layers import flat_heads, flat_output, layers_of, replaced
from bench.pictures.guidance_loop import (
    kernel,
    read_layers,
    smoothed,
    step_sizes,
    text_similarity,
    tokens_of,
    trainable,
)
from bench.pictures.sampling import Drawn, Form, Setting, Text, evaluate, sample, wide_dtype

# Of maps [height,width,N] of one sample, and which sample it is; a plain 0 where nothing is left to improve.
Loss = Callable[[Tensor, int], Tensor | float]


class _Lists:
    """The maps of the layers that are read, by their part of the UNet: those of the last evaluation, and of the one
    under way."""

    def __init__(self, read: set[str], layers: int, graph_only: bool) -> None:
        self._read, self._layers, self._graph_only = read, layers, graph_only
        self._seen, self._kept, self._coming = 0, self._empty(), self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Tensor]]:
        return {"up_blocks": [], "down_blocks": [], "mid_block": []}

    def add(self, name: str, probabilities: Tensor, heads: int) -> None:
        """Maps `[R*H,M,N]` of the layer."""
        if self._graph_only and not probabilities.requires_grad:
            return
        if name in self._read:
            self._coming[name.partition(".")[0]].append(probabilities)
        self._seen += 1
        if self._seen == self._layers:
            self._seen, self._kept, self._coming = 0, self._coming, self._empty()

    def mean(self, grid: tuple[int, int]) -> Tensor:
        """Over heads and layers, of the last evaluation's only sample: `[height,width,N]`."""
        every = [maps.unflatten(1, grid) for part in self._kept.values() for maps in part]
        stacked = torch.cat(every)
        return stacked.to(wide_dtype(stacked.dtype)).sum(0) / len(stacked)


class _HeadMeans:
    """As T-SAM keeps them: of every cross-attention layer the mean over heads, of the first sample, until the next
    evaluation."""

    def __init__(self, read: set[str], layers: int, graph_only: bool) -> None:
        self._read = read
        self._maps: dict[str, Tensor] = {}

    def add(self, name: str, probabilities: Tensor, heads: int) -> None:
        if name.endswith("attn2"):
            first = probabilities[:heads]
            self._maps[name] = first.to(wide_dtype(first.dtype)).mean(0)

    def mean(self, grid: tuple[int, int]) -> Tensor:
        every = [maps.unsqueeze(0) for name, maps in self._maps.items() if name in self._read]
        return torch.cat(every).mean(0).unflatten(0, grid)


class _Processor:
    """Attention through full maps, which it hands on."""

    def __init__(self, name: str, store: _Lists | _HeadMeans) -> None:
        self._name, self._store = name, store

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = flat_heads(attn, hidden_states, context)
        probabilities = attn.get_attention_scores(q, k)
        self._store.add(self._name, probabilities, attn.heads)
        return flat_output(attn, probabilities, v)


def _draw(
    name: str,
    make_loss: Callable[[Setting, Any], Loss],
    setting: Setting,
    *,
    store: type[_Lists | _HeadMeans] = _Lists,
    graph_only: bool = False,
    every_step: bool = True,
) -> Drawn:
    """graph_only: keep maps only where gradients are recorded. every_step: evaluate the loss before all steps."""
    method, unet = ours.method(name, setting), setting.pipe.unet
    loss, sizes, layers = make_loss(setting, method), step_sizes(setting, method), read_layers(setting, method)
    grid = layers[0].grid(setting.grid)
    every = layers_of(setting.pipe)
    kept = store({layer.name for layer in layers}, len(every), graph_only)

    def guide(latents: Tensor, step: int, timestep: Tensor, text: Text) -> Tensor:
        if step >= len(sizes) and not every_step:
            return latents
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            leaf = latents.clone().detach().to(wide_dtype(latents.dtype)).requires_grad_()
            moved = []
            for index, one in enumerate(leaf):
                one = one.unsqueeze(0)
                evaluate(setting, one.to(latents.dtype), timestep, _row(text, index))
                unet.zero_grad()
                found = loss(kept.mean(grid), index)
                if step < len(sizes) and found != 0:
                    assert isinstance(found, Tensor)
                    (gradient,) = torch.autograd.grad(found, [one], retain_graph=True)
                    one = one - sizes[step] * gradient
                moved.append(one)
            return torch.cat(moved).to(latents.dtype)

    with replaced(every, {name: _Processor(name, kept) for name in every}), trainable(unet, True):
        return Drawn(sample(setting, before=guide))


def _row(text: Text, index: int) -> Text:
    added = None if text.added is None else {name: x[index : index + 1] for name, x in text.added.items()}
    return Text(text.context[index : index + 1], added)


def _smoothed(image: Tensor, method: Any) -> Tensor:
    """One map `[height,width]`, by a kernel that is made for it on the host."""
    height, width = image.shape
    weights = kernel(method, (height, width), torch.empty(0, dtype=image.dtype)).to(image.device)
    return smoothed(image.unsqueeze(0), weights).squeeze(0)


def _max_attention(setting: Setting, method: Any) -> Loss:
    targets = tokens_of(setting, method.targets)

    def loss(maps: Tensor, index: int) -> Tensor | float:
        shares = (method.sharpness * maps[:, :, 1:-1]).softmax(-1)
        highest = [_smoothed(shares[:, :, target - 1], method).max() for target in targets]
        losses: list[Any] = [max(0.0, 1 - value) for value in highest]
        return max(losses)

    return loss


def _similarity(setting: Setting, method: Any) -> Loss:
    text, end = text_similarity(setting, method.gamma, padded=True), setting.end()

    def loss(maps: Tensor, index: int) -> Tensor:
        height, width = maps.shape[:2]
        words = maps[:, :, 1:end].permute(2, 0, 1).flatten(1)
        return published_similarity_loss(words.unsqueeze(0), text.unsqueeze(0).to(maps), (height, width)).squeeze(0)

    return loss


def _symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    p, q = Categorical(probs=a.reshape(-1)), Categorical(probs=b.reshape(-1))
    return (kl_divergence(p, q) + kl_divergence(q, p)) / 2


def _largest(maps: list[Tensor], first: list[int], second: list[int]) -> Tensor:
    """The largest divergence between the tokens of two words."""
    return max(_symmetric_kl(maps[a], maps[b]) for a, b in itertools.product(first, second))


def _binding(setting: Setting, method: Any) -> Loss:
    groups = [[setting.positions(word) for word in group] for group in method.pairs]
    words = range(1, setting.end())

    def repelled(maps: list[Tensor], word: list[int], others: list[int]) -> Tensor:
        return sum((_largest(maps, word, [other]) for other in others), maps[0].new_zeros(())) / max(len(others), 1)

    def loss(maps: Tensor, index: int) -> Tensor:
        each = [maps[:, :, token] for token in range(maps.shape[2])]
        total = maps.new_zeros(())
        for *modifiers, noun in groups:
            inside = {token for word in (*modifiers, noun) for token in word}
            others = [token for token in words if token not in inside]
            for modifier in modifiers:
                total = total + _largest(each, modifier, noun)
                total = total - (repelled(each, modifier, others) + repelled(each, noun, others)) / 2
        return total

    return loss


def _contrast(setting: Setting, method: Any) -> Loss:
    groups = [tokens_of(setting, group) for group in method.groups]
    before: dict[int, Tensor] = {}

    def loss(maps: Tensor, index: int) -> Tensor:
        classes, rows = [], []
        for number, group in enumerate(groups):
            for token in group:
                for one in (maps, before[index]) if index in before else (maps,):
                    classes.append(number)
                    rows.append(_smoothed(one[:, :, token], method).flatten())
        if method.remember:
            # With its graph, as the released code keeps it.
            before[index] = maps
        return _nt_xent(torch.stack(rows), torch.tensor(classes, device=maps.device), method.temperature)

    return loss


def _nt_xent(embeddings: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The mean over all positive pairs, each against the negative pairs of its anchor: lists of pairs, gathered
    similarities, and a matrix of positive by negative pairs."""
    unit = F.normalize(embeddings, dim=1)
    similarity = unit @ unit.mT / temperature
    same = classes[:, None] == classes
    anchors, positives = torch.where(same & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device))
    others, negatives = torch.where(~same)
    if len(anchors) == 0 or len(others) == 0:
        return embeddings.sum() * 0
    pulled, pushed = similarity[anchors, positives].unsqueeze(1), similarity[others, negatives]
    pushed = pushed.expand(len(anchors), -1).masked_fill(anchors[:, None] != others, torch.finfo(pushed.dtype).min)
    highest = torch.maximum(pulled, pushed.amax(1, keepdim=True)).detach()
    share = (pulled - highest).exp()
    share = share / ((pushed - highest).exp().sum(1, keepdim=True) + share)
    return -(share + torch.finfo(share.dtype).tiny).log().mean()


FORMS: dict[str, Form] = {
    "AttendAndExcite": partial(_draw, "AttendAndExcite", _max_attention),
    "TSAM": partial(_draw, "TSAM", _similarity, store=_HeadMeans),
    "SynGen": partial(_draw, "SynGen", _binding, graph_only=True, every_step=False),
    "CONFORM": partial(_draw, "CONFORM", _contrast),
}
