"""A pipeline whose model is compiled for the length of a block, and the graphs that were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def counted_graphs(pipe: Any, place: str = "wrapped") -> Iterator[list[Any]]:
    """Compile the UNet or the transformer without graph breaks, `wrapped`, `in place` or by its repeated `blocks`."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    name = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, name)
    torch._dynamo.reset()
    if place == "wrapped":
        setattr(pipe, name, torch.compile(model, fullgraph=True, backend=backend))
    elif place == "in place":
        model.compile(fullgraph=True, backend=backend)
    else:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    try:
        yield graphs
    finally:
        setattr(pipe, name, model)
        for module in model.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()
