"""A pass through the model that ends at the last attention map that is read, for gradients of the latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .attention import Attention
from .call import Site
from .evaluation import Evaluation
from .intercept import Acts, Place, check_uncached, installed
from .protocol import Run
from .rows import Rows


class _Read(Exception):
    """All maps are there; the rest of the model's pass would be wasted."""


class _Reader(Run):
    """A run that adds the maps of every layer to a list, and ends the pass at the last one."""

    def __init__(self, token_ids: Tensor | None, tokens: int, last: Site | None) -> None:
        self.token_ids, self.tokens, self.last = token_ids, tokens, last
        self.maps: list[Tensor] = []

    def attend(self, site: Site, attention: Attention) -> None:
        self.maps.append(attention.maps(self.token_ids, self.tokens))
        if site is self.last:
            raise _Read


@contextmanager
def reading(
    evaluation: Evaluation,
    sites: Sequence[Site],
    token_ids: Tensor | None,
    *,
    truncate: bool = True,
    freeze: bool = True,
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a differentiable function from latents to maps.

    The maps are attention of the conditional rows, mean over heads and layers, `[B,n,M]`. The function evaluates the
    model, not compiled, without what methods do in other passes.

    Args:
        evaluation: what the pipeline asked for.
        sites: the layers, all of one grid, in order of execution.
        token_ids: whose maps, `[B,n]`, or None for every token.
        truncate: end the pass at the last of the layers.
        freeze: keep the weights out of the gradient.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    model, samples = evaluation.model, evaluation.samples
    reader = _Reader(token_ids, evaluation.call.prompts.length, sites[-1] if truncate else None)
    places = [Place(site.layer) for site in sites]
    columns = evaluation.columns if sites[-1].layer.text else 0
    for place, site in zip(places, sites, strict=True):
        place.rows = Rows(len(samples), range(len(samples)), samples)
        place.now = Acts(attend=((reader, site),))
        place.tokens = columns, math.prod((*site.frames, *site.grid))

    def read(latents: Tensor) -> Tensor:
        args, kwargs = evaluation.conditional_arguments(latents)
        reader.maps = []
        try:
            model(*args, **kwargs)
        except _Read:
            _unload(model, sites[-1].name)
        return reader.maps[0] if len(reader.maps) == 1 else torch.stack(reader.maps).mean(0)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if freeze:
            stack.enter_context(frozen(model))
        for module in model.modules():
            # Perturbed attention guidance's processors take their batch apart, whose rows this pass has not.
            if type(getattr(module, "processor", None)).__name__.startswith("PAG"):
                stack.callback(module.__dict__.__setitem__, "processor", module.processor)
                module.__dict__["processor"] = AttnProcessor2_0()
        stack.enter_context(installed(places))
        yield read


def _unload(model: nn.Module, name: str) -> None:
    """Have accelerate put back what it loaded for the modules that an exception in this layer has left."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:length])), "_hf_hook", None)
        if hook is not None:
            hook.post_forward(model.get_submodule(".".join(parts[:length])), None)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Have no parameter of the module require a gradient."""
    # By name: sequential offloading puts other parameters into their places in the meantime.
    trained = [
        (owner, name)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    try:
        for owner, name in trained:
            owner.get_parameter(name).requires_grad_(False)
        yield
    finally:
        for owner, name in trained:
            owner.get_parameter(name).requires_grad_(True)


def _has_hook(model: nn.Module, name: str) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(name in registry.hooks for registry in registries if registry is not None)


def check_guidable(model: nn.Module) -> None:
    """Raise ValueError where weights are gone, or unknown to autograd, when a backward pass needs them."""
    check_uncached(model, "guidance")
    if _has_hook(model, "group_offloading"):
        raise ValueError(
            "the model is under group offloading, which takes its weights away before the latents' gradient needs "
            "them; use pipe.enable_model_cpu_offload() instead"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was loaded under torch.inference_mode(), so nothing can be differentiated through it; load "
            "the pipeline outside of it (it may be called within)"
        )
