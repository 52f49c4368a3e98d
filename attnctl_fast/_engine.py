"""The engine that drives methods through the processors of one UNet, from the start of a pipeline call to its end."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ._layers import Layer, cross_attention_layers
from ._processors import ControlledProcessor, is_supported
from ._tokens import Prompts
from .methods._base import Call, Edit, Method

if TYPE_CHECKING:
    from ._capture import Capture, Recording

_KEY = "_attnctl_engine"


@dataclass(eq=False)
class Entry:
    """What one `enable` or `capture` put on a pipeline: methods and captures, each with the names of its layers, and
    what they are doing in the current call, by layer."""

    pipe: Any
    methods: list[tuple[Method, list[str]]] = field(default_factory=list)
    captures: list[tuple[Capture, list[str]]] = field(default_factory=list)
    edits: dict[str, Edit] = field(default_factory=dict)
    recordings: dict[str, Recording] = field(default_factory=dict)

    def layers(self) -> set[str]:
        return {name for _, names in [*self.methods, *self.captures] for name in names}

    def start(self, call: Call) -> None:
        self.edits = {name: edit for method, names in self.methods for edit in [method.start(call)] for name in names}
        self.recordings = {name: run for one, names in self.captures for run in [one.start(call)] for name in names}

    def stop(self) -> None:
        self.edits, self.recordings = {}, {}


class Engine:
    """All that is attached to one UNet: one processor per controlled layer, one forward hook, and two wrapped methods
    per pipeline, which mark where a call begins (`encode_prompt`) and ends (`maybe_free_model_hooks`)."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.layers = cross_attention_layers(unet)
        self.entries: list[Entry] = []
        self.processors: dict[str, ControlledProcessor] = {}
        self.call: Call | None = None
        self._hook: Any = None
        self._patches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
        self._caller: Any = None
        self._guided = False
        self._timestep: Any = None

    @staticmethod
    def of(pipe: Any) -> Engine:
        """The engine of the pipeline's UNet: the one attached to it, or a new one.

        Raises:
            ValueError: the pipeline has no UNet with cross-attention, or does not encode prompts.
        """
        name = type(pipe).__name__
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise ValueError(
                f"{name} has no UNet; methods attach to UNet pipelines (SD 1.x, SD 2.x, SDXL and their kin)"
            )
        unet = getattr(unet, "_orig_mod", unet)
        engine = unet.__dict__.get(_KEY) or Engine(unet)
        if not engine.layers:
            raise ValueError(f"the UNet of {name} has no cross-attention layer; use a text-to-image pipeline")
        if not hasattr(type(pipe), "encode_prompt"):
            raise ValueError(
                f"{name} has no encode_prompt method, so its prompts cannot be known; use a text-to-image pipeline"
            )
        return engine

    def check_processors(self, names: Iterable[str]) -> None:
        """Raise ValueError unless these layers' processors can be edited."""
        self.check_in_place()
        for name in names:
            processor = self.layers[name].module.processor
            if type(processor) is not ControlledProcessor and not is_supported(processor):
                raise ValueError(
                    f"{name} uses {type(processor).__name__}, whose attention this library cannot edit; "
                    "use diffusers' standard or IP-Adapter processors there (unet.set_default_attn_processor())"
                )

    def _replaced(self) -> list[str]:
        return [name for name, ours in self.processors.items() if self.layers[name].module.processor is not ours]

    def check_in_place(self) -> None:
        """Raise RuntimeError if something replaced the processors that the engine installed."""
        if replaced := self._replaced():
            raise RuntimeError(
                f"the attention processors of {', '.join(replaced)} were replaced while control was on (loading "
                "an IP-Adapter and set_attn_processor do that); leave control, then enter it again. The new ones stay"
            )

    def add(self, entry: Entry) -> None:
        if not self.entries:
            self.unet.__dict__[_KEY] = self
            outer = entry.pipe.unet
            self._hook = outer.register_forward_pre_hook(torch.compiler.disable(self._before_unet), with_kwargs=True)
        if all(entry.pipe is not other.pipe for other in self.entries):
            self._patch(entry.pipe)
        self.entries.append(entry)
        for name in entry.layers() - self.processors.keys():
            module = self.layers[name].module
            self.processors[name] = ControlledProcessor(module.processor, self.layers[name], self)
            module.set_processor(self.processors[name])

    def remove(self, entry: Entry) -> None:
        """Take an entry off, in any order, and restore whatever no other entry needs."""
        self.entries.remove(entry)
        replaced = self._replaced()
        needed = {name for other in self.entries for name in other.layers()}
        for name in self.processors.keys() - needed:
            ours = self.processors.pop(name)
            if name not in replaced:
                self.layers[name].module.set_processor(ours._inner)
        if all(entry.pipe is not other.pipe for other in self.entries):
            self._unpatch(entry.pipe)
        if not self.entries:
            self._hook.remove()
            del self.unet.__dict__[_KEY]
        if replaced:
            warnings.warn(
                f"the attention processors of {', '.join(replaced)} were replaced under control; the new ones stay",
                RuntimeWarning,
                stacklevel=3,
            )

    def _patch(self, pipe: Any) -> None:
        encode, free = pipe.encode_prompt, pipe.maybe_free_model_hooks
        # The class's own: a wrapper on the instance may hide the parameters.
        signature = inspect.signature(type(pipe).encode_prompt)

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self._end()
            self.check_in_place()
            if getattr(pipe.unet, "_orig_mod", pipe.unet) is not self.unet:
                raise RuntimeError("pipe.unet was replaced while control was on; leave control, then enter it again")
            result = encode(*args, **kwargs)
            self._begin(pipe, signature.bind(pipe, *args, **kwargs).arguments, result)
            return result

        @functools.wraps(free)
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            if self._caller is pipe:
                self._end()
            return free(*args, **kwargs)

        ours = {"encode_prompt": encode_prompt, "maybe_free_model_hooks": maybe_free_model_hooks}
        self._patches.append((pipe, ours, {name: pipe.__dict__[name] for name in ours if name in pipe.__dict__}))
        pipe.__dict__.update(ours)

    def _unpatch(self, pipe: Any) -> None:
        index = next(i for i, (patched, _, _) in enumerate(self._patches) if patched is pipe)
        _, ours, before = self._patches.pop(index)
        for name, method in ours.items():
            # Someone else's wrapper around ours is theirs to remove; ours does nothing without an entry.
            if pipe.__dict__.get(name) is method:
                del pipe.__dict__[name]
                pipe.__dict__.update({name: before[name]} if name in before else {})

    def _begin(self, pipe: Any, arguments: dict[str, Any], result: Any) -> None:
        embeddings = result[0] if isinstance(result, (tuple, list)) else result
        texts, second = (_as_list(arguments.get(name)) for name in ("prompt", "prompt_2"))
        given = arguments.get("prompt_embeds")
        count = len(texts) if texts is not None else len(embeddings if given is None else given)
        prompts = Prompts(pipe, texts, count, embeddings.shape[1], second)
        self.call = Call(prompts, embeddings.shape[0] // count)
        self._caller, self._timestep = pipe, None
        self._guided = bool(arguments.get("do_classifier_free_guidance", True))
        try:
            for entry in self.entries:
                if entry.pipe is pipe:
                    entry.start(self.call)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        self.call = self._caller = self._timestep = None
        for entry in self.entries:
            entry.stop()

    def _before_unet(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: note the latents' size and find out which sampling step this evaluation belongs to."""
        call = self.call
        if call is None:
            return
        sample, timestep = (*args, *(kwargs[name] for name in ("sample", "timestep")[len(args) :]))[:2]
        call.latents = (sample.shape[-2], sample.shape[-1])
        if _same(timestep, self._timestep):
            return
        scheduler = self._caller.scheduler
        order = getattr(scheduler, "order", 1)
        if call.evaluation < 0:
            call.steps = -(-_remaining(scheduler.timesteps, timestep) // order)
        # Kept, so that no later timestep can have its address.
        self._timestep = timestep
        call.evaluation += 1
        call.step = call.evaluation // order

    def at(self, layer: Layer) -> tuple[Edit | None, list[Recording]]:
        """The edit at work in the layer at this step (that of the last `enable` that names it), and the recordings of
        it."""
        if self.call is None:
            return None, []
        edit = next((entry.edits[layer.name] for entry in reversed(self.entries) if layer.name in entry.edits), None)
        recordings = [entry.recordings[layer.name] for entry in self.entries if layer.name in entry.recordings]
        if (edit or recordings) and self.call.evaluation < 0:
            raise RuntimeError(
                "the UNet ran without its forward hooks, which tell the sampling step; call it as unet(...), "
                "not as unet.forward(...)"
            )
        return edit if edit is not None and edit.active() else None, recordings

    def conditional(self, rows: int) -> int:
        """The first conditional row of a UNet batch with so many rows: guidance puts the unconditional rows first.

        Raises:
            ValueError: the rows are neither one nor, with guidance, two per image.
        """
        assert self.call is not None
        samples = self.call.samples
        # Callbacks may end guidance in the middle of a call.
        guided = getattr(self._caller, "do_classifier_free_guidance", self._guided)
        if rows == 2 * samples and (guided or self._guided):
            return samples
        if rows == samples and not (guided and self._guided):
            return 0
        raise ValueError(
            f"the UNet was called with {rows} rows for {samples} images {'with' if guided else 'without'} guidance; "
            "supported are [unconditional, conditional] rows in one batch, or conditional rows alone"
        )


def _as_list(prompt: Any) -> list[str] | None:
    return [prompt] if isinstance(prompt, str) else prompt


def _same(timestep: Any, last: Any) -> bool:
    """Whether two UNet calls were given the same element of the schedule (which may hold the same value twice)."""
    if isinstance(timestep, torch.Tensor) and isinstance(last, torch.Tensor):
        return timestep.data_ptr() == last.data_ptr()
    return not isinstance(timestep, torch.Tensor) and timestep == last


def _remaining(schedule: torch.Tensor, first: Any) -> int:
    """The number of entries of the schedule from the first one used (image-to-image starts late)."""
    first = first.to(schedule.device).flatten()[0] if isinstance(first, torch.Tensor) else first
    position = (schedule == first).nonzero()
    return len(schedule) - (int(position[0]) if len(position) else 0)
