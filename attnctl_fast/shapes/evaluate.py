"""Paired evaluation on the shapes model: the same prompts and seeds with and without a method, and what changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .._impl import use
from ..methods import AttentionRegulation, Composition, Edit, EnergyContext
from ..pipeline import control
from .detection import Detection, Score, detect, score
from .scene import Scene, scene_for_seed
from .unet import LAYERS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

# Chosen on the held-apart seeds from 100000 on (bench/results/shapes_rates_tuning.jsonl,
# shapes_behaviour_tuning.jsonl). The official mass asks every target for a fifth of the picture, which fits what Stable
# Diffusion draws; an object of this model covers about a tenth.
TUNED: Mapping[str, Any] = {"layers": LAYERS, "strength": 1.0, "mass": 0.08, "level": 0.6, "quantile": 0.95}
MOVED: Mapping[str, Any] = {"gamma_attn": 0.01, "gamma_norm": 0.02}  # the released code's; none found is better
CONTRASTED: Mapping[str, Any] = {"scale": 5.0, "steps": 0.5, "refinement": {}}
ADDED: Mapping[str, Any] = {"weight": 2.0}
NEGATED: Mapping[str, Any] = {"weight": 0.5}

TEXT_LENGTH = 16

Methods = Sequence[Any] | Callable[[Sequence[Scene]], Sequence[Any]]


@dataclass(frozen=True)
class Arm:
    """One way of drawing the pictures.

    Args:
        methods: what `attnctl_fast.control` gets, or a function that makes it from the scenes of a batch; empty for the
            plain pipeline.
        impl: the implementation, as for `attnctl_fast.use`; `None` leaves the default.
        batches: draw only so many of the first batches, for an arm that is only timed; `None` draws all.
        options: a function from the scenes and seeds of a batch to arguments of the pipeline's call, such as another
            prompt or the image to fill in; `None` for the scenes' prompts alone.
    """

    methods: Methods = ()
    impl: str | None = None
    batches: int | None = None
    options: Callable[[Sequence[Scene], Sequence[int]], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Pictures and what they show, one entry per seed; `seconds` and `batch_sizes` have one entry per batch."""

    images: list[Image] = field(default_factory=list)
    detections: list[list[Detection]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    scenes: list[Scene] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)

    @property
    def seconds_per_image(self) -> list[float]:
        """The wall time of every batch divided by its number of pictures."""
        return [seconds / size for seconds, size in zip(self.seconds, self.batch_sizes, strict=True)]

    def hits(self, criterion: str) -> int:
        """Return how many pictures meet a criterion: `"strict"`, `"exact"` or `"colours"`."""
        return sum(getattr(entry, criterion) for entry in self.scores)


@dataclass(frozen=True)
class Change:
    """One criterion, counted over pairs of pictures: the rates, the pairs gained and lost, McNemar's p value."""

    plain: float
    controlled: float
    gained: int
    lost: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """`compare`'s result: a `Change` for each criterion, over `count` pairs of pictures."""

    strict: Change
    exact: Change
    colours: Change
    count: int


def regulation(**options: Any) -> Callable[[Sequence[Scene]], tuple[AttentionRegulation, ...]]:
    """Return attention regulation of every scene's nouns, as an arm's `methods`.

    `options` are arguments of `AttentionRegulation.official`; without any, those of `TUNED` are taken.
    """
    settings = options or dict(TUNED)
    return lambda scenes: (AttentionRegulation.official([list(scene.nouns) for scene in scenes], **settings),)


def energy(**options: Any) -> tuple[EnergyContext, ...]:
    """Return a context update, as an arm's `methods`; `options` are those of `EnergyContext`, by default `MOVED`."""
    return (EnergyContext(**(options or dict(MOVED))),)


def phrase(scene: Scene, index: int) -> str:
    """Return one object of a scene as prompts name it, such as `a red circle`."""
    return Scene(scene.objects[index : index + 1]).prompt


def first_object(scenes: Sequence[Scene], _: Sequence[int]) -> dict[str, Any]:
    """Return prompts that name only the first object of every scene, as an arm's `options`."""
    return {"prompt": [phrase(scene, 0) for scene in scenes]}


def second_object(direction: int, **options: Any) -> Callable[[Sequence[Scene]], tuple[Composition, ...]]:
    """Return a composition that adds or takes away the second object of every scene, as an arm's `methods`.

    +1 adds it, by the text of both; -1 takes it away, by its own text.

    `options` are arguments of `Edit`; without any, those of `ADDED` or `NEGATED` are taken.
    """
    settings = options or dict(ADDED if direction > 0 else NEGATED)

    def methods(scenes: Sequence[Scene]) -> tuple[Composition, ...]:
        texts = [scene.prompt if direction > 0 else phrase(scene, 1) for scene in scenes]
        return (Composition([Edit(texts, direction=direction, **settings)]),)

    return methods


def evaluate(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    methods: Methods = (),
    *,
    objects: int = 2,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Draw `scene_for_seed(seed)` for every seed with the given methods on, and score what the detector finds.

    The latents of a picture come from a CPU generator with its own seed, so that they depend neither on the batch
    size nor on the device.

    Args:
        pipe: the pipeline of `shapes.load_pipeline`.
        seeds: one picture per seed.
        methods: a sequence of methods, or a function from the scenes of a batch to one; empty for the plain pipeline.
        objects: objects per prompt, 1 to 3.
        num_inference_steps: steps of the sampler.
        guidance_scale: strength of classifier-free guidance.
        batch_size: pictures that are drawn at a time.
        progress: show a bar.

    Raises:
        ValueError: no seeds, a repeated seed, or a batch size below one.
    """
    arms = {"": Arm(methods)}
    return interleaved(
        pipe,
        seeds,
        arms,
        objects=objects,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        progress=progress,
    )[""]


def interleaved(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    arms: Mapping[str, Arm],
    *,
    objects: int = 2,
    num_inference_steps: int = 25,
    guidance_scale: float = 5.0,
    batch_size: int = 8,
    progress: bool = True,
    warm_up: bool = False,
) -> dict[str, Evaluation]:
    """Run `evaluate` for several arms, batch by batch in turn, so that their times are measured side by side.

    The order of the arms is reversed at every other batch. With `warm_up`, every arm first draws a picture that is not
    counted.
    """
    seeds = list(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {len(seeds)} of which {len(set(seeds))} differ")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    results = {name: Evaluation() for name in arms}
    with _quiet(pipe), _bar(sum(len(batch) * _takes(arms, i) for i, batch in enumerate(batches)), progress) as bar:
        if warm_up:
            for arm in arms.values():
                _draw(pipe, seeds[:1], _scenes(seeds[:1], objects), arm, num_inference_steps, guidance_scale)
        for index, batch in enumerate(batches):
            scenes = _scenes(batch, objects)
            for name, arm in list(arms.items())[:: 1 if index % 2 == 0 else -1]:
                if arm.batches is not None and index >= arm.batches:
                    continue
                images, seconds = _draw(pipe, batch, scenes, arm, num_inference_steps, guidance_scale)
                found = [detect(image) for image in images]
                result = results[name]
                result.images.extend(images)
                result.detections.extend(found)
                result.scores.extend(score(scene, seen) for scene, seen in zip(scenes, found, strict=True))
                result.seconds.append(seconds)
                result.seeds.extend(batch)
                result.scenes.extend(scenes)
                result.batch_sizes.append(len(batch))
                bar.update(len(batch))
    return results


def compare(plain: Evaluation, controlled: Evaluation) -> Comparison:
    """Count, for each criterion, the pairs that the method gained and lost.

    Raises:
        ValueError: the evaluations are not of the same seeds and scenes.
    """
    if (plain.seeds, plain.scenes) != (controlled.seeds, controlled.scenes):
        raise ValueError(
            f"the evaluations are not pairs: seeds or scenes of their {len(plain.seeds)} and {len(controlled.seeds)} "
            "pictures differ; evaluate both with the same seeds and number of objects"
        )
    changes = {name: _change(plain, controlled, name) for name in Score._fields}
    return Comparison(**changes, count=len(plain.seeds))


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p value of McNemar's test.

    It says how likely so uneven a split of the changed pairs is by chance.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def _change(plain: Evaluation, controlled: Evaluation, criterion: str) -> Change:
    pairs = [
        (getattr(before, criterion), getattr(after, criterion))
        for before, after in zip(plain.scores, controlled.scores, strict=True)
    ]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    count = len(pairs)
    return Change(
        plain.hits(criterion) / count, controlled.hits(criterion) / count, gained, lost, mcnemar(gained, lost)
    )


def _draw(
    pipe: Any, seeds: Sequence[int], scenes: Sequence[Scene], arm: Arm, steps: int, guidance_scale: float
) -> tuple[list[Image], float]:
    """Return the pictures of one batch and the wall time, attaching and restoring included."""
    methods = arm.methods(scenes) if callable(arm.methods) else arm.methods
    start = time.perf_counter()
    with ExitStack() as stack:
        if arm.impl is not None:
            stack.enter_context(use(arm.impl))
        if methods:
            stack.enter_context(control(pipe, *methods))
        arguments: dict[str, Any] = {
            "prompt": [scene.prompt for scene in scenes],
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        }
        if isinstance(getattr(pipe, "text_encoder_3", None), torch.nn.Module):
            # Padding to 256 tokens, as by default, would double the time.
            arguments["max_sequence_length"] = TEXT_LENGTH
        if arm.options is not None:
            arguments.update(arm.options(scenes, seeds))
        images = pipe(arguments.pop("prompt"), **arguments).images
    return images, time.perf_counter() - start


def _scenes(seeds: Sequence[int], objects: int) -> list[Scene]:
    return [scene_for_seed(seed, objects) for seed in seeds]


def _takes(arms: Mapping[str, Arm], index: int) -> int:
    return sum(arm.batches is None or index < arm.batches for arm in arms.values())


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Run without the pipeline's own progress bar."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**(before | {"disable": True}))
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="image", disable=not progress, dynamic_ncols=True)
