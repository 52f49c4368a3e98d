"""The engine that drives methods through the processors of one UNet, from the start of a pipeline call to its end."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._conjunction import Conjunction
from ._contexts import Contexts
from ._guidance import Evaluation, Guidance
from ._layers import Layer, attention_layers
from ._processors import NOT_HOOKED, ControlledProcessor, is_supported
from ._scheduler import SchedulerTap, check_scheduler
from ._tokens import Prompts
from ._unet_call import arguments, replaced
from .methods import ComposableDiffusion, Composition, EnergyContext, LatentGuidance
from .methods._base import Call, Editing, EditingMethod, Encode, Method, RewritesText

if TYPE_CHECKING:
    from ._capture import Capture, Recording

_KEY = "_attnctl_engine"


@dataclass(eq=False)
class Entry:
    """What one `enable` or `capture` put on a pipeline: methods and captures, each with the names of its layers, and
    what they are doing in the current call, by layer."""

    pipe: Any
    methods: list[tuple[EditingMethod, list[str]]] = field(default_factory=list)
    energy: tuple[EnergyContext, list[str]] | None = None
    composition: tuple[Composition, list[str]] | None = None
    guidances: list[tuple[LatentGuidance, list[str]]] = field(default_factory=list)
    conjunction: ComposableDiffusion | None = None
    captures: list[tuple[Capture, list[str]]] = field(default_factory=list)
    edits: dict[str, Editing] = field(default_factory=dict)
    recordings: dict[str, Recording] = field(default_factory=dict)
    guiding: list[Guidance] = field(default_factory=list)

    def edited(self) -> set[str]:
        """The layers whose attention is edited or recorded."""
        return {name for _, names in [*self.methods, *self.captures] for name in names}

    def layers(self, all_layers: Iterable[str]) -> set[str]:
        """The layers that need a processor: a moved context is read by all."""
        return set(all_layers) if self.energy or self.composition else self.edited()

    def start(self, call: Call, engine: Engine) -> None:
        self.edits = {name: edit for method, names in self.methods for edit in [method.start(call)] for name in names}
        self.recordings = {name: run for one, names in self.captures for run in [one.start(call)] for name in names}
        self.guiding = [
            Guidance(method, [engine.layers[name] for name in names], call, engine.unet)
            for method, names in self.guidances
        ]

    def stop(self) -> None:
        self.edits, self.recordings, self.guiding = {}, {}, []


class Engine:
    """All that is attached to one UNet: one processor per controlled layer, one forward hook, and wrapped methods per
    pipeline, which mark where a call begins (`encode_prompt`) and ends (`maybe_free_model_hooks`), and what the mask of
    an inpainting call is (`prepare_mask_latents`)."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.attention = attention_layers(unet)
        self.layers = {name: layer for name, layer in self.attention.items() if layer.cross}
        self.entries: list[Entry] = []
        self.processors: dict[str, ControlledProcessor] = {}
        self.call: Call | None = None
        self.contexts: Contexts | None = None
        self.conjunction: Conjunction | None = None
        self.guiding = False
        self._tap: SchedulerTap | None = None
        self._unhook: Callable[[], None]
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

    def reach(self, method: Method) -> dict[str, Layer]:
        """The layers that a method may act on: cross-attention, unless it says itself which ones it reaches."""
        reaches = getattr(method, "reaches", None)
        if reaches is None:
            return self.layers
        return {name: layer for name, layer in self.attention.items() if reaches(layer)}

    def check_processors(self, names: Iterable[str]) -> None:
        """Raise ValueError unless these layers' processors can be edited."""
        self.check_in_place()
        for name in names:
            processor = self.attention[name].module.processor
            if type(processor) is not ControlledProcessor and not is_supported(processor):
                raise ValueError(
                    f"{name} uses {type(processor).__name__}, whose attention this library cannot edit; "
                    "use diffusers' standard or IP-Adapter processors there (unet.set_default_attn_processor())"
                )

    def _replaced(self) -> list[str]:
        return [name for name, ours in self.processors.items() if self.attention[name].module.processor is not ours]

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
            self._unhook = self._hook_onto(outer)
        if all(entry.pipe is not other.pipe for other in self.entries):
            self._patch(entry.pipe)
        self.entries.append(entry)
        for name in entry.layers(self.layers) - self.processors.keys():
            module = self.attention[name].module
            self.processors[name] = ControlledProcessor(module.processor, self.attention[name], self)
            module.set_processor(self.processors[name])
        self._mark_edited()

    def _mark_edited(self) -> None:
        edited = {name for entry in self.entries for name in entry.edited()}
        for name, processor in self.processors.items():
            processor._set(edited=name in edited)

    def _hook_onto(self, outer: Any) -> Callable[[], None]:
        """Have `_before_unet` and `_after_unet` run around every evaluation of the UNet; returns what takes them off
        again."""
        before, after = (torch.compiler.disable(hook) for hook in (self._before_unet, self._after_unet))
        compiled = outer._compiled_call_impl
        if compiled is None:
            hooks = [
                outer.register_forward_pre_hook(before, with_kwargs=True),
                outer.register_forward_hook(after),
            ]

            def take_off() -> None:
                for hook in hooks:
                    hook.remove()

            return take_off
        # A UNet compiled in place (unet.compile()) traces its hooks; these run around the graph.

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = before(outer, args, kwargs) or (args, kwargs)
            output = compiled(*args, **kwargs)
            changed = after(outer, args, output)
            return output if changed is None else changed

        def remove() -> None:
            if outer._compiled_call_impl is call:
                outer._compiled_call_impl = compiled

        outer._compiled_call_impl = call
        return remove

    def remove(self, entry: Entry) -> None:
        """Take an entry off, in any order, and restore whatever no other entry needs."""
        self.entries.remove(entry)
        if entry.energy or entry.composition:
            self._stop_contexts()
        if entry.conjunction:
            self.conjunction = None
        guiding = entry.guiding
        entry.stop()
        for one in guiding:
            one.finish()
        if not any(other.guidances for other in self.entries):
            self._release_scheduler()
        replaced = self._replaced()
        needed = {name for other in self.entries for name in other.layers(self.layers)}
        for name in self.processors.keys() - needed:
            ours = self.processors.pop(name)
            if name not in replaced:
                self.attention[name].module.set_processor(ours._inner)
        if all(entry.pipe is not other.pipe for other in self.entries):
            self._unpatch(entry.pipe)
        self._mark_edited()
        if not self.entries:
            self._unhook()
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
            arguments = signature.bind(pipe, *args, **kwargs).arguments
            self._begin(pipe, arguments, result, functools.partial(_encoded, encode, signature, arguments))
            return self._rewritten(pipe, result)

        @functools.wraps(free)
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            if self._caller is pipe:
                self._end()
            return free(*args, **kwargs)

        ours: dict[str, Any] = {"encode_prompt": encode_prompt, "maybe_free_model_hooks": maybe_free_model_hooks}
        if hasattr(pipe, "prepare_mask_latents"):
            ours["prepare_mask_latents"] = self._noting_mask(pipe)
        self._patches.append((pipe, ours, {name: pipe.__dict__[name] for name in ours if name in pipe.__dict__}))
        pipe.__dict__.update(ours)

    def _noting_mask(self, pipe: Any) -> Callable[..., Any]:
        """An inpainting pipeline's `prepare_mask_latents`, noting the mask that it returns."""
        prepare = pipe.prepare_mask_latents

        @functools.wraps(prepare)
        def prepare_mask_latents(*args: Any, **kwargs: Any) -> Any:
            result = prepare(*args, **kwargs)
            if self._caller is pipe and self.call is not None:
                self.call.mask = result[0][-self.call.samples :]
            return result

        return prepare_mask_latents

    def _unpatch(self, pipe: Any) -> None:
        index = next(i for i, (patched, _, _) in enumerate(self._patches) if patched is pipe)
        _, ours, before = self._patches.pop(index)
        for name, method in ours.items():
            # Someone else's wrapper around ours is theirs to remove; ours does nothing without an entry.
            if pipe.__dict__.get(name) is method:
                del pipe.__dict__[name]
                pipe.__dict__.update({name: before[name]} if name in before else {})

    def _begin(self, pipe: Any, arguments: dict[str, Any], result: Any, encode: Encode) -> None:
        embeddings = result[0] if isinstance(result, (tuple, list)) else result
        texts, second = (_as_list(arguments.get(name)) for name in ("prompt", "prompt_2"))
        given = arguments.get("prompt_embeds")
        count = len(texts) if texts is not None else len(embeddings if given is None else given)
        prompts = Prompts(pipe, texts, count, embeddings.shape[1], second)
        self.call = Call(pipe, prompts, embeddings.shape[0] // count, encode)
        self._caller, self._timestep = pipe, None
        self._guided = bool(arguments.get("do_classifier_free_guidance", True))
        try:
            own = [entry for entry in self.entries if entry.pipe is pipe]
            for entry in own:
                entry.start(self.call, self)
            self._start_contexts(pipe, embeddings)
            self.conjunction = self._start_conjunction(own)
            if any(entry.guidances for entry in own):
                check_scheduler(pipe)
                self._tap = SchedulerTap(pipe.scheduler)
        except BaseException:
            self._end()
            raise

    def _rewritten(self, pipe: Any, result: Any) -> Any:
        """What `encode_prompt` returned, the prompts' contexts as the edits at work want them."""
        acting: dict[str, Editing] = {}
        for entry in self.entries:
            if entry.pipe is pipe:
                acting.update(entry.edits)
        rewriting = [edit for edit in dict.fromkeys(acting.values()) if isinstance(edit, RewritesText)]
        if not rewriting:
            return result
        embeddings = result if isinstance(result, Tensor) else result[0]
        for edit in rewriting:
            embeddings = edit.rewritten(embeddings)
        return embeddings if isinstance(result, Tensor) else (embeddings, *result[1:])

    def _start_contexts(self, pipe: Any, embeddings: Tensor) -> None:
        """Of nested controls the innermost context update acts, and the innermost composition."""
        assert self.call is not None
        own = [entry for entry in reversed(self.entries) if entry.pipe is pipe]
        energy = next((entry.energy for entry in own if entry.energy), None)
        composition = next((entry.composition for entry in own if entry.composition), None)
        if energy or composition:
            self.contexts = Contexts(self.call, embeddings, self.layers, energy, composition)
            for name, slot in self.contexts.slots.items():
                self.processors[name]._set(slot=slot)

    def _start_conjunction(self, entries: list[Entry]) -> Conjunction | None:
        method = next((entry.conjunction for entry in reversed(entries) if entry.conjunction), None)
        if method is None:
            return None
        if any(entry.layers(self.layers) or entry.guidances for entry in entries):
            raise ValueError(
                "ComposableDiffusion evaluates several prompts at once and does not go together with other methods or "
                "captures; leave their control first"
            )
        assert self.call is not None
        return Conjunction(method, self.call)

    def _end(self) -> None:
        self.conjunction = None
        self.call = self._caller = self._timestep = None
        self._release_scheduler()
        guiding = [one for entry in self.entries for one in entry.guiding]
        for entry in self.entries:
            entry.stop()
        self._stop_contexts()
        for one in guiding:
            one.finish()

    def _release_scheduler(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap = None

    def _stop_contexts(self) -> None:
        if self.contexts is not None:
            # They and their contexts hold each other, which would keep the memory until the garbage collector runs.
            self.contexts.slots.clear()
        self.contexts = None
        for processor in self.processors.values():
            processor._set(slot=None)

    def _before_unet(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: note the latents' size, find out which sampling step this evaluation belongs to, and guide
        the latents; returns the arguments that the UNet is to have instead."""
        call = self.call
        if call is None or self.guiding:
            return None
        names = ("sample", "timestep", "encoder_hidden_states")
        sample, timestep, text = (*args, *(kwargs.get(name) for name in names[len(args) :]))[:3]
        call.latents = (sample.shape[-2], sample.shape[-1])
        repeated = _same(timestep, self._timestep)
        if self._tap is not None and self._tap.latents is not None and not self._tap.fresh and not repeated:
            # Another pipeline's: this one scales its input before every evaluation, but ended by an exception.
            self._end()
            return None
        if not repeated:
            self._advance(call, timestep)
        if self._tap is not None:
            self._tap.fresh = False
        if self.conjunction is not None:
            given = self.conjunction.expanded(arguments(self.unet, args, kwargs))
            return replaced(self.unet, args, kwargs, given)
        changed = self._guide(len(sample), repeated, args, kwargs)
        if self.contexts is not None:
            if torch.is_grad_enabled() and getattr(self.unet, "is_gradient_checkpointing", False):
                raise ValueError(
                    "gradient checkpointing would compute layers again after their contexts have moved on; call "
                    "unet.disable_gradient_checkpointing() under EnergyContext and Composition"
                )
            self.contexts.prepare(self.conditional(len(sample)), len(sample), text)
        return changed

    def _after_unet(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: what the UNet returns instead, or None."""
        return None if self.conjunction is None else self.conjunction.merged(output)

    def _guidances(self) -> list[Guidance]:
        return [one for entry in self.entries for one in entry.guiding]

    def _advance(self, call: Call, timestep: Any) -> None:
        """To the evaluation at the next entry of the schedule."""
        scheduler = self._caller.scheduler
        order = getattr(scheduler, "order", 1)
        first = call.evaluation < 0
        if first:
            call.timesteps = scheduler.timesteps[-_remaining(scheduler.timesteps, timestep) :]
            call.steps = -(-len(call.timesteps) // order)
        # Kept, so that no later timestep can have its address.
        self._timestep = timestep
        call.evaluation += 1
        call.repeated = call.step == call.evaluation // order
        call.step = call.evaluation // order
        if first:
            for one in self._guidances():
                one.plan()

    def _guide(
        self, rows: int, moved: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The UNet's arguments with the latents that the guidances make, one after the other, or with those of this
        timestep's last call where they have `moved` already; None for no change."""
        changed = None
        for one in self._guidances():
            assert self.call is not None and self._tap is not None
            evaluation = Evaluation(self.call, self.unet, self._tap, self.conditional(rows), args, kwargs)
            latents = self._tap.guided if moved else self._moved_by(one, evaluation)
            if latents is not None:
                changed = args, kwargs = replaced(self.unet, args, kwargs, evaluation.moved_to(latents))
        return changed

    def _moved_by(self, guidance: Guidance, evaluation: Evaluation) -> Tensor | None:
        self.guiding = True
        try:
            return guidance.guide(evaluation)
        finally:
            self.guiding = False

    def at(self, layer: Layer) -> tuple[Editing | None, list[Recording]]:
        """The edit at work in the layer at this step (that of the last `enable` that names it), and the recordings of
        it."""
        if self.call is None:
            return None, []
        edit = next((entry.edits[layer.name] for entry in reversed(self.entries) if layer.name in entry.edits), None)
        recordings = [entry.recordings[layer.name] for entry in self.entries if layer.name in entry.recordings]
        if (edit or recordings) and self.call.evaluation < 0:
            raise RuntimeError(NOT_HOOKED)
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


def _encoded(
    encode: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any], texts: list[str]
) -> tuple[Tensor, Tensor | None]:
    """Contexts `[n,N,C]` of other texts, encoded as the prompts of the call were, and their pooled embeddings (SDXL).

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    given = dict(arguments)
    pipe = given.pop(next(iter(signature.parameters)))
    if getattr(pipe, "text_encoder", None) is None and getattr(pipe, "text_encoder_2", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} has no text encoder, which edit prompts need; load the pipeline with it"
        )
    for name in given:
        if "prompt" in name:
            given[name] = None
    changed = {"prompt": texts, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given.update((name, value) for name, value in changed.items() if name in signature.parameters)
    result = encode(**given)
    if not isinstance(result, (tuple, list)):
        return result, None
    return result[0], result[2] if len(result) > 2 else None


def _as_list(prompt: Any) -> list[str] | None:
    return [prompt] if isinstance(prompt, str) else prompt


def _same(timestep: Any, last: Any) -> bool:
    """Whether two UNet calls were given the same element of the schedule (which may hold the same value twice)."""
    if isinstance(timestep, torch.Tensor) and isinstance(last, torch.Tensor):
        return timestep.data_ptr() == last.data_ptr()
    return not isinstance(timestep, torch.Tensor) and timestep == last


def _remaining(schedule: torch.Tensor, first: Any) -> int:
    """The number of entries of the schedule from the first one used (image-to-image starts late)."""
    if isinstance(first, torch.Tensor) and first.device == schedule.device and first.dtype == schedule.dtype:
        # The element itself, for a schedule may hold the same value twice.
        place, odd = divmod(first.data_ptr() - schedule.data_ptr(), schedule.element_size())
        if not odd and 0 <= place < len(schedule):
            return len(schedule) - place
    first = first.to(schedule.device).flatten()[0] if isinstance(first, torch.Tensor) else first
    position = (schedule == first).nonzero()
    return len(schedule) - (int(position[0]) if len(position) else 0)
