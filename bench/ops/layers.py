"""The layers of Stable Diffusion whose kernels are compiled, tuned and measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnctl_fast import ops

# Where SOS and EOS stand, which keep their probabilities, and the targets between them.
PINNED = [0, 12]


class Layer(NamedTuple):
    """One cross-attention layer: `tokens` text tokens, heads of `width` numbers; targets and steps of regulation."""

    model: str
    heads: int
    grid: tuple[int, int]
    width: int
    tokens: int = 77
    targets: int = 2
    batch: int = 1
    steps: int = 20

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def sizes(self) -> str:
        return f"B{self.batch} H{self.heads} M{self.image_tokens} N{self.tokens} d{self.width} T{self.targets}"


class Inputs(NamedTuple):
    """q, k, v as a layer's projections give them, [B,M,H*d] seen as [B,H,M,d]; float32 theta and bias; the ids."""

    q: Tensor
    k: Tensor
    v: Tensor
    target_ids: Tensor
    pinned_ids: Tensor
    theta: Tensor
    bias: Tensor


def inputs(layer: Layer, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs, logits of about unit size, a bias of about the size that regulation finds."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def heads(tokens: int) -> Tensor:
        flat = normal(layer.batch, tokens, layer.heads * layer.width).to(dtype)
        return flat.unflatten(-1, (layer.heads, layer.width)).transpose(1, 2)

    rows = layer.batch, layer.heads, layer.targets
    targets = torch.tensor([i for i in range(1, layer.tokens) if i not in PINNED][: layer.targets], device=device)
    pinned = torch.tensor([i for i in PINNED if i < layer.tokens], device=device)
    theta = torch.rand(*rows, *ops.basis_shape(layer.grid), generator=generator, device=device)
    q, k, v = heads(layer.image_tokens), heads(layer.tokens), heads(layer.tokens)
    return Inputs(q, k, v, targets, pinned, theta, normal(*rows, layer.image_tokens))


# The cross-attention layers at batch 1, from the largest grid to the smallest: SD 1.5 and SD 2 at 512 px, SD 2 at 768
# px, SDXL at 1024 px.
LAYERS = [
    *(Layer("SD 1.5", 8, (side, side), width) for side, width in ((64, 40), (32, 80), (16, 160), (8, 160))),
    *(Layer("SD 2", heads, (side, side), 64) for side, heads in ((64, 5), (32, 10), (16, 20), (8, 20))),
    *(Layer("SD 2 768", heads, (side, side), 64) for side, heads in ((96, 5), (48, 10), (24, 20), (12, 20))),
    *(Layer("SDXL", heads, (side, side), 64) for side, heads in ((64, 10), (32, 20))),
]
# The kernels regulate up to 4096 image tokens.
REGULATED = [layer for layer in LAYERS if layer.image_tokens <= 4096]
# Of the aims (B*H, M) = (20, 256) and (20, 1024).
SMALL, LARGE = LAYERS[6], LAYERS[13]
# The most image tokens that SD 2 has at 512 px.
LARGEST = LAYERS[4]
# To see that all of it runs.
TINY = Layer("tiny", 2, (4, 4), 8, tokens=9, steps=2)

_MOST = (
    *("regulated", "merge", "context", "context, masked", "step", "composed", "region"),
    *("plain, gradients", "statistics, gradients", "regulated, gradients"),
    *("maps, all", "maps, gradients", "maps, query gradient", "maps and output, query gradient"),
)
_SOME = (
    "plain",
    "statistics",
    "merge",
    "context",
    "step",
    "composed",
    "region",
    "regulated, gradients",
    "maps, gradients",
)
_ALL = (
    *("plain", "statistics", "statistics, square", "biased", "regulated", "merge"),
    *(
        "context",
        "context, masked",
        "composed",
        "region",
        "context, gradients",
        "composed, gradients",
        "step",
        "step, weighted",
    ),
    *("plain, gradients", "statistics, gradients", "biased, gradients", "regulated, gradients", "merge, gradients"),
    *("biased, bias gradient", "regulated, theta gradient", "keyed", "keyed, gradients"),
    *("maps, all", "maps, all, gradients", "maps, each head", "maps, gradients", "maps, query gradient"),
    "maps and output, query gradient",
)
# What is compiled: every width, text length and dtype at the grid where the models have it, all forms at one of them,
# and the widest heads that there may be. Kernels do not depend on batch, heads and, but for the solver, the grid.
_COMPILED = [
    (torch.float16, Layer("", 20, (16, 16), 64), _ALL),
    (torch.float16, Layer("", 8, (64, 64), 40), _MOST),
    (torch.float16, Layer("", 8, (32, 32), 80), _MOST),
    (torch.float16, Layer("", 8, (16, 16), 160), _MOST),
    (torch.float16, Layer("", 20, (32, 32), 64, tokens=154), ("plain", "statistics", "regulated", "maps", "keyed")),
    (torch.bfloat16, Layer("", 20, (32, 32), 64), _SOME),
    (torch.float32, Layer("", 20, (16, 16), 64), _SOME),
    (torch.float32, Layer("", 8, (16, 16), 160), _SOME),
    (torch.float16, Layer("", 8, (16, 16), 256), _SOME),
    (torch.float32, Layer("", 8, (16, 16), 256), _SOME),
]
_SOLVED = [
    *((Layer("", 8, (side, side), 64), ("official", "official, loss")) for side in (8, 16, 32, 64)),
    *((Layer("", 8, (side, side), 64, targets=8), ("official", "official, loss")) for side in (16, 32, 64)),
    (Layer("", 8, (16, 16), 64), ("paper", "paper, loss", "paper, all gradients", "basis")),
    *((Layer("", 8, (side, side), 64), ("paper",)) for side in (32, 64)),
    *((Layer("", 8, (side, side), 64), ("official, strength",)) for side in (16, 32, 64)),
]


# Tokens, image tokens along a side, and the dtype of maps that are compared; a prompt has up to 75 tokens.
_COMPARED = [
    (12, 16, torch.float32, ("cosine", "normalised_cosine", "absolute", "similarity", "smoothing")),
    (20, 16, torch.float16, ("cosine",)),
    (20, 32, torch.float32, ("cosine",)),
    (64, 16, torch.float32, ("cosine", "similarity")),
]


def attention_cases(layer: Layer, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Everything of a layer that launches kernels for q, k and v, forward and backward, by name."""
    q, k, v, ids, pinned, theta, bias = inputs(layer, dtype)

    def differentiated(function: Callable[..., Any], *tensors: Tensor) -> None:
        leaves = [x.detach().requires_grad_() for x in tensors]
        results = function(*leaves)
        results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
        torch.autograd.backward(results, [torch.ones_like(x) for x in results])

    def statistics(q: Tensor, k: Tensor, v: Tensor, square: bool = False) -> Any:
        return ops.target_statistics(q, k, v, ids, pinned_ids=pinned, with_square=square, impl="triton")

    def merge(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return ops.merge_targets(statistics(q, k, v), v, ids, bias, pinned_ids=pinned, impl="triton")

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return ops.biased_attention(q, k, v, bias, ids, pinned_ids=pinned, impl="triton")

    def regulated(q: Tensor, k: Tensor, v: Tensor, theta: Tensor) -> Any:
        return ops.regulated_attention(q, k, v, theta, ids, layer.grid, pinned_ids=pinned, impl="triton")

    plain = partial(ops.attention, return_lse=True, impl="triton")

    def context(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Any:
        return ops.attention_with_context_gradient(q, k, v, query_weight=weight, impl="triton")

    def step(k: Tensor, weight: Tensor | None = None, convention: str = "official") -> Any:
        """With gammas and token weights as a method has them: tensors."""
        gammas = torch.ones(2)
        projection = k.new_empty(layer.heads * layer.width, 8)
        how: dict[str, Any] = {"gamma_attn": gammas[0], "gamma_norm": gammas[1], "token_weight": weight}
        return ops.context_update(k.float(), k, projection, **how, convention=convention, impl="triton")

    def composed(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.composed_attention(q, [k, k], [v, v], [1.0, 0.5], impl="triton")

    def maps(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None = ids, reduce: str = "mean") -> Any:
        return ops.attention_with_maps(q, k, v, tokens, reduce=reduce, impl="triton")

    def guidance(q: Tensor) -> Any:
        """As in the last layer that a loss of the maps reads."""
        return maps(q, k, v)[1]

    def guided(q: Tensor) -> Any:
        """As in the layers before it."""
        return maps(q, k, v)

    def region(q: Tensor, k: Tensor, v: Tensor) -> Any:
        rows, columns = (torch.ones(layer.batch, x.shape[2], dtype=torch.int32) for x in (q, k))
        return ops.region_attention(q, k, v, rows, columns, rows.float(), impl="triton")

    def keyed(q: Tensor, k: Tensor, v: Tensor, differentiable: bool = True) -> Any:
        """Every operation with a key bias; `differentiable`: all but the one without a gradient."""
        key_bias = torch.zeros(layer.batch, layer.tokens)
        how: dict[str, Any] = {"key_bias": key_bias, "impl": "triton"}
        edit: dict[str, Any] = {"pinned_ids": pinned, **how}
        rows, columns = (torch.ones(layer.batch, x.shape[2], dtype=torch.int32) for x in (q, k))
        found = [
            ops.attention(q, k, v, **how),
            *ops.target_statistics(q, k, v, ids, with_square=True, **edit),
            ops.regulated_attention(q, k, v, theta, ids, layer.grid, **edit),
            *ops.attention_with_context_gradient(q, k, v, **how),
            *ops.attention_with_maps(q, k, v, ids, **how),
        ]
        if not differentiable:
            ops.biased_attention(q, k, v, bias, ids, **edit)
            ops.composed_attention(q, [k, k], [v, v], [1.0, 0.5], key_bias=[key_bias, None], impl="triton")
            ops.region_attention(q, k, v, rows, columns, rows.float(), **how)
        return tuple(found)

    mask = torch.ones(layer.image_tokens)
    forms: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "plain": (plain, (q, k, v)),
        "statistics": (statistics, (q, k, v)),
        "merge": (merge, (q, k, v, bias)),
        "biased": (biased, (q, k, v, bias)),
        "regulated": (regulated, (q, k, v, theta)),
        "context": (context, (q, k, v)),
        "composed": (composed, (q, k, v)),
        "maps": (maps, (q, k, v)),
        "maps, all": (partial(maps, tokens=None), (q, k, v)),
    }
    return {
        **{name: partial(function, *tensors) for name, (function, tensors) in forms.items()},
        **{f"{name}, gradients": partial(differentiated, f, *tensors) for name, (f, tensors) in forms.items()},
        "statistics, square": partial(statistics, q, k, v, True),
        "context, masked": partial(context, q, k, v, mask),
        "region": partial(region, q, k, v),
        "keyed": partial(keyed, q, k, v, False),
        "keyed, gradients": partial(differentiated, keyed, q, k, v),
        "step": partial(step, k),
        "step, weighted": partial(step, k, torch.ones(layer.batch, layer.tokens), "paper"),
        "maps, each head": partial(maps, q, k, v, ids, "none"),
        "maps, query gradient": partial(differentiated, guidance, q),
        "maps and output, query gradient": partial(differentiated, guided, q),
        "biased, bias gradient": partial(differentiated, partial(biased, q, k, v), bias),
        "regulated, theta gradient": partial(differentiated, partial(regulated, q, k, v), theta),
    }


def solver_cases(layer: Layer) -> dict[str, Callable[[], Any]]:
    """Everything that launches kernels for the statistics of a layer, by name."""
    q, _, _, _, _, theta, logits = inputs(layer, torch.float16)
    lse = torch.empty(layer.batch, layer.heads, layer.image_tokens)
    made = ops.TargetStatistics(torch.empty_like(q, dtype=torch.float32), lse, logits, torch.empty_like(lse), None)

    def solve(objective: str, strength: float | Tensor = 1.0) -> None:
        """Alone, and as a method does that knows the weights of the step before."""
        how: dict[str, Any] = {"theta": theta, "strength": strength, "objective": objective, "impl": "triton"}
        for previous, ema in ((None, 0.0), (theta, 0.25)):
            ops.regulate(made, layer.grid, previous=previous, ema=ema, **how)

    def loss(objective: str, differentiated: bool) -> None:
        """Forward, and the gradient of the bias or of everything."""
        bias = torch.empty_like(logits).requires_grad_()
        leaves = [x.detach().requires_grad_(differentiated) for x in (logits, lse, lse, theta)]
        stats = made._replace(logits=leaves[0], rest_lse=leaves[1], rest_square=leaves[2])
        ops.regulation_loss(stats, bias, theta=leaves[3], objective=objective, impl="triton").sum().backward()

    def basis() -> None:
        ops.gaussian_bias(theta.detach().requires_grad_(), layer.grid, impl="triton").sum().backward()

    cases: dict[str, Callable[[], Any]] = {"basis": basis}
    for objective in ("official", "paper"):
        cases[objective] = partial(solve, objective)
        cases[f"{objective}, strength"] = partial(solve, objective, torch.ones(()))
        cases[f"{objective}, loss"] = partial(loss, objective, False)
        cases[f"{objective}, all gradients"] = partial(loss, objective, True)
    return cases


def map_cases(tokens: int, side: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Everything that launches kernels for maps, forward and backward, by name."""
    maps = torch.empty(1, tokens, side * side, dtype=dtype, requires_grad=True)
    text, lengths = torch.empty(1, tokens, tokens), torch.tensor([tokens])

    def loss(variant: str) -> None:
        ops.similarity_loss(maps, text, (side, side), variant=variant, impl="triton").sum().backward()
        ops.similarity_loss(maps.detach(), text, (side, side), variant=variant, lengths=lengths, impl="triton")

    def similarity() -> None:
        ops.map_similarity(maps, impl="triton").sum().backward()

    def smoothing() -> None:
        ops.smooth_maps(maps, (side, side), impl="triton").sum().backward()

    losses = {variant: partial(loss, variant) for variant in ("cosine", "normalised_cosine", "absolute")}
    return {**losses, "similarity": similarity, "smoothing": smoothing}


def kernel_cases() -> list[tuple[str, Callable[[], Any]]]:
    """What launches every kernel as it is shipped: name and function."""
    found = []
    for dtype, layer, names in _COMPILED:
        cases = attention_cases(layer, dtype)
        where = f"{str(dtype).removeprefix('torch.')} d{layer.width} N{layer.tokens}"
        found += [(f"{where}, {name}", cases[name]) for name in names]
    for tokens, side, dtype, names in _COMPARED:
        cases = map_cases(tokens, side, dtype)
        where = f"{str(dtype).removeprefix('torch.')} M{side * side} n{tokens}"
        found += [(f"{where}, {name}", cases[name]) for name in names]
    for layer, names in _SOLVED:
        cases = solver_cases(layer)
        found += [(f"M{layer.image_tokens} T{layer.targets}, {name}", cases[name]) for name in names]
    return found
