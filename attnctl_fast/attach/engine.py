"""The controls on one model, and what they do from the start of a pipeline call to its end."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .beside import Beside, running
from .call import Call, Encoded, Site
from .evaluation import Evaluation
from .families import Family, family_of, listed_pictures, padded_texts, stacked_pictures
from .intercept import Acts, Place, check_processor, check_uncached, installed
from .layers import Layer, choose
from .patching import Patch
from .prompts import Prompts
from .protocol import Method, Run, defines
from .rows import Rows, conditional_rows
from .scheduler import SchedulerTap


@dataclass(eq=False)
class Entry:
    """The methods that one `enable` or `capture` put on a pipeline, each with the names of its layers."""

    pipe: weakref.ref[Any]
    methods: list[tuple[Method, list[str]]]
    warned: bool = False


class Engine:
    """All that is attached to one model.

    entries: the controls, outer ones first. layers: the model's attention layers by name, in order of execution.
    """

    def __init__(self, family: Family, model: Any) -> None:
        self.family = family
        self._model = weakref.ref(model)
        self.layers = family.layers(model)
        self.entries: list[Entry] = []
        self._denoisers: list[Patch] = []
        # One evaluation at a time: what acts on a layer is written on the layer.
        self._lock = threading.RLock()
        self._evaluating = False
        # Under way, inner ones last.
        self.calls: list[PipelineCall] = []

    @property
    def model(self) -> Any:
        return self._model()

    def check(self, pipe: Any, methods: list[Method]) -> list[tuple[Method, list[str]]]:
        """Return the layers that each method acts on.

        Raises:
            ValueError: the methods do not go together, or one cannot act on these layers or this pipeline.
        """
        chosen: list[tuple[Method, list[str]]] = []
        edited: set[str] = set()
        self._check_whole(pipe)
        for method in methods:
            name = type(method).__name__
            if type(method).start is Method.start:
                raise ValueError(f"{name} has no start(call, sites); give it one that returns a Run")
            if method.alone and len(methods) > 1:
                raise ValueError(f"{name} does not go together with other methods; pass it alone")
            if method.single and sum(type(other) is type(method) for other in methods) > 1:
                raise ValueError(f"two of the methods are {name}; pass one, which can do what both do")
            within = self.within(method)
            names = list(method.default_layers(within) if method.layers is None else choose(within, method.layers))
            if method.edits_attention:
                if shared := edited.intersection(names):
                    listed = ", ".join(sorted(shared))
                    raise ValueError(f"two of the methods edit {listed}; give them different layers")
                edited.update(names)
            if hasattr(pipe, "set_pag_applied_layers") and any(self.layers[one].text for one in names):
                raise ValueError(
                    f"{type(pipe).__name__} perturbs joint attention, where {name} would act; use the pipeline without "
                    "perturbed attention guidance"
                )
            method.check(pipe, [self.layers[one] for one in names])
            if method.sends_text and any(self.layers[one].text for one in names):
                check_uncached(self.model, name)
            if not method.alone:
                for one in within if method.everywhere else names:
                    check_processor(self.layers[one])
            chosen.append((method, names))
        _check_texts(methods)
        return chosen

    def _check_whole(self, pipe: Any) -> None:
        if getattr(self.model, "_parallel_config", None) is not None:
            raise ValueError(
                f"the {self.family.component} of {type(pipe).__name__} is spread over several processes, each of which "
                "attends with a part of the tokens or heads; load it without parallel_config and enable_parallelism"
            )

    def within(self, method: Method) -> dict[str, Layer]:
        """Return the layers that a method may act on."""
        return {name: layer for name, layer in self.layers.items() if method.reaches(layer)}

    def add(self, pipe: Any, methods: list[tuple[Method, list[str]]]) -> Entry:
        entry = Entry(weakref.ref(pipe), methods)
        self.entries.append(entry)
        _engines[self.model] = weakref.ref(self)
        _watch(pipe, self)
        self.cover(getattr(pipe, self.family.component))
        return entry

    def remove(self, entry: Entry) -> None:
        self.entries.remove(entry)
        pipe = entry.pipe()
        if pipe is not None and not any(other.pipe() is pipe for other in self.entries):
            _unwatch(pipe, self)
        if not self.entries:
            for patch in self._denoisers:
                patch.undo()
            self._denoisers.clear()
            _engines.pop(self.model, None)
        for call in list(self.calls):
            call.drop(entry)

    def cover(self, outer: Any) -> None:
        """Have every evaluation of the model pass through `evaluate`: of `outer`, the model or its compiled form."""
        name = "forward" if outer._compiled_call_impl is None else "_compiled_call_impl"
        if not any(patch.owner is outer and patch.name == name and patch.stands() for patch in self._denoisers):
            self._denoisers.append(Patch(outer, name, self.evaluate))

    # Calls

    @contextmanager
    def calling(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Run one call of the pipeline, with these arguments, under control, whatever ends it."""
        if self.family.model_of(pipe) is not self.model:
            raise RuntimeError(
                f"pipe.{self.family.component} was replaced while control was on; leave control, then enter it again"
            )
        self._check_whole(pipe)
        self.cover(getattr(pipe, self.family.component))
        current = self._current()
        if current is not None and current.pipe is pipe and current.public is None:
            # A class's call within its subclass's.
            yield
            return
        call = PipelineCall(self, pipe)
        if self.family.lists:
            given = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs).arguments
            call.images = int(given.get(self.family.lists) or 1)
        try:
            call.listen()
            yield
        finally:
            call.end()

    def begin(self, pipe: Any, prompts: Prompts, texts: Tensor, others: Tensor | None) -> tuple[PipelineCall, Tensor]:
        """Begin a call of which the user tells the prompt, until `PipelineCall.end`; returns the contexts to use."""
        call = PipelineCall(self, pipe, told=True)
        call.guided = others is not None
        arguments: dict[str, Any] = {"device": texts.device}
        if self.family.beside:
            # Of a second text, which has as many columns as the prompt.
            arguments["max_sequence_length"] = texts.shape[1] - prompts.segments[-1].start
        return call, call.start(prompts, texts, [] if others is None else [others], arguments)

    def _current(self) -> PipelineCall | None:
        """Return the innermost call of this thread, but a told one for a pipeline that does not say its prompt."""
        calls = [call for call in self.calls if call.thread == threading.get_ident()]
        if not calls or calls[-1].public is not None:
            return calls[-1] if calls else None
        told = [call for call in calls if call.told and call.pipe is calls[-1].pipe]
        return told[-1] if told else calls[-1]

    def evaluate(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model as the call under way wants it."""
        with self._lock:
            if self._evaluating:
                # A pass of latent guidance, or the model within its compiled form.
                return patch.inner(*args, **kwargs)
            call = self._current()
            owner = _calling_pipeline(None if call is None else call.pipe)
            if call is not None and owner is not None and owner is not call.pipe:
                # Another pipeline, called by a callback of this one.
                return patch.inner(*args, **kwargs)
            if call is None or call.public is None:
                self._warn(call, owner)
                return patch.inner(*args, **kwargs)
            self._evaluating = True
            try:
                return call.evaluate(patch.inner, args, kwargs)
            finally:
                self._evaluating = False

    def _warn(self, call: PipelineCall | None, owner: Any) -> None:
        """Say once per control that the model runs without it: nobody told it the prompt."""
        pipe = owner if call is None else call.pipe
        for entry in self.entries:
            if not entry.warned and (pipe is None or entry.pipe() is pipe):
                entry.warned = True
                who = (
                    "the model was called directly"
                    if call is None
                    else f"{type(pipe).__name__} did not use encode_prompt"
                )
                names = ", ".join(type(method).__name__ for method, _ in entry.methods)
                warnings.warn(
                    f"{who}, so the prompt is unknown and {names} does nothing; tell it by the control's handle:"
                    " handle.begin(prompt_embeds=..., prompt=...)",
                    RuntimeWarning,
                    stacklevel=5,
                )


class PipelineCall:
    """One call of a pipeline, from its prompts to its end.

    told: it is the user's own loop. public: what methods see of it; None while the prompt is unknown. guided: whether
    the prompt is combined with a negative one. images: how many pictures of a prompt follow each of its contexts.
    """

    def __init__(self, engine: Engine, pipe: Any, *, told: bool = False) -> None:
        self.engine, self.pipe, self.told = engine, pipe, told
        self.thread = threading.get_ident()
        self.public: Call | None = None
        self.guided, self.images = True, 1
        self._runs: list[tuple[Entry, Method, Run, list[Site]]] = []
        self._texts: list[Tensor] = []
        self._others: list[Tensor] = []
        self._patches: list[Patch] = []
        self._tap: SchedulerTap | None = None
        self._timestep: Any = None
        self._stepped, self._own_times = 0, False
        self._size: tuple[Any, tuple[int, int]] | None = None
        self._known: list[tuple[Tensor, int, Rows]] = []
        self._listed: list[tuple[list[Tensor], list[int], Tensor]] = []
        self._replayed: tuple[Tensor, Tensor] | None = None
        self._places: dict[str, Place] = {}
        self._acting: Any = None
        self._compiles: bool | None = None
        engine.calls.append(self)

    def listen(self) -> None:
        """Listen to what the pipeline encodes and to the mask that it makes, until the call ends."""
        for name, listener in (("encode_prompt", self._encoding), ("prepare_mask_latents", self._masking)):
            if hasattr(self.pipe, name):
                self._patches.append(Patch(self.pipe, name, listener))

    def _encoding(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        # The class's own: a wrapper on the instance may hide the parameters.
        signature = inspect.signature(type(self.pipe).encode_prompt)
        arguments = signature.bind(self.pipe, *args, **kwargs).arguments
        # Z-Image writes into the list of prompts.
        arguments = {name: list(x) if isinstance(x, list) else x for name, x in arguments.items()}
        result = patch.inner(*args, **kwargs)
        first, *rest = self._tensors(result)
        # Contexts of the negative prompt, among masks, pooled embeddings and positions.
        rest = [x for x in rest if isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == first.shape[2]]
        if self.public is not None:
            # Before the first step a pipeline may encode its negative prompt by itself; later a callback changes both.
            (self._others if self.public.evaluation < 0 else self._texts).append(first)
            self._others.extend(rest)
            self._known.clear()
            return result
        self.guided = bool(arguments.get("do_classifier_free_guidance", True))
        texts = _as_list(arguments.get("prompt"))
        given = arguments.get("prompt_embeds")
        count = len(texts) if texts is not None else len(first if given is None else given)
        segments = self.engine.family.segments(self.pipe, arguments, first.shape[1])
        prompts = Prompts(segments, count, first.shape[1])
        embeddings: Any = self.start(prompts, first, rest, arguments)
        if self.engine.family.lists:
            embeddings = embeddings[:: self.images]
            embeddings = [text[: len(own)] for text, own in zip(embeddings, result[0], strict=True)]
        return embeddings if isinstance(result, Tensor) else (embeddings, *result[1:])

    def _tensors(self, encoded: Any) -> list[Any]:
        """Return what `encode_prompt` returned, lists of texts as tensors with a row for every picture."""
        found = [encoded] if isinstance(encoded, Tensor) else list(encoded)
        if self.engine.family.lists:
            found = [padded_texts(x).repeat_interleave(self.images, 0) for x in found if x]
        return found

    def _masking(self, patch: Patch, *args: Any, **kwargs: Any) -> Any:
        result = patch.inner(*args, **kwargs)
        if self.public is not None and self.public.mask is None:
            self.public.mask = result[0][-self.public.samples :]
        return result

    def _encode(self, arguments: dict[str, Any], texts: list[str]) -> Encoded:
        """Encode other texts as with `arguments`.

        Raises:
            ValueError: the pipeline cannot encode them.
        """
        pipe, name = self.pipe, type(self.pipe).__name__
        if not hasattr(pipe, "encode_prompt"):
            raise ValueError(f"{name} has no encode_prompt, which encodes edit prompts; use methods without them")
        if getattr(pipe, "text_encoder", None) is None and getattr(pipe, "text_encoder_2", None) is None:
            raise ValueError(f"{name} has no text encoder, which edit prompts need; load the pipeline with it")
        own, *parameters = (signature := inspect.signature(type(pipe).encode_prompt).parameters)
        given: dict[str, Any] = {key: None for key in parameters if signature[key].default is inspect.Parameter.empty}
        given |= {key: None if "prompt" in key else value for key, value in arguments.items() if key != own}
        changed = {"prompt": list(texts), "do_classifier_free_guidance": False}
        changed |= {"num_images_per_prompt": 1, "num_videos_per_prompt": 1}
        given.update((key, value) for key, value in changed.items() if key in parameters)
        # Past the listener.
        encode = next((patch.inner for patch in self._patches if patch.name == "encode_prompt"), pipe.encode_prompt)
        result = encode(**given)
        contexts, *rest = [result] if isinstance(result, Tensor) else result
        if self.engine.family.lists:
            contexts, rest = padded_texts(contexts), []
        more = self.engine.family.more(rest, lambda **changed: encode(**given | changed))
        flat = [x for x in rest if isinstance(x, Tensor) and x.ndim == 2 and len(x) == len(contexts)]
        masks = [x for x in flat if x.shape == contexts.shape[:2] and not x.is_floating_point()]
        pooled = [x for x in flat if x.is_floating_point()]
        return Encoded(contexts, next(iter(pooled), None), None if more else next(iter(masks), None), more)

    def start(self, prompts: Prompts, texts: Tensor, others: list[Tensor], arguments: dict[str, Any]) -> Tensor:
        """Begin the methods' runs; returns the contexts of the prompts as they want them.

        Args:
            prompts: the prompts.
            texts: their contexts, `[samples,N,C]`.
            others: those of negative prompts.
            arguments: of `encode_prompt`, for other texts.

        Raises:
            ValueError: the prompts do not fit a method.
        """
        images = len(texts) // prompts.count
        self.public = call = Call(self.pipe, prompts, images, functools.partial(self._encode, arguments))
        try:
            self._start(call)
            changed = texts
            for _, _, run, _ in self._runs:
                changed = run.encoded(changed)
            self._tap = SchedulerTap()
            self._tap.put_on(self.pipe.scheduler)
        except BaseException:
            self.end()
            raise
        self._texts, self._others = [changed] if changed is texts else [changed, texts], others
        return changed

    def _start(self, call: Call) -> None:
        engine = self.engine
        methods = [
            (entry, method, names)
            for entry in engine.entries
            if entry.pipe() is self.pipe
            for method, names in entry.methods
        ]
        last = {type(method): index for index, (_, method, _) in enumerate(methods)}
        if engine.family.beside:
            _check_texts([method for index, (_, method, _) in enumerate(methods) if last[type(method)] == index])
        for index, (entry, method, names) in enumerate(methods):
            if method.alone and len(methods) > 1:
                raise ValueError(
                    f"{type(method).__name__} evaluates several prompts at once and does not go together with other "
                    "methods or captures; leave their control first"
                )
            if method.single and last[type(method)] != index:
                continue
            within = engine.within(method) if method.everywhere else names
            sites = [Site(engine.layers[name], chosen=name in names) for name in within]
            self._runs.append((entry, method, method.start(call, sites), sites))

    def drop(self, entry: Entry) -> None:
        """End the runs of a control that is taken off."""
        ended = [run for owner, _, run, _ in self._runs if owner is entry]
        self._runs = [row for row in self._runs if row[0] is not entry]
        self._acting = None
        _end_all(ended)

    def end(self) -> None:
        """End all runs, and leave the pipeline and its scheduler as they were; a second call does nothing."""
        runs, self._runs = [run for _, _, run, _ in self._runs], []
        for patch in self._patches:
            patch.undo()
        if self._tap is not None:
            self._tap.remove()
        if self in self.engine.calls:
            self.engine.calls.remove(self)
        # Runs and the call know each other: without this, their memory would wait for the garbage collector.
        self.public = self._timestep = self._tap = self._replayed = self._acting = self._size = None
        self._patches, self._texts, self._others, self._places = [], [], [], {}
        self._known.clear()
        self._listed.clear()
        _end_all(runs)

    # Evaluations

    def evaluate(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine, call, tap = self.engine, self.public, self._tap
        assert call is not None and tap is not None
        family = engine.family
        given = self._given(args, kwargs)
        if family.lists:
            model = functools.partial(_stacked, model)
        sample = given[family.sample]
        call.latents, call.frames = self._latents(given), family.frames(given)
        rows = self._rows(given[family.text])
        timestep = given[family.timestep]
        stepped, self._stepped = tap.steps != self._stepped, tap.steps
        # Timesteps of a model's own may be equal by rounding; a step of the scheduler's tells them apart.
        new = stepped and self._own_times
        if new or not _same(timestep, self._timestep, self.pipe.scheduler.timesteps):
            self._advance(call, timestep)
        elif rows.conditional:
            call.view += 1
        evaluation = Evaluation(call, family, engine.model, rows, tap, args, given)
        if rows.conditional and rows.others and any(run.apart() for _, _, run, _ in self._runs):
            apart, rest = (self._denoise(model, part, sample) for part in evaluation.parts())
            output = _changed(apart, lambda x: evaluation.joined(x, _prediction(rest)))
        else:
            output = self._denoise(model, evaluation, sample)
        return _changed(output, listed_pictures) if family.lists else output

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's arguments by name, as tensors; texts in lists are padded once."""
        family = self.engine.family
        given = family.arguments(self.engine.model, args, kwargs)
        if not family.lists:
            return given
        texts = list(given[family.text])
        versions = [_version(text) for text in texts]
        for known, its_versions, padded in self._listed:
            same = len(known) == len(texts) and all(a is b for a, b in zip(known, texts, strict=True))
            if same and its_versions == versions:
                return family.tensors(given, padded)
        padded = padded_texts(texts)
        # With unconditional rows and without.
        self._listed = [(texts, versions, padded), *self._listed[:1]]
        return family.tensors(given, padded)

    def _denoise(self, model: Callable[..., Any], evaluation: Evaluation, sample: Tensor) -> Any:
        """Return what the model predicts in one evaluation, of the pipeline's `sample` or of some of its rows."""
        engine, call, tap = self.engine, self.public, self._tap
        assert call is not None and tap is not None
        given = evaluation.sample
        evaluation.compiled = self._compiled()
        if tap.moved is not None and self._replayed is not None and self._replayed[0] is sample:
            # Not stepped since: the pipeline evaluates the model twice on the same latents.
            evaluation.replay(self._replayed[1])
            evaluation.moved = True
        for _, _, run, sites in self._runs:
            for site in sites:
                site.grid, site.frames = site.layer.grid(call.latents), call.frames
            run.before_denoiser(evaluation)
        if tap.moved is not None and not evaluation.moved and evaluation.sample is not given:
            self._replayed = sample, evaluation.latents
        places = self._acting_places(call, evaluation.rows, evaluation)
        beside = self._put_beside(places, evaluation)

        def evaluate() -> Any:
            if places and torch.is_grad_enabled() and getattr(engine.model, "is_gradient_checkpointing", False):
                raise ValueError(
                    "gradient checkpointing would compute layers again without what acts on them now; call "
                    f"{engine.family.component}.disable_gradient_checkpointing() under control"
                )
            args, kwargs = evaluation.arguments()
            if not places:
                return model(*args, **kwargs)
            with ExitStack() as stack:
                stack.enter_context(installed(places, compiled=evaluation.compiled))
                if beside is not None:
                    stack.enter_context(running(engine.model, beside))
                return model(*args, **kwargs)

        for _, _, run, _ in self._runs:
            if defines(run, "denoise"):
                evaluate = functools.partial(run.denoise, evaluation, evaluate)
        output = evaluate()
        for _, _, run, _ in self._runs:
            if defines(run, "after_denoiser"):
                output = _changed(output, run.after_denoiser)
        return output

    def _put_beside(self, places: list[Place], evaluation: Evaluation) -> Beside | None:
        """Give the model the text that a run sends through it, and every layer what it needs of it.

        Returns the second text beside the prompts, where there is one.
        """
        acting = [run for _, _, run, _ in self._runs if run.active] if evaluation.rows.conditional else []
        second = next((run.beside for run in acting if run.beside is not None), None)
        more = next((run.more_text for run in acting if run.more_text is not None), None)
        beside = longer = None
        if second is not None or more is not None:
            check_uncached(self.engine.model, "a text beside the prompt's")
            family, order = self.engine.family, next(place.layer.text for place in places if place.layer.text)
            if second is not None:
                beside = Beside(evaluation.rows, evaluation.columns, order, stacked=family.beside == "rows")
                evaluation.given = beside.added(evaluation.given, family.text, second)
            if more is not None:
                longer = Beside(evaluation.rows, more.shape[1], order, stacked=False)
                evaluation.given = longer.lengthened(evaluation.given, family.text, more)
        for place in places:
            place.beside, place.longer = (beside, longer) if place.layer.text else (None, None)
        return beside

    def _latents(self, given: dict[str, Any]) -> tuple[int, int]:
        """Return (height, width) of the latents; positions are read once for every tensor of them."""
        family = self.engine.family
        positions = given.get(family.positions)
        if not isinstance(positions, Tensor):
            return family.latents(given)
        if self._size is None or self._size[0] is not positions:
            self._size = positions, family.latents(given)
        return self._size[1]

    def _compiled(self) -> bool:
        """Return whether any part of the model is compiled; looked at once a call."""
        if self._compiles is None:
            model = self.engine.model
            outer = getattr(self.pipe, self.engine.family.component)
            self._compiles = outer is not model or any(one._compiled_call_impl is not None for one in model.modules())
        return self._compiles

    def _rows(self, text: Tensor) -> Rows:
        """Return which rows of the evaluation are conditional; compared once for every tensor of contexts."""
        call = self.public
        assert call is not None
        version = _version(text)
        for known, its_version, rows in self._known:
            if known is text and its_version == version:
                return rows
        if any(text is other for other in self._others):
            # Evaluated by itself, whatever it says.
            return Rows(len(text), (), ())
        guided = self.guided and (self.told or bool(getattr(self.pipe, "do_classifier_free_guidance", True)))
        rows = conditional_rows(
            text,
            self._texts,
            self._others,
            call.samples,
            call.images,
            guided=guided,
            told=self.told,
            first=self.engine.family.conditional_first,
        )
        # Conditional and unconditional ones in turn, or a new tensor at every step.
        self._known = [(text, version, rows), *self._known[:1]]
        return rows

    def _advance(self, call: Call, timestep: Any) -> None:
        """Go to the evaluation at the next entry of the schedule."""
        scheduler = self.pipe.scheduler
        order = getattr(scheduler, "order", 1)
        if call.evaluation < 0:
            # The pipeline's own count, where it leaves out the schedule's end (denoising_end).
            counted = 0 if self.told else getattr(self.pipe, "_num_timesteps", 0)
            call._remaining = _remaining(scheduler.timesteps, timestep)
            if not call._remaining:
                self._own_times, call._remaining = True, counted or len(scheduler.timesteps)
            call.steps = -(-(counted if 0 < counted < call._remaining else call._remaining) // order)
        # Kept, so that no later timestep can have its address.
        self._timestep = timestep
        call.evaluation += 1
        call.view = 0
        call.repeated = call.step == call.evaluation // order
        call.step = call.evaluation // order

    def _acting_places(self, call: Call, rows: Rows, evaluation: Evaluation) -> list[Place]:
        """Return the layers on which anything acts in this call, with what does now."""
        key = tuple((run, run.active, run.used) for _, _, run, _ in self._runs)
        if key != self._acting:
            self._acting = key
            self._arrange()
        places = list(self._places.values())
        joint = rows.conditional and any(place.layer.text for place in places)
        text = evaluation.columns if joint else evaluation.text.shape[1]
        skipping = bool(getattr(self.engine.model, "is_cache_enabled", False))
        for place in places:
            place.rows, place.skipping = rows, skipping
            place.tokens = text, math.prod((*call.frames, *place.layer.grid(call.latents)))
        return places

    def _arrange(self) -> None:
        self._places = {}
        by_layer: dict[str, list[tuple[Method, Run, Site]]] = {}
        for _, method, run, sites in self._runs:
            for site in sites if run.used else ():
                by_layer.setdefault(site.name, []).append((method, run, site))
        for name, acting in by_layer.items():
            place = Place(self.engine.layers[name])
            place.ever = _acts(acting)
            place.now = _acts([one for one in acting if one[1].active])
            if place.ever != Acts():
                self._places[name] = place


def _acts(acting: list[tuple[Method, Run, Site]]) -> Acts:
    """Return what acts on a layer."""
    hooks = {
        hook: tuple((run, site) for _, run, site in acting if defines(run, hook))
        for hook in ("keys", "edit", "context", "more_context", "attend", "sequence")
    }
    return Acts(
        hooks["keys"],
        # Of several the innermost control's.
        hooks["edit"][-1] if hooks["edit"] else None,
        hooks["context"],
        hooks["more_context"],
        # Whatever their order: what comes of a moved context before what mixes it with others.
        tuple(sorted(hooks["attend"], key=lambda pair: not defines(pair[0], "context"))),
        hooks["sequence"][-1] if hooks["sequence"] else None,
    )


# Models, pipelines and their classes

# Weak in their values too: an engine knows its model and its pipelines.
_engines: weakref.WeakKeyDictionary[Any, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_pipelines: weakref.WeakKeyDictionary[Any, weakref.ref[Engine]] = weakref.WeakKeyDictionary()
_classes: dict[type, Patch] = {}


def engine_of(pipe: Any) -> Engine:
    """Return the engine of the pipeline's model: the one attached to it, or a new one.

    Raises:
        ValueError: the pipeline has no model that methods attach to.
    """
    family = family_of(pipe)
    model = family.model_of(pipe)
    known = _engines.get(model)
    return (None if known is None else known()) or Engine(family, model)


def _watch(pipe: Any, engine: Engine) -> None:
    """Have calls of the pipeline begin and end under control.

    On its class, for Python looks a call up there; other pipelines of the class pass through.
    """
    if pipe not in _pipelines:
        weakref.finalize(pipe, _release_classes)
    _pipelines[pipe] = weakref.ref(engine)
    if type(pipe) not in _classes and any("__call__" in vars(kind) for kind in type(pipe).__mro__):
        _classes[type(pipe)] = Patch(type(pipe), "__call__", _controlled)


def _controlled(patch: Patch, pipe: Any, *args: Any, **kwargs: Any) -> Any:
    known = _pipelines.get(pipe)
    engine = None if known is None else known()
    if engine is None:
        return patch.inner(pipe, *args, **kwargs)
    with engine.calling(pipe, args, kwargs):
        return patch.inner(pipe, *args, **kwargs)


def _unwatch(pipe: Any, engine: Engine) -> None:
    known = _pipelines.get(pipe)
    if known is not None and known() is engine:
        del _pipelines[pipe]
    _release_classes()


def _release_classes() -> None:
    for kind in [kind for kind in _classes if not any(type(pipe) is kind for pipe in _pipelines)]:
        _classes.pop(kind).undo()


def _calling_pipeline(pipe: Any) -> Any:
    """Return the pipeline in whose method the model is being called, `pipe` or one of diffusers; None in other code."""
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames[:1] else None
        if owner is not None and (owner is pipe or isinstance(owner, DiffusionPipeline)):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _stacked(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a model that returns a list of pictures, and return them as a tensor."""
    return _changed(model(*args, **kwargs), stacked_pictures)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _prediction(output: Any) -> Tensor:
    """Return what a model predicts, of its output."""
    prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return prediction


def _check_texts(methods: list[Method]) -> None:
    """Raise ValueError where several methods would send a text of their own through a joint model."""
    names = [type(method).__name__ for method in methods if method.sends_text]
    if len(names) > 1:
        raise ValueError(
            f"{' and '.join(names)} both send a text of their own through the model; use one of them in a call"
        )


def _changed(output: Any, change: Callable[[Any], Any]) -> Any:
    """Return a model's output with its prediction changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.sample = change(output.sample)
    return output


def _end_all(runs: list[Run]) -> None:
    """End runs, each whatever the others raise."""
    with ExitStack() as stack:
        for run in reversed(runs):
            stack.callback(run.end)


def _as_list(prompt: Any) -> list[str] | None:
    return [prompt] if isinstance(prompt, str) else prompt


def _same(timestep: Any, last: Any, schedule: Tensor) -> bool:
    """Return whether two evaluations are at the same element of the schedule (which may hold the same value twice)."""
    if not isinstance(timestep, Tensor) or not isinstance(last, Tensor):
        return not isinstance(timestep, Tensor) and not isinstance(last, Tensor) and bool(timestep == last)
    places = [_place(one, schedule) for one in (timestep, last)]
    if None not in places:
        return places[0] == places[1]
    return bool(timestep.flatten()[0] == last.to(timestep.device).flatten()[0])


def _place(timestep: Tensor, schedule: Tensor) -> int | None:
    """Return the index of an element of the schedule, by where it lies in memory."""
    if timestep.device != schedule.device or timestep.dtype != schedule.dtype:
        return None
    place, odd = divmod(timestep.data_ptr() - schedule.data_ptr(), schedule.element_size())
    return place if not odd and 0 <= place < len(schedule) else None


def _remaining(schedule: Tensor, first: Any) -> int:
    """Return the number of entries of the schedule from the first one used (image-to-image starts late).

    0 where that is none of them.
    """
    if isinstance(first, Tensor):
        if (place := _place(first, schedule)) is not None:
            return len(schedule) - place
        first = first.to(schedule.device).flatten()[0]
    position = (schedule == first).nonzero()
    return len(schedule) - int(position[0]) if len(position) else 0
