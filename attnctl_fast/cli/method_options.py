"""The methods of `--method` and their options, in two tables from which everything else follows.

A new method is one entry of `METHODS`, and one of `OPTIONS` for each option that no other method has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from .options import box, group, mask, pair, share, strength, token_weight

# Options that were given, by their names with underscores.
Given: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """An option that some methods have.

    Args:
        help: what it is; the methods that have it are named before.
        metavar: as `add_argument` takes it.
        read: its `type`.
        choices: as `add_argument` takes them.
        takes: one `value`; several `names` of parts of the model; or, for one prompt, several `texts`, `words` of it
            (alone or in tuples), or a `mapping` from words of it, written WORD=VALUE. A file of prompts may have the
            last three line by line.
    """

    help: str
    metavar: str | None = None
    read: Callable[[str], Any] = str
    takes: Literal["value", "names", "texts", "words", "mapping"] = "value"
    choices: Sequence[str] | None = None


OPTIONS = {
    "layers": Option("names of blocks or layers; default: the method's own", "PREFIX", takes="names"),
    "targets": Option("words or phrases of the prompt to enforce", "WORD", takes="words"),
    "pairs": Option(
        "which words modify which, such as red:ball or big:red:ball; default: what spaCy finds",
        "MODIFIER:NOUN",
        pair,
        "words",
    ),
    "groups": Option(
        "two or more groups of words that belong together, such as red+ball dog", "WORD+WORD", group, "words"
    ),
    "masks": Option("pictures that are white where a phrase or a prompt is to be", "PHRASE=FILE", mask, "mapping"),
    "boxes": Option(
        "boxes in place of masks, in shares of the picture from its upper left",
        "PHRASE=LEFT,TOP,RIGHT,BOTTOM",
        box,
        "mapping",
    ),
    "base": Option("share of the attention to the prompt in a region; default: 0.1", "SHARE", share),
    "background": Option("prompt for what no mask covers; default: the prompt itself", "TEXT"),
    "strength": Option("strength of the edit, 0 for none; default: the method's own", None, strength),
    "scale": Option("length of the latents' step; default: the method's own", None, strength),
    "convention": Option("default: official, the released code", choices=("official", "paper")),
    "gamma_attn": Option(
        "step of the context on the attention's energy; default: 0.01 for the prompt's context (energy), 0 for the "
        "edits' (compose)",
        "STEP",
        strength,
    ),
    "gamma_norm": Option("the same on the energy of the norms; default: 0.02 or 0", "STEP", strength),
    "token_weights": Option("factors of --gamma-attn for words of the prompt", "WORD=FACTOR", token_weight, "mapping"),
    "edit": Option("texts to add to the prompt", "TEXT", takes="texts"),
    "negate": Option("texts to take away from the prompt", "TEXT", takes="texts"),
    "edit_weight": Option("weight of every text; default: 1, as the prompt has in composable", "WEIGHT", strength),
    "avoid": Option("what the picture is not to be; unlike --negative-prompt, without guidance too", "TEXT"),
    "nag_scale": Option("strength, 1 for none; default: 5", None, strength),
    "nag_tau": Option("the longest that attention may become, in its own lengths; default: 2.5", "LENGTH", strength),
    "nag_alpha": Option("share of the guided attention; default: 0.25", "SHARE", share),
    "factor": Option("of the logits of image and text; default: 1.2", None, strength),
    "pladis_scale": Option("0 for softmax, 1 for sparse attention; default: 2", None, strength),
    "edit_start": Option("share of the steps before the edits; default: 0", "SHARE", share),
}


@dataclass(frozen=True)
class Method:
    """A method that `--method` chooses.

    Args:
        cls: name of its class in `attnctl_fast.methods`.
        options: the options that it has. One with `convention` is made by its class's `official` or `paper`.
        needs: options of which one must be given.
        arguments: turns the options, mappings as dicts, and the prompt into the constructor's arguments.
    """

    cls: str
    options: Sequence[str]
    needs: Sequence[str] = ()
    arguments: Callable[[Given, str], Given] = lambda given, prompt: given


# A box is a mask of so many cells along a side.
_CELLS = 64


def _with_masks(given: Given, prompt: str) -> Given:
    import numpy as np
    from PIL import Image

    masks = {}
    for phrase, file in given.get("masks", {}).items():
        with Image.open(file) as image:
            masks[phrase] = np.asarray(image.convert("L")) > 127
    # All masks are of one size.
    rows, columns = next(iter(masks.values())).shape if masks else (_CELLS, _CELLS)
    y, x = (np.arange(rows)[:, None] + 0.5) / rows, (np.arange(columns) + 0.5) / columns
    for phrase, (left, top, right, bottom) in given.get("boxes", {}).items():
        masks.setdefault(phrase, (left <= x) & (x < right) & (top <= y) & (y < bottom))
    return {name: value for name, value in given.items() if name != "boxes"} | {"masks": masks}


def _syngen(given: Given, prompt: str) -> Given:
    if "pairs" not in given and find_spec("spacy") is None:
        raise ValueError("--method syngen needs --pairs, such as red:ball, or spaCy installed, which finds them")
    return given


def _compose(given: Given, prompt: str) -> Given:
    from ..methods import Edit

    each = {"weight": given.get("edit_weight", 1.0), "start": given.get("edit_start", 0.0)}
    each |= {name: value for name, value in given.items() if name in ("gamma_attn", "gamma_norm")}
    edits = [Edit(text, direction=direction, **each) for text, direction in _texts(given)]
    return {"edits": edits, "layers": given.get("layers")}


def _composable(given: Given, prompt: str) -> Given:
    texts, weight = _texts(given), given.get("edit_weight", 1.0)
    return {"prompts": [prompt, *(text for text, _ in texts)], "weights": [1.0, *(sign * weight for _, sign in texts)]}


def _nag(given: Given, prompt: str) -> Given:
    return {"negative_prompt" if name == "avoid" else name.removeprefix("nag_"): x for name, x in given.items()}


def _pladis(given: Given, prompt: str) -> Given:
    return {name.removeprefix("pladis_"): value for name, value in given.items()}


def _texts(given: Given) -> list[tuple[str, int]]:
    """Return the texts of --edit, each with 1, and of --negate, with -1."""
    return [(text, 1) for text in given.get("edit", [])] + [(text, -1) for text in given.get("negate", [])]


METHODS = {
    "regulation": Method("AttentionRegulation", ("layers", "targets", "strength", "convention"), ("targets",)),
    "energy": Method("EnergyContext", ("layers", "gamma_attn", "gamma_norm", "token_weights", "convention")),
    "compose": Method(
        "Composition",
        ("layers", "edit", "negate", "edit_weight", "edit_start", "gamma_attn", "gamma_norm"),
        ("edit", "negate"),
        _compose,
    ),
    "excite": Method("AttendAndExcite", ("layers", "targets", "scale", "convention"), ("targets",)),
    "tsam": Method("TSAM", ("layers", "scale", "convention")),
    "syngen": Method("SynGen", ("layers", "pairs", "scale"), arguments=_syngen),
    "conform": Method("CONFORM", ("layers", "groups", "scale"), ("groups",)),
    "focus": Method("FOCUS", ("layers", "groups", "strength"), ("groups",)),
    "dense": Method("DenseDiffusion", ("layers", "masks", "boxes", "convention"), ("masks", "boxes"), _with_masks),
    "nag": Method("NAG", ("layers", "avoid", "nag_scale", "nag_tau", "nag_alpha"), ("avoid",), _nag),
    "taca": Method("TACA", ("layers", "factor")),
    "pladis": Method("PLADIS", ("layers", "pladis_scale"), arguments=_pladis),
    "regions": Method("Regions", ("layers", "masks", "boxes", "base", "background"), ("masks", "boxes"), _with_masks),
    "composable": Method("ComposableDiffusion", ("edit", "negate", "edit_weight"), ("edit", "negate"), _composable),
}


def methods_with(option: str) -> list[str]:
    """Return the methods that have this option."""
    return [name for name, method in METHODS.items() if option in method.options]


def add_method_options(command: argparse.ArgumentParser) -> None:
    """Add the options of all methods to a command."""
    for name, option in OPTIONS.items():
        needed = all(METHODS[method].needs == (name,) for method in methods_with(name))
        command.add_argument(
            _dashed(name),
            nargs=None if option.takes == "value" else "+",
            metavar=option.metavar,
            type=option.read,
            choices=option.choices,
            help=f"{_listed(methods_with(name))}: {option.help}{' (required)' if needed else ''}",
        )


def given_options(arguments: argparse.Namespace, methods: Iterable[str]) -> Given:
    """Return the method options that were given.

    Raises:
        ValueError: none of these methods has one of them.
    """
    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    for name in given:
        if not set(methods).intersection(methods_with(name)):
            raise ValueError(
                f"{_dashed(name)} is an option of --method {_listed(methods_with(name))}, not of {_listed(methods)}"
            )
    return given


def own_options(name: str, given: Given) -> Given:
    """Return those of the options that this method has."""
    return {option: value for option, value in given.items() if name in methods_with(option)}


def make_method(name: str, given: Given, prompt: str) -> Any:
    """Construct a method for one prompt from options that it has.

    Raises:
        ValueError: an option that it needs is missing, or one has a value that it refuses.
    """
    from .. import methods

    method = METHODS[name]
    if method.needs and not any(given.get(option) for option in method.needs):
        needs = " or ".join(_dashed(option) for option in method.needs)
        helps = " or ".join(OPTIONS[option].help for option in method.needs)
        raise ValueError(f"--method {name} needs {needs}: {helps}")
    mappings = {option: dict(values) for option, values in given.items() if OPTIONS[option].takes == "mapping"}
    if double := next((option for option, mapping in mappings.items() if len(mapping) < len(given[option])), None):
        raise ValueError(f"{_dashed(double)} names a word twice; name it once")
    given = given | mappings
    make = getattr(methods, method.cls)
    if "convention" in method.options:
        make = getattr(make, given.pop("convention", "official"))
    return make(**method.arguments(given, prompt))


def words_of(given: Given) -> list[tuple[str, str]]:
    """Return every word of the prompt that these options name, each with the option's name."""
    words = []
    for name, values in given.items():
        if OPTIONS[name].takes == "words":
            words += [(name, word) for value in values for word in ([value] if isinstance(value, str) else value)]
        elif OPTIONS[name].takes == "mapping":
            words += [(name, word) for word, _ in values]
    return words


def _dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
