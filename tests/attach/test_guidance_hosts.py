"""Latent guidance beside what else may be at work: offloading, autocast, other pipelines on the same parts."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnctl_fast as ac
from attnctl_fast.attach.rows import with_rows
from attnctl_fast.attach.scheduler import SchedulerTap
from tests.support import tiny
from tests.support.pipelines import PROMPT, Peaks, Stop, call, guided, snapshot, stop_at

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def gradients(pipe: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}


def test_offloaded_weights_are_trainable_again() -> None:
    """Sequential offloading replaces the parameters while they are frozen."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.pipeline()
    expected, before = guided(pipe, Peaks(steps=1)), gradients(pipe)
    assert all(before.values())
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert torch.equal(guided(pipe, Peaks(steps=1)), expected)
    assert gradients(pipe) == before


def test_group_offloading_is_refused() -> None:
    pipe = tiny.pipeline()
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(ValueError, match="group offloading.*enable_model_cpu_offload"):
        ac.enable(pipe, Peaks())


def test_a_pipeline_loaded_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        pipe = tiny.pipeline()
        with pytest.raises(ValueError, match="loaded under torch.inference_mode"):
            guided(pipe, Peaks())


def test_the_loss_is_float32_under_autocast() -> None:
    seen = set()

    class Product(Peaks):
        def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
            products = maps @ maps.mT
            seen.add(products.dtype)
            return products.sum((1, 2))

    with torch.autocast("cpu", torch.bfloat16):
        guided(tiny.pipeline(), Product(steps=1))
    assert seen == {torch.float32}


def test_another_pipeline_after_an_exception() -> None:
    """It shares the UNet, and is not taken for the rest of the call that has ended."""
    pipe = tiny.pipeline()
    other = tiny.pipeline(unet=pipe.unet)
    plain, expected = call(other), guided(pipe, Peaks())
    with ac.control(pipe, Peaks()):
        with pytest.raises(Stop):
            call(pipe, callback_on_step_end=stop_at(0))
        assert torch.equal(call(other), plain)
        assert torch.equal(call(pipe), expected)


def test_taps_on_one_scheduler_in_any_order() -> None:
    first = tiny.pipeline()
    second = tiny.pipeline(scheduler=first.scheduler)
    before = snapshot(first)
    handles = [ac.enable(pipe, Peaks()) for pipe in (first, second)]
    for pipe in (first, second):
        with pytest.raises(Stop):
            call(pipe, callback_on_step_end=stop_at(0))
    for handle in handles:
        handle.disable()
    assert snapshot(first) == before


def test_loops_on_one_scheduler_end_in_any_order() -> None:
    first = tiny.pipeline()
    pipes = first, tiny.pipeline(scheduler=first.scheduler)
    before = snapshot(first)
    handles = [ac.enable(pipe, Peaks()) for pipe in pipes]
    for handle, pipe in zip(handles, pipes, strict=True):
        handle.begin(prompt_embeds=pipe.encode_prompt(PROMPT, "cpu", 1, False)[0])
    for handle in handles:
        handle.end()
        handle.disable()
    assert snapshot(first) == before


def test_a_step_that_was_not_taken_does_not_move_the_next_one() -> None:
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(2)
    x, t = tiny.latents(), scheduler.timesteps[0]
    expected = scheduler.step(x, t, x).prev_sample
    tap = SchedulerTap()
    tap.put_on(scheduler)
    tap.moved = x + 1
    scheduler.scale_model_input(x, t)
    assert torch.equal(scheduler.step(x, t, x).prev_sample, expected)
    tap.moved = x + 1
    assert not torch.equal(scheduler.step(x, t, x).prev_sample, expected)
    tap.remove()
    assert "step" not in vars(scheduler)


class Lost(Peaks):
    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return super().loss(maps, context) * torch.nan


def test_what_was_left_out_is_reported_when_disabled_within_a_call() -> None:
    pipe = tiny.pipeline()
    handle = ac.enable(pipe, Lost())

    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        handle.disable()
        return tensors

    with pytest.warns(RuntimeWarning, match="Lost left out 1 moves"):
        call(pipe, callback_on_step_end=callback)


def test_a_composition_disabled_within_a_call() -> None:
    """While another control keeps the UNet's engine alive."""
    pipe = tiny.pipeline()
    other = ac.enable(tiny.pipeline(unet=pipe.unet), Peaks())
    handle, rows = ac.enable(pipe, ac.ComposableDiffusion(["a dog", "a cat"])), []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    def callback(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        handle.disable()
        return tensors

    call(pipe, callback_on_step_end=callback)
    hook.remove()
    other.disable()
    assert rows == [3, 2, 2, 2]


def test_rows_of_adapters_are_not_those_of_samples() -> None:
    given = {"ip_adapter_masks": torch.zeros(2, 1), "text": torch.arange(2), "lists": [torch.arange(2), None]}
    changed = with_rows(given, 2, lambda x: x[1:])
    assert changed["ip_adapter_masks"] is given["ip_adapter_masks"]
    assert changed["text"].tolist() == changed["lists"][0].tolist() == [1]


@dataclass(frozen=True)
class Weighted(ac.LatentGuidance):
    weight: float = 2.0
    _: KW_ONLY
    layers = ac.by_downsampling(2)
    steps: int | float = 3

    def loss(self, maps: Tensor, context: ac.GuidanceContext) -> Tensor:
        return self.weight * maps.sum((1, 2))


def test_a_subclass_with_the_decorator() -> None:
    method = Weighted(3.0, scale=1.0)
    assert (method.weight, method.steps, method.scale) == (3.0, 3, 1.0)
    assert method.layers == ac.by_downsampling(2)
