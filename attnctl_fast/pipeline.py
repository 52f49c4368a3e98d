"""Attaching methods to diffusers pipelines, and restoring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from ._capture import AttentionMaps, Capture
from ._engine import Engine, Entry
from ._guidance import check_offload
from ._layers import LayerChoice, by_downsampling, check_choice, choose
from ._scheduler import check_scheduler
from ._tokens import check_targets
from .methods import ComposableDiffusion, Composition, EnergyContext, LatentGuidance
from .methods._base import EditingMethod

__all__ = ["AttentionMaps", "Handle", "by_downsampling", "capture", "control", "enable"]

Method: TypeAlias = EditingMethod | EnergyContext | Composition | LatentGuidance | ComposableDiffusion


class Handle:
    """What `enable` put on a pipeline."""

    def __init__(self, engine: Engine, entry: Entry) -> None:
        self._engine, self._entry = engine, entry
        self._on = True

    def disable(self) -> None:
        """Take it off again. Handles may be disabled in any order; a second call does nothing.

        During a pipeline call, the contexts of other controls then rest until the next call.

        Warns (RuntimeWarning) if something replaced the pipeline's attention processors meanwhile, and leaves those
        alone.
        """
        if self._on:
            self._on = False
            self._engine.remove(self._entry)


def enable(pipe: Any, *methods: Method) -> Handle:
    """Put methods on a diffusers UNet pipeline until `handle.disable()`; `control` is the same for a `with` block.

    The pipeline's class and the way it is called stay the same. On the layers that the methods edit, and only there, a
    processor stands in front of the one that is there (standard or IP-Adapter); under EnergyContext and Composition on
    every cross-attention layer, for all read the context. Where controls are nested, the inner one acts on the layers
    that both name; an inner EnergyContext, Composition or ComposableDiffusion takes the place of an outer one. Latent
    guidance needs no processor between its evaluations; several move the latents one after the other, and all other
    methods rest meanwhile. Other pipelines that share the UNet are not affected.

    Args:
        pipe: a text-to-image, image-to-image, inpainting or ControlNet pipeline of SD 1.x, SD 2.x or SDXL.
        methods: such as `AttentionRegulation(["bag", "apple"])`, each on its own layers; any number of LatentGuidance,
            on any layers; and one EnergyContext and one Composition, on any layers. A ComposableDiffusion stands alone.

    Returns:
        The handle.

    Raises:
        ValueError: no method, two of a kind where one is allowed, a pipeline without cross-attention, layers that
            do not exist, that two editing methods share or whose processors cannot be edited; for latent guidance a
            scheduler that does not scale its input, or group offloading. Nothing has been changed then. What
            depends on the prompt (a target that does not stand in it) is raised by the pipeline call, before its
            first step.
        RuntimeError: the processors were replaced while another control is on; calling the pipeline also raises it.
    """
    if not methods:
        raise ValueError("no method was given; pass at least one, such as AttentionRegulation(['bag', 'apple'])")
    for method in methods:
        if not isinstance(method, (EditingMethod, EnergyContext, Composition, LatentGuidance, ComposableDiffusion)):
            raise ValueError(
                f"{method!r} is not a method; pass instances such as AttentionRegulation(['bag', 'apple'])"
            )
    engine = Engine.of(pipe)
    entry = Entry(pipe)
    for method in methods:
        if isinstance(method, ComposableDiffusion):
            if len(methods) > 1:
                raise ValueError("ComposableDiffusion does not go together with other methods; pass it alone")
            entry.conjunction = method
            continue
        layers = engine.reach(method)
        names = method.default_layers(layers) if method.layers is None else choose(layers, method.layers)
        if isinstance(method, (EnergyContext, Composition)):
            kind = "energy" if isinstance(method, EnergyContext) else "composition"
            if getattr(entry, kind) is not None:
                raise ValueError(
                    f"two of the methods are {type(method).__name__}; pass one, for a composition with all edits"
                )
            setattr(entry, kind, (method, names))
            continue
        if isinstance(method, LatentGuidance):
            check_scheduler(pipe)
            check_offload(engine.unet)
            engine.check_processors(names)
            entry.guidances.append((method, names))
            continue
        if shared := entry.edited().intersection(names):
            raise ValueError(f"two of the methods edit {', '.join(sorted(shared))}; give them different layers")
        entry.methods.append((method, names))
    return _attach(engine, entry)


@contextmanager
def control(pipe: Any, *methods: Method) -> Iterator[Handle]:
    """Methods on a pipeline for the length of a `with` block; see `enable`. On leaving, by return or by exception, the
    pipeline is as it was."""
    handle = enable(pipe, *methods)
    try:
        yield handle
    finally:
        handle.disable()


@contextmanager
def capture(pipe: Any, tokens: Any = None, layers: LayerChoice = None) -> Iterator[AttentionMaps]:
    """Record head-averaged cross-attention maps of a pipeline's calls within a `with` block, for looking at.

    Args:
        pipe: as for `enable`.
        tokens: words, phrases or token ids as for a method's targets; None for every token of the context.
        layers: name prefixes or `by_downsampling(n)`; None for every cross-attention layer.

    Yields:
        `AttentionMaps`, a mapping from layer names to maps; it holds those of the last call, also after the block.

    Raises:
        ValueError: as `enable` does.
    """
    choice = check_choice(layers)
    one = Capture(None if tokens is None else check_targets(tokens, "tokens"), choice, AttentionMaps())
    engine = Engine.of(pipe)
    names = list(engine.layers) if choice is None else choose(engine.layers, choice)
    handle = _attach(engine, Entry(pipe, captures=[(one, names)]))
    try:
        yield one.maps
    finally:
        handle.disable()


def _attach(engine: Engine, entry: Entry) -> Handle:
    engine.check_processors(entry.layers(engine.layers))
    engine.add(entry)
    return Handle(engine, entry)
