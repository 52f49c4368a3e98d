"""The attention call of a layer, handed to methods while the model runs.

In eager code `F.scaled_dot_product_attention` looks at a thread's handler. Where torch.compile traces, a function mode
does the same and is gone from the graph; it also serves the eager rest of a model that is compiled in part, for Dynamo
remembers what it finds under the function's name.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import Attention, key_bias_of, plain
from .beside import Beside
from .call import Site
from .layers import Layer
from .protocol import Edited, Run
from .rows import Rows

_ABSENT = object()
_BUILTIN = torch._C._nn.scaled_dot_product_attention
_ATTENDS = {"scaled_dot_product_attention", "dispatch_attention_fn"}
_REMEDY = (
    "let the layer attend by torch.nn.functional.scaled_dot_product_attention: "
    "unet.set_attn_processor(AttnProcessor2_0()), a transformer's own default processors, and no attention slicing, "
    "xFormers or attention kernels of the hub"
)


class Acts(NamedTuple):
    """The runs that act on a layer, each with its site.

    One edits its attention, others change its keys before, move its context, add contexts, or attend after the edit.
    One attends in a sequence with a text of its own.
    """

    keys: tuple[tuple[Run, Site], ...] = ()
    edit: tuple[Run, Site] | None = None
    contexts: tuple[tuple[Run, Site], ...] = ()
    more: tuple[tuple[Run, Site], ...] = ()
    attend: tuple[tuple[Run, Site], ...] = ()
    sequence: tuple[Run, Site] | None = None

    @property
    def attends(self) -> bool:
        return self.edit is not None or self.sequence is not None or bool(self.attend or self.keys)


class Place:
    """A layer while the model runs: what acts on it, and on which rows.

    now: at this evaluation. ever: at any of the call, which is what compiled code runs. tokens: how many the text and
    the image have, for joint attention. beside: the second texts that run through the model, where there are any.
    longer: the text that a run has put into the sequence, likewise. skipping: a cache of diffusers
    may leave its attention out.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.rows: Rows
        self.tokens = 0, 0
        self.beside: Beside | None = None
        self.longer: Beside | None = None
        self.now = self.ever = Acts()
        self.compiled = self.skipping = False
        self._inner: Callable[..., Any]
        self._bound = False
        self._before: Any = None
        self._wants_images = False
        self._backend: tuple[Any, Any] | None = None

    def install(self) -> None:
        own = self.layer.module.__dict__
        self._before = own.get("forward")
        self._bound = self._before is not None
        self._inner = self._before if self._bound else type(self.layer.module).forward
        processor = self.layer.module.processor
        self._wants_images = "ip_adapter_masks" in _keywords(type(processor).__call__) and not self.layer.text
        if hasattr(processor, "_attention_backend"):
            # Of diffusers' ways to attend only this one makes the call.
            self._backend = processor, vars(processor).get("_attention_backend", _ABSENT)
            processor._attention_backend = _native()
        # A bound method of one function: torch.compile would take any other object for another layer.
        own["forward"], own["_attnctl_place"] = MethodType(_forward, self.layer.module), self

    def uninstall(self) -> None:
        own = self.layer.module.__dict__
        del own["forward"], own["_attnctl_place"]
        if self._bound:
            own["forward"] = self._before
        if self._backend is not None:
            processor, before = self._backend
            if before is _ABSENT:
                del processor._attention_backend
            else:
                processor._attention_backend = before
            self._backend = None

    def run(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer's own forward."""
        return self._inner(*args, **kwargs) if self._bound else self._inner(module, *args, **kwargs)

    def read(self, acts: Acts, given: Any) -> tuple[Any, int, bool]:
        """Return the layer's `encoder_hidden_states` as methods make it of `given`.

        Also return how many of its tokens are the prompt's, and whether those were moved.
        """
        text, images = given if isinstance(given, tuple) else (given, None)
        if images is None and self._wants_images:
            raise ValueError(
                f"{self.layer.name} has an IP-Adapter but was given text and image embeddings in one tensor; "
                "pass the images as added_cond_kwargs={'image_embeds': ...}, as the pipelines do"
            )
        context = text
        for run, site in acts.contexts:
            context = run.context(site, context)
        tokens = stop = context.shape[1]
        pieces = [context]
        for run, site in acts.more:
            added = run.more_context(site, text, context)
            start, stop = stop, stop + (0 if added is None else added.shape[1])
            site.columns = start, stop
            if added is not None:
                pieces.append(added.to(context.dtype))
        whole = context if len(pieces) == 1 else torch.cat(pieces, 1)
        return (whole if images is None else (whole, images)), tokens, context is not text

    def attend(
        self,
        acts: Acts,
        tokens: int | None,
        moved: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return what the attention call is to return.

        Args:
            acts: what acts on it.
            tokens: of the prompt's context; None for all columns.
            moved: whether that context was moved.
            query: as `scaled_dot_product_attention` takes it.
            key: as `scaled_dot_product_attention` takes it.
            value: as `scaled_dot_product_attention` takes it.
            attn_mask: as `scaled_dot_product_attention` takes it.
            dropout_p: as `scaled_dot_product_attention` takes it.
            is_causal: as `scaled_dot_product_attention` takes it.
            scale: as `scaled_dot_product_attention` takes it.
            enable_gqa: as `scaled_dot_product_attention` takes it.
        """
        if dropout_p or is_causal:
            raise ValueError(
                f"{self.layer.name} attends with dropout or causally, which methods cannot act on; call model.eval(), "
                "or leave this layer out"
            )
        scaled = query.shape[-1] ** -0.5 if scale is None else scale
        rows = self.rows.first(len(query))
        if self.layer.text and self.beside is not None:
            return self._attend_beside(acts, self.beside, query, key, value, scaled)
        if self.layer.text and self.longer is not None:
            return self._attend_longer(acts, self.longer, query, key, value, scaled)
        if self.layer.text:
            return self._attend_jointly(acts, rows, query, key, value, attn_mask, scaled)
        columns = key.shape[2]
        tokens = columns if tokens is None else tokens
        bias = key_bias_of(attn_mask, len(query), tokens, self.layer.name)
        attention = Attention(
            query, key, value, bias, scaled, rows, module=self.layer.module, tokens=tokens, moved=moved
        )
        _act(acts, attention)
        if attention.untouched and columns == tokens:
            return _real(query, key, value, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa)
        return attention.out.to(query.dtype)

    def _attend_beside(
        self, acts: Acts, beside: Beside, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Return joint attention of two texts and one image: each text's rows see that text and the image."""
        (query, side), (key, side_key), (value, side_value) = (beside.parted(x, 2) for x in (query, key, value))
        seconds = side_key, side_value
        out = self._attend_jointly(acts, beside.rows, query, key, value, None, scale, seconds)
        image = slice(self.tokens[0], None) if beside.first else slice(0, self.tokens[1])
        k, v = (
            torch.cat([beside.rows.take(second), beside.rows.take(whole)[:, :, image]], 2)
            for second, whole in ((side_key, key), (side_value, value))
        )
        own = plain(beside.rows.take(side), k, v, None, scale)
        return beside.joined(out, beside.spread(own.to(out.dtype)), 2)

    def _attend_longer(
        self, acts: Acts, longer: Beside, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Return joint attention of a sequence with a text that only the run sees which put it there."""
        assert acts.sequence is not None
        rows, (run, site) = longer.rows, acts.sequence
        q, k, v = (longer.parted(x, 2)[0] for x in (query, key, value))
        out = self._attend_jointly(acts, rows, q, k, v, None, scale)
        out = longer.joined(out, out.new_zeros(*out.shape[:2], longer.tokens, out.shape[3]), 2)
        q, k, v = (rows.take(x) for x in (query, key, value))
        return rows.merge(run.sequence(site, q, k, v, scale, rows.take(out)), rows.rest(out))

    def _attend_jointly(
        self,
        acts: Acts,
        rows: Rows,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return joint attention whose image rows are what methods make of them; all other rows are the model's own."""
        text, image = self.tokens
        grouped = query.shape[1] != key.shape[1]
        at = self.layer.text_start(image)
        if self.layer.text == "last":
            # All that there is behind the image: rows may have texts of different lengths.
            text = key.shape[2] - at
        start = at + text if self.layer.text == "first" else 0
        stop, of_image = start + image, mask
        if mask is not None and self.layer.outer_mask:
            # Image tokens are never masked, so the mask of each of their rows is that of the keys.
            of_image = mask[..., start : start + 1, :]
        bias = key_bias_of(of_image, len(query), key.shape[2], self.layer.name)
        attention = Attention(
            query[:, :, start:stop],
            key,
            value,
            bias,
            scale,
            rows,
            module=self.layer.module,
            text=(at, text),
            sequence=(query, start) if mask is None else None,
            beside=beside,
        )
        _act(acts, attention)
        if attention.untouched and not attention.sharpened:
            return _real(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
        every = attention.every
        if every is not None and attention.unchanged:
            return every
        if every is None:
            queries = [part for part in (query[:, :, :start], query[:, :, stop:]) if part.shape[2]]
            if mask is not None and mask.shape[-2] > 1:
                mask = torch.cat([mask[..., :start, :], mask[..., stop:, :]], -2)
            rest = torch.cat(queries, 2) if len(queries) > 1 else queries[0]
            own = _real(rest, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
            others = own[:, :, :start], own[:, :, start:]
        else:
            others = every[:, :, :start], every[:, :, stop:]
        parts = others[0], attention.out.to(query.dtype), others[1]
        return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)

    def missed(self) -> RuntimeError:
        return RuntimeError(
            f"{self.layer.name} runs {type(self.layer.module.processor).__name__}, which never calls "
            f"scaled_dot_product_attention, so no method can act on it; {_REMEDY}"
        )


def _act(acts: Acts, attention: Attention) -> None:
    """Have everything that acts on a layer do so."""
    for run, site in acts.keys:
        run.keys(site, attention)
    if acts.edit is not None and attention.rows.conditional:
        run, site = acts.edit
        edited = run.edit(site, attention.conditional)
        if isinstance(edited, Edited):
            attention.probabilities, edited = edited.probabilities, edited.out
        attention.conditional_out = edited
    for run, site in acts.attend:
        run.attend(site, attention)


@functools.cache
def _native() -> Any:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName.NATIVE


@functools.cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def check_processor(layer: Layer) -> None:
    """Raise ValueError where a layer is known not to make the call that methods act on.

    Processors that nobody knows are found when they run.
    """
    module = layer.module
    if getattr(module, "added_kv_proj_dim", None) is not None and not layer.text:
        raise ValueError(
            f"{layer.name} attends to the text and the image in one, which no method supports; leave this layer out"
        )
    processor = type(module.processor)
    code = getattr(inspect.unwrap(processor.__call__), "__code__", None)
    if processor.__module__.startswith("diffusers.") and code is not None and not _ATTENDS.intersection(code.co_names):
        raise ValueError(f"{layer.name} uses {processor.__name__}, whose attention this library cannot edit; {_REMEDY}")


def check_uncached(model: Any, name: str) -> None:
    """Raise ValueError where a cache of diffusers leaves out layers of the model, all of which `name` needs."""
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"{type(model).__name__} has a cache enabled, which leaves out layers that {name} needs; call "
            "disable_cache() on it"
        )


@contextmanager
def installed(places: Iterable[Place], *, compiled: bool = False) -> Iterator[None]:
    """Have these layers' attention calls handed to what acts on them, within the block.

    Args:
        places: the layers.
        compiled: whether any part of the model is.
    """
    put: list[Place] = []
    _catch(not compiled)
    try:
        for place in places:
            place.compiled = compiled
            place.install()
            put.append(place)
        yield
    finally:
        for place in reversed(put):
            place.uninstall()
        _catch(-(not compiled))


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an attention module's forward with its attention call handed to methods."""
    place: Place = module._attnctl_place
    compiling = torch.compiler.is_compiling()
    acts = place.ever if compiling else place.now
    tokens, moved = None, False
    if acts.contexts or acts.more:
        if len(args) > 1:
            context, tokens, moved = place.read(acts, args[1])
            args = (args[0], context, *args[2:])
        elif kwargs.get("encoder_hidden_states") is not None:
            context, tokens, moved = place.read(acts, kwargs["encoder_hidden_states"])
            kwargs = {**kwargs, "encoder_hidden_states": context}
    if place.beside is not None and place.beside.stacked and kwargs.get("encoder_hidden_states") is not None:
        kwargs = {**kwargs, "encoder_hidden_states": place.beside.folded(kwargs["encoder_hidden_states"])}
        pictures, texts = _attended(module, place, acts, tokens, moved, args, kwargs)
        return pictures, place.beside.unfolded(texts)
    return _attended(module, place, acts, tokens, moved, args, kwargs)


def _attended(
    module: Any, place: Place, acts: Acts, tokens: int | None, moved: bool, args: tuple[Any, ...], kwargs: Any
) -> Any:
    if not acts.attends:
        return place.run(module, args, kwargs)
    compiling = torch.compiler.is_compiling()
    if compiling or place.compiled:
        mode = _Handing(place, acts, tokens, moved)
        with mode:
            result = place.run(module, args, kwargs)
        waiting = mode.waiting
    else:
        before = getattr(_thread, "handler", None)
        _thread.handler = place, acts, tokens, moved
        try:
            result = place.run(module, args, kwargs)
        finally:
            waiting, _thread.handler = _thread.handler is not None, before
    if waiting and not place.skipping:
        raise place.missed()
    return result


class _Handing(TorchFunctionMode):
    """A context that hands the first attention call within it to a place."""

    def __init__(self, place: Place, acts: Acts, tokens: int | None, moved: bool) -> None:
        super().__init__()
        self.place, self.acts, self.tokens, self.moved = place, acts, tokens, moved
        self.waiting = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _BUILTIN and self.waiting:
            self.waiting = False
            return self.place.attend(self.acts, self.tokens, self.moved, *args, **kwargs)
        if func is Tensor.unflatten:
            # Dynamo cannot trace the method under a mode.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


# Eager code

_thread = threading.local()
_lock = threading.Lock()
_users = 0
_real: Callable[..., Tensor] = _BUILTIN


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Stand in for `F.scaled_dot_product_attention` while a controlled model runs."""
    handler = getattr(_thread, "handler", None)
    if handler is None:
        return _real(*args, **kwargs)
    # What a layer attends to besides the text, an IP-Adapter's images, is its own.
    _thread.handler = None
    place, acts, tokens, moved = handler
    return place.attend(acts, tokens, moved, *args, **kwargs)


def _catch(users: int) -> None:
    """Count those who need attention calls, and stand in for the function while there are any."""
    global _users, _real
    with _lock:
        _users += users
        now = F.scaled_dot_product_attention
        if users > 0 and _users == 1 and now is not _attention:
            _real = now
            F.scaled_dot_product_attention = _attention
        elif _users == 0 and now is _attention:
            F.scaled_dot_product_attention = _real
