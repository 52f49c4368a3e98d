"""What competes with what: per operation the kernels and their rivals, what all must give, and the bytes it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import peers
import torch
from shapes import Inputs, Layer, inputs
from torch import Tensor

from attnctl_fast import ops
from attnctl_fast.ops.gaussian_bias import full_basis

Run = Callable[[], Any]
OURS = "triton"
# Of the norm. Rounding the attention's weights to half precision makes about a third of an epsilon.
TOLERANCES = {x: 2 * torch.finfo(x).eps for x in (torch.float16, torch.bfloat16)} | {torch.float32: 1e-5}
# Trajectories part where ranks swap; the lowest losses that they reach do not.
LOSS_TOLERANCE = 0.02


class Contender(NamedTuple):
    """`build` makes what is timed. `checked`: its result must be the comparison's truth; others are there for scale.
    `compiles`: torch.compile takes many seconds for it."""

    build: Callable[[], Run]
    checked: bool = True
    compiles: bool = False


@dataclass(frozen=True)
class Comparison:
    """One operation at one shape. `seen` takes from a result what must equal `truth`; `moved`: the bytes of inputs and
    outputs, each once."""

    op: str
    layer: Layer
    dtype: torch.dtype
    contenders: dict[str, Contender]
    truth: tuple[Tensor, ...]
    tolerance: float
    moved: int
    seen: Callable[[Any], tuple[Tensor, ...]]

    def errors(self, result: Any) -> tuple[float, float]:
        """The largest error and the largest relative error of a norm against `truth`; NaN where there is one."""
        pairs = list(zip(self.seen(result), self.truth, strict=True))
        largest = torch.stack([(x.double() - y).abs().amax() for x, y in pairs]).amax()
        relative = torch.stack([(x.double() - y).norm() / y.norm() for x, y in pairs]).amax()
        return float(largest), float(relative)


def _first(result: Any) -> tuple[Tensor, ...]:
    return (result[0] if isinstance(result, tuple) else result,)


def _lowest(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """From (losses [steps,B,H], ...), the lowest mean over batch and heads."""
    return (result[0].mean((1, 2)).amin(),)


def _size(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _wide(x: Inputs) -> Inputs:
    return Inputs(*(t.double() if t.is_floating_point() else t for t in x))


def _retyped(stats: ops.TargetStatistics, dtype: torch.dtype) -> ops.TargetStatistics:
    made: dict[str, Any] = {name: None if t is None else t.to(dtype) for name, t in stats._asdict().items()}
    return stats._replace(**made)


def _ready(run: Run) -> Contender:
    return Contender(lambda: run)


def _implementations(function: Callable[..., Any], *names: str) -> dict[str, Contender]:
    return {name: _ready(partial(function, impl=name)) for name in (names or (OURS, "eager"))}


def attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    contenders = _implementations(partial(ops.attention, *x[:3]))
    for name in peers.SDPA:
        contenders[f"SDPA {name}"] = _ready(partial(peers.sdpa, name, *x[:3]))
    truth = _first(ops.attention(*_wide(x)[:3], impl="reference"))
    return Comparison("attention", layer, dtype, contenders, truth, TOLERANCES[dtype], _size(*x[:3], x.q), _first)


def target_statistics(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    run = partial(ops.target_statistics, *x[:3], x.target_ids, **how)
    stats = ops.target_statistics(*_wide(x)[:3], x.target_ids, **how, impl="reference")
    moved = _size(*x[:3]) + _size(*stats) // 2
    contenders = _implementations(run)
    return Comparison("target_statistics", layer, dtype, contenders, _first(stats), TOLERANCES[dtype], moved, _first)


def merge_targets(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    wide = _wide(x)
    exact = ops.target_statistics(*wide[:3], x.target_ids, **how, impl="reference")
    stats = _retyped(exact, torch.float32)
    run = partial(ops.merge_targets, stats, x.v, x.target_ids, x.bias, **how)
    truth = _first(
        ops.merge_targets(_retyped(stats, torch.float64), wide.v, x.target_ids, wide.bias, **how, impl="reference")
    )
    moved = _size(*stats, x.bias, x.q)
    contenders = _implementations(run)
    return Comparison("merge_targets", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def _map_contenders(x: Inputs) -> dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """By name, what makes the output and the maps of the targets."""
    columns = peers.Columns.of(x.target_ids, x.k)
    found: dict[str, Any] = {
        name: lambda q, k, v, name=name: ops.attention_with_maps(q, k, v, x.target_ids, impl=name)
        for name in (OURS, "eager")
    }
    for name in peers.SDPA:
        attend = partial(peers.sdpa, name)
        found[f"SDPA {name}, one-hot"] = lambda q, k, v, attend=attend: peers.one_hot_maps(
            attend, q, k, v, columns.one_hot
        )
    found["published"] = lambda q, k, v: peers.kept_maps(q, k, v, x.target_ids)
    return found


def attention_with_maps(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    contenders = {name: _ready(partial(run, *x[:3])) for name, run in _map_contenders(x).items()}
    contenders["plain attention"] = Contender(lambda: partial(ops.attention, *x[:3], impl=OURS), checked=False)
    truth = ops.attention_with_maps(*_wide(x)[:3], x.target_ids, impl="reference")
    moved = _size(*x[:3], x.q) + 4 * truth[1].numel()
    return Comparison("attention_with_maps", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple)


def attention_with_maps_guidance(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward, and the queries' gradient by the maps alone: the last layer that a loss of the maps reads."""
    exact = ops.attention_with_maps(*_wide(x)[:3], x.target_ids, impl="reference")[1]
    grad = torch.randn(exact.shape, generator=torch.Generator(x.q.device).manual_seed(1), device=x.q.device)

    def run(function: Callable[..., tuple[Tensor, Tensor]], x: Inputs, grad: Tensor) -> Run:
        return _trained([x.q], lambda q: function(q, x.k, x.v)[1], grad)

    contenders = {name: _ready(run(function, x, grad)) for name, function in _map_contenders(x).items()}
    reference = partial(ops.attention_with_maps, token_ids=x.target_ids, impl="reference")
    truth = run(reference, _wide(x), grad.double())()
    moved = _size(*x[:3], x.q, x.q) + 8 * exact.numel()
    return Comparison("attention_with_maps_guidance", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple)


def attention_with_context_gradient(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    q, k, v = x[:3]
    contenders = _implementations(partial(ops.attention_with_context_gradient, q, k, v))
    for name in peers.SDPA:
        contenders[f"SDPA {name}, twice"] = _ready(partial(peers.sdpa_pair, name, q, k, v))
    contenders["published"] = _ready(partial(peers.published_context_gradient, q, k, v))
    contenders["plain attention"] = Contender(lambda: partial(ops.attention, q, k, v, impl=OURS), checked=False)
    truth = ops.attention_with_context_gradient(*_wide(x)[:3], impl="reference")
    moved = _size(q, k, v, q) + 4 * k.numel()
    return Comparison(
        "attention_with_context_gradient", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple
    )


def context_update(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """What comes before the projection, which is a matrix product: with a projection of the head's own width, one."""
    update, gammas = x.v.float().contiguous(), torch.tensor([0.3, 0.7], device=x.k.device)
    weight = torch.eye(layer.heads * layer.width, dtype=dtype, device=x.k.device)

    def run(k: Tensor, weight: Tensor, impl: str) -> Tensor:
        return ops.context_update(update, k, weight, gamma_attn=gammas[0], gamma_norm=gammas[1], impl=impl)

    contenders = {name: _ready(partial(run, x.k, weight, name)) for name in (OURS, "eager")}
    contenders["torch.compile"] = Contender(lambda: compile(partial(run, x.k, weight, "eager")), compiles=True)
    truth = (run(x.k.double(), weight.double(), "reference"),)
    moved = _size(x.k, x.k) + 4 * update.numel()
    return Comparison("context_update", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def composed_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """The prompt and two edits, one of them negated."""
    shift = [(x.k.roll(i, 2), x.v.roll(i, 1)) for i in range(3)]
    ks, vs = ([pair[i] for pair in shift] for i in range(2))
    weights = [1.0, 1.3, -0.4]
    contenders = _implementations(partial(ops.composed_attention, x.q, ks, vs, weights))
    for name in peers.SDPA:
        contenders[f"SDPA {name}, each"] = _ready(partial(peers.sdpa_each, name, x.q, ks, vs, weights))
    wide_ks, wide_vs = ([t.double() for t in ts] for ts in (ks, vs))
    truth = _first(ops.composed_attention(x.q.double(), wide_ks, wide_vs, weights, impl="reference"))
    moved = _size(x.q, x.q, *ks, *vs)
    return Comparison("composed_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def region_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Four stripes of the picture, each with a phrase of four tokens."""
    batch, device = layer.batch, x.q.device
    bits = 1 << (torch.arange(layer.image_tokens, device=device) * 4 // layer.image_tokens)
    words = torch.zeros(layer.tokens, dtype=torch.int64, device=device)
    words[1:17] = (1 << torch.arange(4, device=device)).repeat_interleave(4)[: layer.tokens - 1]
    rows, columns = (x.int().expand(batch, -1).contiguous() for x in (bits, words))
    weight = torch.full((batch, layer.image_tokens), 0.5, device=device)
    given = (x.q, x.k, x.v, rows, columns, weight)
    contenders = _implementations(partial(ops.region_attention, *given))
    contenders["published"] = _ready(partial(peers.published_region_attention, *given))
    contenders["plain attention"] = Contender(lambda: partial(ops.attention, *x[:3], impl=OURS), checked=False)
    wide = _wide(x)
    truth = _first(ops.region_attention(wide.q, wide.k, wide.v, rows, columns, weight.double(), impl="reference"))
    moved = _size(*given, x.q)
    return Comparison("region_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def gaussian_bias(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    truth = _first(ops.gaussian_bias(x.theta.double(), layer.grid, impl="reference"))
    contenders = _implementations(partial(ops.gaussian_bias, x.theta, layer.grid))
    moved = _size(x.theta, x.bias)
    return Comparison("gaussian_bias", layer, dtype, contenders, truth, TOLERANCES[torch.float32], moved, _first)


def _biased_rivals(
    attend: Callable[[Callable[..., Tensor]], Callable[..., Any]], compile: peers.Compile
) -> dict[str, Contender]:
    """Stock PyTorch for attention with a bias on columns. `attend` puts `function(q, k, v, bias, columns)` to work."""
    rivals = {
        **{f"SDPA {name}, mask": partial(peers.masked_sdpa, name) for name in ("efficient", "cudnn", "math")},
        **{f"SDPA {name}, low rank": partial(peers.low_rank_sdpa, name) for name in ("flash", "efficient", "cudnn")},
    }
    found = {name: _ready(attend(function)) for name, function in rivals.items()}
    found["FlexAttention"] = Contender(lambda: attend(peers.flex(compile)), compiles=True)
    return found


def biased_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Without pinned columns, which no rival has."""
    wide, columns = _wide(x), peers.Columns.of(x.target_ids, x.k)
    truth = _first(ops.biased_attention(*wide[:3], wide.bias, x.target_ids, impl="reference"))
    contenders = _implementations(partial(ops.biased_attention, x.q, x.k, x.v, x.bias, x.target_ids))
    contenders |= _biased_rivals(lambda function: partial(function, *x[:3], x.bias, columns), compile)
    moved = _size(*x[:3], x.bias, x.q)
    return Comparison("biased_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def regulated_attention(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    wide, basis, columns = _wide(x), peers.axes(layer.grid, x.theta), peers.Columns.of(x.target_ids, x.k)
    given = (wide.q, wide.k, wide.v, wide.theta, x.target_ids)
    truth = _first(ops.regulated_attention(*given, layer.grid, impl="reference"))
    contenders = _implementations(partial(ops.regulated_attention, x.q, x.k, x.v, x.theta, x.target_ids, layer.grid))
    contenders |= _biased_rivals(
        lambda function: lambda: function(*x[:3], peers.span(x.theta, basis), columns), compile
    )
    moved = _size(*x[:3], x.theta, x.q)
    return Comparison("regulated_attention", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, _first)


def _upstream(x: Inputs) -> Tensor:
    """The output's gradient: normal numbers in its dtype."""
    generator = torch.Generator(x.q.device).manual_seed(1)
    return torch.randn(x.q.shape, generator=generator, device=x.q.device).to(x.q.dtype)


def _trained(leaves: Iterable[Tensor], function: Callable[..., Any], grad: Tensor) -> Run:
    """Forward and backward: the gradients of `function(*leaves)` by all of them."""
    leaves = [x.detach().requires_grad_() for x in leaves]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    return run


def _training(op: str, wanted: str, x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and backward, to the bias (or theta) alone or to q, k and v as well."""
    edit = x.bias if op == "biased_attention" else x.theta
    basis, columns = peers.axes(layer.grid, x.theta), peers.Columns.of(x.target_ids, x.k)

    def ours(impl: str, q: Tensor, k: Tensor, v: Tensor, edit: Tensor) -> Tensor:
        if op == "biased_attention":
            return ops.biased_attention(q, k, v, edit, x.target_ids, impl=impl)
        return ops.regulated_attention(q, k, v, edit, x.target_ids, layer.grid, impl=impl)

    def run(function: Callable[..., Tensor], x: Inputs, edit: Tensor) -> Run:
        grad = _upstream(x)
        if wanted == "edit":
            return _trained([edit], partial(function, *x[:3]), grad)
        return _trained([*x[:3], edit], function, grad)

    def attend(function: Callable[..., Tensor]) -> Run:
        def stock(q: Tensor, k: Tensor, v: Tensor, edit: Tensor) -> Tensor:
            bias = edit if op == "biased_attention" else peers.span(edit, basis)
            return function(q, k, v, bias, columns)

        return run(stock, x, edit)

    wide = _wide(x)
    contenders = {name: _ready(run(partial(ours, name), x, edit)) for name in (OURS, "eager")}
    contenders |= _biased_rivals(attend, compile)
    truth = run(partial(ours, "reference"), wide, edit.double())()
    moved = 2 * _size(*x[:3], edit, x.q) if wanted == "all" else _size(*x[:3], edit, x.q, x.q, edit)
    return Comparison(f"{op}_{wanted}", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple)


def attention_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and backward."""
    grad = _upstream(x)

    def run(function: Callable[..., Any], x: Inputs) -> Contender:
        return _ready(_trained(x[:3], function, grad))

    contenders = {name: run(partial(ops.attention, impl=name), x) for name in (OURS, "eager")}
    contenders |= {f"SDPA {name}": run(partial(peers.sdpa, name), x) for name in peers.SDPA}
    truth = run(partial(ops.attention, impl="reference"), _wide(x)).build()()
    moved = 2 * _size(*x[:3], x.q)
    return Comparison("attention_all", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple)


def merge_targets_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and backward, to everything."""
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}
    stats = ops.target_statistics(*x[:3], x.target_ids, **how, impl="eager")
    grad = _upstream(x)

    def run(impl: str, x: Inputs, stats: ops.TargetStatistics) -> Contender:
        def merged(out: Tensor, lse: Tensor, logits: Tensor, pinned: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            made = ops.TargetStatistics(out, lse, logits, None, pinned)
            return ops.merge_targets(made, v, x.target_ids, bias, **how, impl=impl)

        leaves = [t for t in (*stats, x.v, x.bias) if t is not None]
        return _ready(_trained(leaves, merged, grad))

    contenders = {name: run(name, x, stats) for name in (OURS, "eager")}
    truth = run("reference", _wide(x), _retyped(stats, torch.float64)).build()()
    moved = 2 * _size(*stats, x.bias, x.q, x.v)
    return Comparison("merge_targets_all", layer, dtype, contenders, truth, TOLERANCES[dtype], moved, tuple)


def gaussian_bias_all(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and backward."""

    def run(impl: str, theta: Tensor) -> Contender:
        return _ready(_trained([theta], lambda t: ops.gaussian_bias(t, layer.grid, impl=impl), x.bias))

    contenders = {name: run(name, x.theta) for name in (OURS, "eager")}
    truth = run("reference", x.theta.double()).build()()
    moved = 2 * _size(x.theta, x.bias)
    tolerance = TOLERANCES[torch.float32]
    return Comparison("gaussian_bias_all", layer, dtype, contenders, truth, tolerance, moved, tuple)


def regulation_loss(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and the bias's gradient."""
    stats = ops.target_statistics(*x[:3], x.target_ids, impl="eager")

    def loss(impl: str, stats: ops.TargetStatistics, bias: Tensor) -> Tensor:
        return ops.regulation_loss(stats, bias, impl=impl)

    grad = torch.ones(layer.batch, layer.heads, device=x.q.device)
    contenders = {
        name: _ready(_trained([x.bias], partial(loss, name, stats), grad)) for name in (OURS, "eager", "reference")
    }
    wide = _retyped(stats, torch.float64)
    truth = _trained([x.bias.double()], partial(loss, "reference", wide), grad.double())()
    moved = _size(stats.logits, stats.rest_lse, x.bias, x.bias)
    return Comparison("regulation_loss", layer, dtype, contenders, truth, TOLERANCES[torch.float32], moved, _first)


def regulate(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """The inner loop; the published form starts from q and k, as it has no statistics."""
    stats = ops.target_statistics(*x[:3], x.target_ids, impl="eager")
    basis = full_basis(layer.grid, None, "official", x.theta)

    def solve(impl: str) -> tuple[Tensor, Tensor]:
        found = ops.regulate(stats, layer.grid, theta=x.theta, steps=layer.steps, impl=impl)
        return found.losses, found.bias

    def loop() -> Run:
        run = peers.statistics_loop(layer.grid, peers.axes(layer.grid, x.theta), layer.steps, compile)
        return partial(run, stats.logits, stats.rest_lse, x.theta)

    old = (x.q, x.k, x.target_ids, x.theta, basis, layer.steps)
    contenders = {
        OURS: _ready(partial(solve, OURS)),
        "eager": _ready(partial(solve, "eager")),
        "published": _ready(partial(peers.published, *old)),
        "published, no sync": _ready(partial(peers.published_without_sync, *old)),
        "torch.compile": Contender(loop, compiles=True),
    }
    moved = _size(stats.logits, stats.rest_lse, x.theta, stats.logits, x.theta)
    return Comparison("regulate", layer, dtype, contenders, _exact_loss(x, layer), LOSS_TOLERANCE, moved, _lowest)


def _exact_loss(x: Inputs, layer: Layer) -> tuple[Tensor, ...]:
    stats = ops.target_statistics(*_wide(x)[:3], x.target_ids, impl="eager")
    losses = ops.regulate(stats, layer.grid, theta=x.theta.double(), steps=layer.steps, impl="eager").losses
    return _lowest((losses,))


def regulated_layer(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """A whole layer under attention regulation, pinned columns and all, and plain ones beside it."""
    basis = full_basis(layer.grid, None, "official", x.theta)
    how: dict[str, Any] = {"pinned_ids": x.pinned_ids}

    def layered(impl: str, solve: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        stats = ops.target_statistics(*x[:3], x.target_ids, **how, impl=impl)
        losses, bias = solve(stats)
        return losses, ops.merge_targets(stats, x.v, x.target_ids, bias, **how, impl=impl)

    def solver(impl: str) -> Run:
        def solve(stats: ops.TargetStatistics) -> tuple[Tensor, Tensor]:
            found = ops.regulate(stats, layer.grid, theta=x.theta, steps=layer.steps, impl=impl)
            return found.losses, found.bias

        return partial(layered, impl, solve)

    def compiled() -> Run:
        loop = peers.statistics_loop(layer.grid, peers.axes(layer.grid, x.theta), layer.steps, compile)
        return partial(layered, "eager", lambda stats: loop(stats.logits, stats.rest_lse, x.theta))

    def old(loop: Callable[..., tuple[Tensor, Tensor]]) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            losses, bias = loop(x.q, x.k, x.target_ids, x.theta, basis, layer.steps)
            logits = peers.full_logits(x.q, x.k)
            probabilities = logits.index_add(3, x.target_ids, bias.mT).softmax(-1)
            kept = logits.softmax(-1).index_select(3, x.pinned_ids)
            probabilities = probabilities.index_copy(3, x.pinned_ids, kept)
            return losses, probabilities.to(x.v.dtype) @ x.v

        return run

    contenders = {
        OURS: _ready(solver(OURS)),
        "eager": _ready(solver("eager")),
        "published": _ready(old(peers.published)),
        "published, no sync": _ready(old(peers.published_without_sync)),
        "torch.compile": Contender(compiled, compiles=True),
        "plain layer": Contender(lambda: partial(ops.attention, *x[:3], impl=OURS), checked=False),
        "plain layer, SDPA": Contender(
            lambda: partial(torch.nn.functional.scaled_dot_product_attention, *x[:3]), checked=False
        ),
    }
    moved = _size(*x[:3], x.theta, x.q)
    truth = _exact_loss(x, layer)
    return Comparison("regulated_layer", layer, dtype, contenders, truth, LOSS_TOLERANCE, moved, _lowest)


def _maps(x: Inputs) -> tuple[Tensor, Tensor]:
    """The tokens' maps [B,n,M], averaged over heads, and causal rows [B,n,n] that sum to 1: up to 12 tokens."""
    probabilities = peers.full_logits(x.q, x.k).softmax(-1).mean(1)
    tokens = min(12, probabilities.shape[2] - 2)
    maps = probabilities[..., 1 : 1 + tokens].mT.contiguous()
    generator = torch.Generator(x.q.device).manual_seed(1)
    text = torch.rand(len(maps), tokens, tokens, generator=generator, device=maps.device).tril()
    return maps, text / text.sum(-1, keepdim=True)


def smooth_maps(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    maps, _ = _maps(x)
    contenders = _implementations(partial(ops.smooth_maps, maps, layer.grid), OURS, "eager", "reference")
    truth = _first(ops.smooth_maps(maps.double(), layer.grid, impl="reference"))
    tolerance = TOLERANCES[torch.float32]
    return Comparison("smooth_maps", layer, dtype, contenders, truth, tolerance, _size(maps, maps), _first)


def similarity_loss(x: Inputs, layer: Layer, dtype: torch.dtype, compile: peers.Compile) -> Comparison:
    """Forward and the maps' gradient."""
    maps, text = _maps(x)
    grad = torch.ones(len(maps), device=maps.device)

    def run(function: Callable[..., Tensor], maps: Tensor = maps, text: Tensor = text) -> Run:
        return _trained([maps], lambda m: function(m, text, layer.grid), grad.to(maps.dtype))

    contenders = {name: _ready(run(partial(ops.similarity_loss, impl=name))) for name in (OURS, "eager")}
    contenders["closed form"] = _ready(run(peers.plain_similarity_loss))
    contenders["torch.compile"] = Contender(lambda: run(compile(peers.plain_similarity_loss)), compiles=True)
    contenders["published"] = _ready(run(peers.published_similarity_loss))
    truth = run(partial(ops.similarity_loss, impl="reference"), maps.double(), text.double())()
    moved = 2 * _size(maps) + _size(text)
    tolerance = TOLERANCES[torch.float32]
    return Comparison("similarity_loss", layer, dtype, contenders, truth, tolerance, moved, _first)


Build = Callable[[Inputs, Layer, torch.dtype, peers.Compile], Comparison]
OPERATIONS: dict[str, Build] = {
    "attention": attention,
    "regulate": regulate,
    "regulated_layer": regulated_layer,
    "target_statistics": target_statistics,
    "attention_with_maps": attention_with_maps,
    "attention_with_maps_guidance": attention_with_maps_guidance,
    "attention_with_context_gradient": attention_with_context_gradient,
    "context_update": context_update,
    "composed_attention": composed_attention,
    "region_attention": region_attention,
    "merge_targets": merge_targets,
    "biased_attention": biased_attention,
    "regulated_attention": regulated_attention,
    "biased_attention_edit": partial(_training, "biased_attention", "edit"),
    "biased_attention_all": partial(_training, "biased_attention", "all"),
    "regulated_attention_edit": partial(_training, "regulated_attention", "edit"),
    "regulated_attention_all": partial(_training, "regulated_attention", "all"),
    "attention_all": attention_all,
    "merge_targets_all": merge_targets_all,
    "regulation_loss": regulation_loss,
    "gaussian_bias": gaussian_bias,
    "gaussian_bias_all": gaussian_bias_all,
    "smooth_maps": smooth_maps,
    "similarity_loss": similarity_loss,
}


def comparison(
    operation: str, layer: Layer, dtype: torch.dtype, device: torch.device, compile: peers.Compile
) -> Comparison:
    """The comparison of an operation of `OPERATIONS` on random inputs."""
    return OPERATIONS[operation](inputs(layer, dtype, device), layer, dtype, compile)
