"""A UNet in which only what a form touches computes, so that what it adds can be measured many times.

One evaluation is recorded. After that, within `Still.around`, every module returns what it returned then, but for the
attention layers that the form touches: their inputs are the recorded ones, whatever the latents, so plain and
controlled evaluations differ by the form's own work alone. Passes that record gradients run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from attnctl_fast.attach.patching import Patch
from bench.pictures.attention_layers import layers_of
from bench.pictures.sampling import Setting, call


class Still:
    """The parts of a pipeline's UNet: its attention layers, and the largest modules around them."""

    def __init__(self, pipe: Any) -> None:
        self._unet = pipe.unet
        self._layers = {name: layer.module for name, layer in layers_of(pipe).items()}
        self._processors = {name: module.processor for name, module in self._layers.items()}
        names = {id(module): name for name, module in self._layers.items()}
        self._parts = {names.get(id(part), str(id(part))): part for part in _parts(self._unet, set(names))}
        self._recorded: dict[str, Any] = {}

    def record(self, setting: Setting) -> None:
        """Keep what every part returns at one plain step."""

        def keep(name: str) -> Callable[..., Any]:
            def run(patch: Patch, *args: Any, **kwargs: Any) -> Any:
                self._recorded[name] = patch.inner(*args, **kwargs)
                return self._recorded[name]

            return run

        with _patched({part: keep(name) for name, part in self._parts.items()}):
            call(setting)

    @contextmanager
    def around(self, layers: Collection[str]) -> Iterator[None]:
        """Within the block, every part but these layers returns what was recorded."""

        def repeat(name: str) -> Callable[..., Any]:
            def run(patch: Patch, *args: Any, **kwargs: Any) -> Any:
                return patch.inner(*args, **kwargs) if torch.is_grad_enabled() else self._recorded[name]

            return run

        with _patched({part: repeat(name) for name, part in self._parts.items() if name not in layers}):
            yield

    def touched(self, draw: Callable[[], Any], rows: int) -> frozenset[str] | None:
        """Draw, and return the names of the attention layers that the form changed: those with another processor, a
        hook or a forward of the form's in evaluations without gradients. None: it evaluates other batches than plain
        sampling, which has so many rows, and no module stays as it is."""
        found: set[str] = set()
        others: list[int] = []

        def look(name: str) -> Callable[..., Any]:
            def run(patch: Patch, *args: Any, **kwargs: Any) -> Any:
                module = self._layers[name]
                hooked = module._forward_hooks or module._forward_pre_hooks
                if not torch.is_grad_enabled() and (
                    hooked or not patch.stands() or module.processor is not self._processors[name]
                ):
                    found.add(name)
                return patch.inner(*args, **kwargs)

            return run

        def count(patch: Patch, sample: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() and len(sample) != rows:
                others.append(len(sample))
            return patch.inner(sample, *args, **kwargs)

        looking = {module: look(name) for name, module in self._layers.items()}
        with _patched({self._unet: count, **looking}):
            draw()
        return None if others else frozenset(found)


def _parts(module: nn.Module, layers: set[int]) -> Iterator[nn.Module]:
    whole = id(module) in layers or not any(id(one) in layers for one in module.modules())
    # A list of modules is never called itself.
    if whole and not isinstance(module, nn.ModuleList):
        yield module
    else:
        for child in module.children():
            yield from _parts(child, layers)


@contextmanager
def _patched(functions: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have these stand in for the modules' forwards within the block."""
    with ExitStack() as stack:
        for module, function in functions.items():
            stack.callback(Patch(module, "forward", function).undo)
        yield
