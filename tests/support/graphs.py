"""A pipeline whose UNet is compiled for the length of a block, and the graphs that were made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def counted_graphs(pipe: Any, place: str = "wrapped") -> Iterator[list[Any]]:
    """Compile the UNet without graph breaks, `wrapped`, `in place` or by its repeated `blocks`."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    unet = pipe.unet
    torch._dynamo.reset()
    if place == "wrapped":
        pipe.unet = torch.compile(unet, fullgraph=True, backend=backend)
    elif place == "in place":
        unet.compile(fullgraph=True, backend=backend)
    else:
        unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    try:
        yield graphs
    finally:
        pipe.unet = unet
        for module in unet.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()
