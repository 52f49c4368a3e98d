"""Attaching methods to diffusers pipelines, and restoring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .attach.capture import AttentionMaps, Capture
from .attach.engine import Engine, Entry, PipelineCall, engine_of
from .attach.families import padded_texts
from .attach.layers import LayerChoice, by_downsampling, check_choice
from .attach.prompts import Prompts, check_targets
from .attach.protocol import Method

__all__ = ["AttentionMaps", "Handle", "by_downsampling", "capture", "control", "enable"]


class Handle:
    """A control that `enable` put on a pipeline."""

    def __init__(self, engine: Engine, entry: Entry, pipe: Any) -> None:
        self._on: tuple[Engine, Entry, Any] | None = (engine, entry, pipe)
        self._call: PipelineCall | None = None

    def disable(self) -> None:
        """Take it off again. Handles may be disabled in any order; a second call does nothing."""
        if self._on is not None:
            self.end()
            # Let go of the pipeline: a handle that is kept should not keep the model.
            (engine, entry, _), self._on = self._on, None
            engine.remove(entry)

    def begin(
        self,
        *,
        prompt_embeds: Tensor | list[Tensor],
        prompt: str | list[str] | None = None,
        negative_prompt_embeds: Tensor | list[Tensor] | None = None,
    ) -> Tensor | list[Tensor]:
        """Begin a call of the user's own making, a loop over the pipeline's scheduler and model, until `end`.

        The model's evaluations in this thread are controlled from here on as those of a call of the pipeline would be;
        which of their rows are the prompt's is told by their contexts. An earlier call that was begun ends.

        Args:
            prompt_embeds: the prompts' contexts as the model will be given them, `[prompts * images, N, C]`, or where
                it takes lists (Z-Image) `[N, C]` for every picture.
            prompt: their text; without it, targets have to be token ids.
            negative_prompt_embeds: the contexts that guidance goes away from, of the same shape; None without guidance.

        Returns:
            The contexts to give the model as the prompts': `prompt_embeds`, unless a method has changed them
            (DenseDiffusion encodes its phrases).

        Raises:
            ValueError: the prompts do not fit the methods, or shapes do not fit.
            RuntimeError: the control is off.
        """
        if self._on is None:
            raise RuntimeError("the control is off; enable it anew, then begin")
        self.end()
        engine, _, pipe = self._on
        texts = [prompt] if isinstance(prompt, str) else prompt
        family = engine.family
        own: Any = prompt_embeds
        others: Any = negative_prompt_embeds
        if not isinstance(own, list if family.lists else Tensor) or not len(own):
            raise ValueError(f"prompt_embeds is {prompt_embeds!r}; pass the contexts that the model will be given")
        if family.lists:
            own, others = padded_texts(own), None if others is None else padded_texts(others)
        if own.ndim != 3 or (texts is not None and (not texts or len(own) % len(texts))):
            count = "unknown" if texts is None else len(texts)
            raise ValueError(
                f"prompt_embeds has shape {tuple(own.shape)} for {count} prompts; it must be "
                "[prompts * images, tokens, channels]"
            )
        # Where texts are not padded to one length, the negative one may have another.
        compared = slice(None, None, 2 if family.fill else 1)
        if others is not None and others.shape[compared] != own.shape[compared]:
            raise ValueError(
                f"negative_prompt_embeds has shape {tuple(others.shape)}; it must be that of "
                f"prompt_embeds, {tuple(own.shape)}"
            )
        length = own.shape[1]
        segments = family.segments(pipe, {"prompt": texts}, length)
        prompts = Prompts(segments, len(own if texts is None else texts), length)
        self._call, contexts = engine.begin(pipe, prompts, own, others)
        if family.lists:
            return [text[: len(one)] for text, one in zip(contexts, prompt_embeds, strict=True)]
        return contexts

    def end(self) -> None:
        """End the call that `begin` began; without one, do nothing."""
        call, self._call = self._call, None
        if call is not None:
            call.end()


def enable(pipe: Any, *methods: Method) -> Handle:
    """Put methods on a diffusers pipeline until `handle.disable()`; `control` is the same for a `with` block.

    The pipeline's class and the way it is called stay the same, and processors, adapters and hooks may be loaded, set
    and removed meanwhile: only while the model runs in a call of this pipeline, the attention of the layers that the
    methods name is theirs. Where controls are nested, the inner one acts on the layers that both edit; an inner
    EnergyContext or Composition takes the place of an outer one. Several latent guidances move the latents one after
    the other, and all other methods rest meanwhile. Other pipelines that share the model are not affected.

    Args:
        pipe: a text-to-image, image-to-image, inpainting or ControlNet pipeline of a UNet (SD 1.x, SD 2.x, SDXL) or a
            transformer (PixArt, Sana, HunyuanDiT, SD 3, SD 3.5, FLUX.1, FLUX.2, Chroma, Qwen-Image, Z-Image,
            Lumina 2, AuraFlow, CogView 4), or a text-to-video pipeline of Wan or LTX.
        methods: such as `AttentionRegulation(["bag", "apple"])`. Those that edit attention on layers of their own; any
            number of LatentGuidance; one EnergyContext and one Composition, on any layers. A ComposableDiffusion stands
            alone. Composition and ComposableDiffusion are for UNets, EnergyContext for models with cross-attention
            (PixArt, Sana, HunyuanDiT, Wan and LTX of the transformers).

    Returns:
        The handle.

    Raises:
        ValueError: no method, two of a kind where one is allowed, a model that methods, or these methods, do not attach
            to, layers that do not exist, that two methods edit or whose processors make no attention call; for latent
            guidance a scheduler without steps, or group offloading. Nothing has been changed then. What
            depends on the prompt (a target that does not stand in it) is raised by the pipeline call, before its first
            step.
    """
    if not methods:
        raise ValueError("no method was given; pass at least one, such as AttentionRegulation(['bag', 'apple'])")
    for method in methods:
        if isinstance(method, type) and issubclass(method, Method):
            raise ValueError(f"{method.__name__} is a class; pass an instance, {method.__name__}(...)")
        if not isinstance(method, Method):
            raise ValueError(
                f"{method!r} is not a method; pass instances such as AttentionRegulation(['bag', 'apple'])"
            )
    engine = engine_of(pipe)
    entry = engine.add(pipe, engine.check(pipe, list(methods)))
    return Handle(engine, entry, pipe)


@contextmanager
def control(pipe: Any, *methods: Method) -> Iterator[Handle]:
    """Put methods on a pipeline for the length of a `with` block; see `enable`.

    On leaving, by return or by exception, the pipeline is as it was.
    """
    handle = enable(pipe, *methods)
    try:
        yield handle
    finally:
        handle.disable()


@contextmanager
def capture(pipe: Any, tokens: Any = None, layers: LayerChoice = None) -> Iterator[AttentionMaps]:
    """Record head-averaged maps of attention to the text in a pipeline's calls within a `with` block, to look at.

    Args:
        pipe: as for `enable`.
        tokens: words, phrases or token ids as for a method's targets; None for every token of the context.
        layers: name prefixes or `by_downsampling(n)`; None for every layer that attends to the text.

    Yields:
        `AttentionMaps`, a mapping from layer names to maps; it holds those of the last call, also after the block.

    Raises:
        ValueError: as `enable` does.
    """
    targets = None if tokens is None else check_targets(tokens, "tokens")
    one = Capture(targets, AttentionMaps(), check_choice(layers))
    with control(pipe, one):
        yield one.maps
