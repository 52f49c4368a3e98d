"""Options that several commands have, and what an option of the command line may be."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import util
from pathlib import Path
from typing import Any

METHODS = ("regulation", "energy", "compose", "excite", "tsam", "syngen", "conform", "composable")


def add_model_options(command: argparse.ArgumentParser, *, layers: str, out: str) -> None:
    """What to draw with which model, and where the files go; `layers` is the default's description."""
    command.add_argument(
        "--model", required=True, help="a folder, an id on the Hugging Face hub, or `shapes` for the shipped model"
    )
    command.add_argument("--negative-prompt")
    command.add_argument(
        "--layers", nargs="+", metavar="PREFIX", help=f"names of UNet blocks or layers; default: {layers}"
    )
    command.add_argument("--steps", type=positive, help="default: the pipeline's own")
    command.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    command.add_argument("--height", type=positive, metavar="PIXELS", help="default: the model's own")
    command.add_argument("--width", type=positive, metavar="PIXELS", help="default: the model's own")
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="default: auto, float16 on a GPU and float32 elsewhere",
    )
    command.add_argument("--device", default="auto", help="torch device; default: auto, the GPU if there is one")
    command.add_argument("--variant", help="variant of the weight files, such as fp16")
    command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")


def add_picture_options(command: argparse.ArgumentParser) -> None:
    """Which pictures of one prompt, and whether they may replace earlier ones."""
    command.add_argument("--prompt", required=True)
    command.add_argument("--seed", type=natural, default=0, help="seed of the first picture; default: 0")
    command.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")


def add_method_options(command: argparse.ArgumentParser) -> None:
    """What the methods of `METHODS` take; which has which is said in `_choice.py`."""
    command.add_argument(
        "--targets",
        nargs="+",
        metavar="WORD",
        help="regulation and excite: words or phrases of the prompt to enforce (required)",
    )
    command.add_argument(
        "--pairs",
        nargs="+",
        metavar="MODIFIER:NOUN",
        type=pair,
        help="syngen: which words modify which, such as red:ball or big:red:ball; default: what spaCy finds",
    )
    command.add_argument(
        "--groups",
        nargs="+",
        metavar="WORD+WORD",
        type=group,
        help="conform: two or more groups of words that belong together, such as red+ball dog (required)",
    )
    command.add_argument("--strength", type=strength, help="regulation: default the method's own; 0 is plain")
    command.add_argument(
        "--scale",
        type=strength,
        help="excite, tsam, syngen and conform: length of the latents' step; default the method's own",
    )
    command.add_argument(
        "--convention",
        choices=["official", "paper"],
        help="regulation, energy, excite and tsam: default official, the released code",
    )
    command.add_argument(
        "--gamma-attn",
        type=strength,
        metavar="STEP",
        help="energy and compose: the context's step on the attention's energy, of the prompt's context (default 0.01) "
        "or of the edits' (default 0)",
    )
    command.add_argument(
        "--gamma-norm", type=strength, metavar="STEP", help="the same on the energy of the norms; default 0.02 or 0"
    )
    command.add_argument(
        "--token-weights",
        nargs="+",
        metavar="WORD=FACTOR",
        type=token_weight,
        help="energy: factors of --gamma-attn for words of the prompt",
    )
    command.add_argument("--edit", nargs="+", metavar="TEXT", help="compose and composable: texts to add to the prompt")
    command.add_argument("--negate", nargs="+", metavar="TEXT", help="compose and composable: texts to take away")
    command.add_argument(
        "--edit-weight",
        type=strength,
        metavar="WEIGHT",
        help="compose and composable: of every text; default 1, as the prompt has in composable",
    )
    command.add_argument(
        "--edit-start", type=share, metavar="SHARE", help="compose: share of the steps before the edits; default 0"
    )


def settings_of(kind: type[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Those arguments that are fields of this dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def require_extra(*more: str) -> None:
    """Raise ImportError unless everything that pipelines need is installed, and these too."""
    missing = [name for name in ("diffusers", "transformers", "PIL", "tqdm", *more) if util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} not installed; run: pip install "attnctl-fast[diffusers]"')


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {number}")
    return number


def strength(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be zero or positive and finite, got {number}")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {number}")
    return number


def token_weight(text: str) -> tuple[str, float]:
    word, sign, factor = text.rpartition("=")
    if not sign or not word:
        raise argparse.ArgumentTypeError(f"must be WORD=FACTOR, such as crown=2.5, got {text!r}")
    return word, strength(factor)


def pair(text: str) -> tuple[str, ...]:
    words = _words(text, ":")
    if len(words) < 2:
        raise argparse.ArgumentTypeError(f"must be MODIFIER:NOUN, such as red:ball or big:red:ball, got {text!r}")
    return words


def group(text: str) -> tuple[str, ...]:
    return _words(text, "+")


def _words(text: str, sign: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(sign))
    if not all(words):
        raise argparse.ArgumentTypeError(f"must be words with {sign!r} between them, got {text!r}")
    return words
