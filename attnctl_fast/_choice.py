"""`--method` of the commands that draw with methods, and the options that go with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeAlias

from ._model import ModelSettings
from .methods import (
    CONFORM,
    TSAM,
    AttendAndExcite,
    AttentionRegulation,
    ComposableDiffusion,
    Composition,
    Edit,
    EnergyContext,
    LatentGuidance,
    SynGen,
)

Method: TypeAlias = AttentionRegulation | EnergyContext | Composition | LatentGuidance | ComposableDiffusion


# The options that not every method has, and the methods that have them.
_METHODS_OF = {
    "layers": ("regulation", "energy", "compose", "excite", "tsam", "syngen", "conform"),
    "targets": ("regulation", "excite"),
    "pairs": ("syngen",),
    "groups": ("conform",),
    "strength": ("regulation",),
    "scale": ("excite", "tsam", "syngen", "conform"),
    "convention": ("regulation", "energy", "excite", "tsam"),
    "gamma_attn": ("energy", "compose"),
    "gamma_norm": ("energy", "compose"),
    "token_weights": ("energy",),
    "edit": ("compose", "composable"),
    "negate": ("compose", "composable"),
    "edit_weight": ("compose", "composable"),
    "edit_start": ("compose",),
}


@dataclass(frozen=True, kw_only=True)
class MethodSettings(ModelSettings):
    """What decides the pictures of a method; None leaves an option to the method."""

    method: str = "regulation"
    targets: list[str] | None = None
    pairs: list[tuple[str, ...]] | None = None
    groups: list[tuple[str, ...]] | None = None
    strength: float | None = None
    scale: float | None = None
    convention: str | None = None
    gamma_attn: float | None = None
    gamma_norm: float | None = None
    token_weights: list[tuple[str, float]] | None = None
    edit: list[str] | None = None
    negate: list[str] | None = None
    edit_weight: float | None = None
    edit_start: float | None = None
    num_images: int = 1

    def given(self, *names: str) -> dict[str, Any]:
        """Those of these options that were given."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def needed(self, name: str, what: str) -> Any:
        """This option, which the method cannot do without."""
        if not getattr(self, name):
            raise ValueError(f"--method {self.method} needs --{name}, {what}")
        return getattr(self, name)


def check_options(settings: MethodSettings, *methods: str) -> None:
    """Raise ValueError if an option is given that none of these methods has."""
    for name, known in _METHODS_OF.items():
        if getattr(settings, name) is not None and not set(methods).intersection(known):
            raise ValueError(
                f"--{name.replace('_', '-')} is an option of --method {_listed(known)}, not of {_listed(methods)}"
            )


def settings_for(settings: MethodSettings, method: str) -> MethodSettings:
    """The settings of one of several methods that share them: without the options that it does not have."""
    others = {name: None for name, known in _METHODS_OF.items() if method not in known}
    changes: dict[str, Any] = {"method": method, **others}
    return replace(settings, **changes)


def chosen_method(settings: MethodSettings) -> Method:
    """The method that the settings describe.

    Raises:
        ValueError: an option that it needs is missing, or one of other methods is given.
    """
    check_options(settings, settings.method)
    return _MAKE[settings.method](settings)


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _form(settings: MethodSettings, method: Any) -> Any:
    return method.paper if settings.convention == "paper" else method.official


def _regulation(settings: MethodSettings) -> AttentionRegulation:
    targets = settings.needed("targets", "the words of the prompt to enforce")
    return _form(settings, AttentionRegulation)([targets], **settings.given("layers", "strength"))


def _energy(settings: MethodSettings) -> EnergyContext:
    weights = dict(settings.token_weights or ())
    if len(weights) < len(settings.token_weights or ()):
        raise ValueError("--token-weights names a word twice; name it once")
    options = settings.given("layers", "gamma_attn", "gamma_norm")
    return _form(settings, EnergyContext)(token_weights=weights or None, **options)


def _signed_texts(settings: MethodSettings) -> list[tuple[str, int]]:
    texts = [(text, 1) for text in settings.edit or []] + [(text, -1) for text in settings.negate or []]
    if not texts:
        raise ValueError(
            f"--method {settings.method} needs --edit or --negate, the texts to add to the prompt or to take away"
        )
    return texts


def _compose(settings: MethodSettings) -> Composition:
    weight = 1.0 if settings.edit_weight is None else settings.edit_weight
    options = {"start": settings.edit_start or 0.0, **settings.given("gamma_attn", "gamma_norm")}
    edits = [Edit(text, weight, direction=direction, **options) for text, direction in _signed_texts(settings)]
    return Composition(edits, **settings.given("layers"))


def _composable(settings: MethodSettings) -> ComposableDiffusion:
    weight = 1.0 if settings.edit_weight is None else settings.edit_weight
    texts = _signed_texts(settings)
    return ComposableDiffusion(
        [settings.prompt, *(text for text, _ in texts)], [1.0, *(weight * direction for _, direction in texts)]
    )


def _excite(settings: MethodSettings) -> AttendAndExcite:
    targets = settings.needed("targets", "the words of the prompt to enforce")
    return _form(settings, AttendAndExcite)([targets], **settings.given("layers", "scale"))


def _tsam(settings: MethodSettings) -> TSAM:
    return _form(settings, TSAM)(**settings.given("layers", "scale"))


def _syngen(settings: MethodSettings) -> SynGen:
    if find_spec("spacy") is None:
        settings.needed("pairs", "such as red:ball, or spaCy installed, which finds them")
    return SynGen(**settings.given("pairs", "layers", "scale"))


def _conform(settings: MethodSettings) -> CONFORM:
    groups = settings.needed("groups", "two or more, such as red+ball dog")
    return CONFORM(groups, **settings.given("layers", "scale"))


_MAKE: dict[str, Callable[[MethodSettings], Method]] = {
    "regulation": _regulation,
    "energy": _energy,
    "compose": _compose,
    "excite": _excite,
    "tsam": _tsam,
    "syngen": _syngen,
    "conform": _conform,
    "composable": _composable,
}
