"""A controlled evaluation of the model never waits for the device, and can be captured in a CUDA graph."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attnctl_fast as ac
from attnctl_fast import by_downsampling
from tests.support import tiny
from tests.support.numerics import DEVICE

pytest.importorskip("triton")
_launch = importlib.import_module("attnctl_fast.kernels._launch")
PROMPT = "a red bag and a black apple"
GUIDED: dict[str, Any] = {"layers": by_downsampling(2)}
HALF = torch.zeros(32, 32).index_fill(1, torch.arange(16), 1.0)
MASKS = {"bag": HALF, "apple": 1 - HALF}
METHODS: dict[str, Callable[[], Any]] = {
    "AttentionRegulation": lambda: ac.AttentionRegulation(["bag", "apple"], steps=2),
    "AttentionRegulation, paper": lambda: ac.AttentionRegulation.paper(["bag", "apple"], steps=2),
    "EnergyContext": lambda: ac.EnergyContext(0.05, 0.05),
    "Composition": lambda: ac.Composition([ac.Edit("the two dog", 1.5)]),
    "DenseDiffusion": lambda: ac.DenseDiffusion(MASKS),
    "ComposableDiffusion": lambda: ac.ComposableDiffusion(["a red bag", "a black apple"]),
    "AttendAndExcite": lambda: ac.AttendAndExcite(["bag", "apple"], thresholds={}, **GUIDED),
    "TSAM": lambda: ac.TSAM(refinement={}, **GUIDED),
    "SynGen": lambda: ac.SynGen([("red", "bag"), ("black", "apple")], **GUIDED),
    "CONFORM": lambda: ac.CONFORM([("red", "bag"), ("black", "apple")], refinement={}, **GUIDED),
    "FOCUS": lambda: ac.FOCUS([("red", "bag"), ("black", "apple")], **GUIDED),
    "NAG": lambda: ac.NAG("a dog"),
    "PLADIS": lambda: ac.PLADIS(),
}
# Operations for which the host waits for a GPU: it reads a number, or must know how many there are.
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "lift_fresh")


class NeverWaiting(TorchDispatchMode):
    """Raises where the host would wait for a GPU, or move to it what a CUDA graph would never see again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        assert not name.startswith(WAITING), f"the host waits for {name}"
        return func(*args, **(kwargs or {}))


class NeverReading(TorchFunctionMode):
    """Raises where the host takes numbers to itself; token ids it reads on a CPU only, to check them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy"):
            assert args[0].dtype == torch.int64, f"the host reads by {func.__name__}"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    if DEVICE.type != "cuda":
        # Nothing is launched, so that nothing is interpreted either.
        with NeverReading(), NeverWaiting(), _launch.recording():
            yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def evaluating(method: Any) -> Iterator[Callable[[int], Tensor]]:
    """Control a tiny UNet, and yield what evaluates it at a step."""
    pipe = tiny.pipeline().to(DEVICE)
    pipe.scheduler.set_timesteps(4, device=DEVICE)
    latents = tiny.latents(2).to(DEVICE)
    with ac.use("triton"), ac.control(pipe, method) as handle, torch.no_grad():
        embeddings, negative = pipe.encode_prompt(PROMPT, DEVICE, 1, True)
        handle.begin(prompt=PROMPT, prompt_embeds=embeddings, negative_prompt_embeds=negative)
        context = torch.cat([negative, embeddings])

        def evaluate(step: int) -> Tensor:
            # Others for every step: latents that were guided once are left as they are.
            return pipe.unet(latents + step, pipe.scheduler.timesteps[step], encoder_hidden_states=context).sample

        yield evaluate


@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_does_not_wait(name: str) -> None:
    """From the second one on: the first makes what the others use."""
    with evaluating(METHODS[name]()) as evaluate:
        with _launch.recording() if DEVICE.type != "cuda" else contextlib.nullcontext():
            evaluate(0)
        with never_waiting():
            evaluate(1)


def test_a_wait_is_seen() -> None:
    """Of a threshold, which the host must compare with the loss."""
    method = ac.AttendAndExcite(["bag", "apple"], thresholds={1: 0.5}, **GUIDED)
    with evaluating(method) as evaluate, contextlib.ExitStack() as stack:
        if DEVICE.type != "cuda":
            stack.enter_context(_launch.recording())
        evaluate(0)
        with pytest.raises((AssertionError, RuntimeError)), never_waiting():
            evaluate(1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", METHODS)
def test_an_evaluation_is_captured_in_one_graph(name: str) -> None:
    with evaluating(METHODS[name]()) as evaluate:
        evaluate(0)
        expected = evaluate(1)
    side = torch.cuda.Stream()
    with evaluating(METHODS[name]()) as evaluate:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            evaluate(0)  # compiles, and makes what later evaluations use
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = evaluate(1)
        for _ in range(2):
            captured.fill_(torch.nan)
            graph.replay()
            torch.testing.assert_close(captured, expected)
