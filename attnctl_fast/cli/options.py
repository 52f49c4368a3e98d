"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any


def add_model_options(command: argparse.ArgumentParser, *, out: str) -> None:
    """Add the options that say which model draws, how, and where the files go."""
    command.add_argument(
        "--model",
        required=True,
        help="a folder, an id on the Hugging Face hub, or `shapes` or `shapes-mmdit` for a shipped model",
    )
    command.add_argument("--negative-prompt")
    command.add_argument("--steps", type=positive, help="default: the pipeline's own")
    command.add_argument("--guidance-scale", type=finite, help="default: the pipeline's own")
    command.add_argument(
        "--true-cfg-scale",
        type=finite,
        help="scale of guidance away from the negative prompt, or from an empty one, in pipelines whose guidance scale "
        "is another thing (FLUX); default: the pipeline's own, 1, which is none",
    )
    command.add_argument("--height", type=positive, metavar="PIXELS", help="default: the model's own")
    command.add_argument("--width", type=positive, metavar="PIXELS", help="default: the model's own")
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="default: auto, on a GPU float16 (transformers: bfloat16), elsewhere float32",
    )
    command.add_argument("--device", default="auto", help="torch device; default: auto, the GPU if there is one")
    command.add_argument("--variant", help="variant of the weight files, such as fp16")
    command.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also load weights that are not safetensors; such files can run code, so use it for files you trust",
    )
    command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")


def add_prompt_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say which pictures of one prompt to draw, and whether they may replace earlier ones."""
    command.add_argument("--prompt", required=True)
    command.add_argument("--seed", type=natural, default=0, help="seed of the first picture; default: 0")
    command.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")


def require_extra(*more: str) -> None:
    """Raise ImportError unless everything that pipelines need is installed, and these too."""
    missing = [name for name in ("diffusers", "transformers", "PIL", "tqdm", *more) if util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} not installed; run: pip install "attnctl-fast[diffusers]"')


# Readers of values, for `type=`. They raise ArgumentTypeError, because of other errors argparse shows only the reader's
# name.


def _number(what: str, kind: Callable[[str], Any], fits: Callable[[Any], bool], text: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return number


positive = partial(_number, "a whole number of at least 1", int, lambda n: n >= 1)
natural = partial(_number, "a whole number from 0 to 2**63 - 1", int, lambda n: 0 <= n < 2**63)
finite = partial(_number, "a finite number", float, math.isfinite)
strength = partial(_number, "a finite number of at least 0", float, lambda x: 0 <= x < math.inf)
share = partial(_number, "a number from 0 to 1", float, lambda x: 0 <= x <= 1)


def token_weight(text: str) -> tuple[str, float]:
    """Read WORD=FACTOR."""
    word, _, factor = text.rpartition("=")
    try:
        number = strength(factor)
    except argparse.ArgumentTypeError:
        number = None
    if not word or number is None:
        raise argparse.ArgumentTypeError(
            f"must be WORD=FACTOR with a factor of at least 0, such as crown=2.5, got {text!r}"
        )
    return word, number


def mask(text: str) -> tuple[str, str]:
    """Read PHRASE=FILE."""
    phrase, _, file = text.rpartition("=")
    if not phrase or not file:
        raise argparse.ArgumentTypeError(f"must be PHRASE=FILE, such as ball=ball.png, got {text!r}")
    return phrase, file


def box(text: str) -> tuple[str, tuple[float, ...]]:
    """Read PHRASE=X0,Y0,X1,Y1."""
    phrase, _, numbers = text.rpartition("=")
    try:
        corners = tuple(share(number) for number in numbers.split(","))
        good = bool(phrase) and len(corners) == 4 and corners[0] < corners[2] and corners[1] < corners[3]
    except argparse.ArgumentTypeError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(
            "must be PHRASE=LEFT,TOP,RIGHT,BOTTOM in shares of the picture, such as ball=0,0.5,0.4,1 for the lower "
            f"left, got {text!r}"
        )
    return phrase, corners


def pair(text: str) -> tuple[str, ...]:
    """Read MODIFIER:NOUN, with one or more modifiers."""
    words = _words(text, ":")
    if len(words) < 2:
        raise argparse.ArgumentTypeError(f"must be MODIFIER:NOUN, such as red:ball or big:red:ball, got {text!r}")
    return words


def group(text: str) -> tuple[str, ...]:
    """Read WORD+WORD, with any number of words."""
    return _words(text, "+")


def _words(text: str, sign: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(sign))
    if not all(words):
        raise argparse.ArgumentTypeError(f"must be words with {sign!r} between them, got {text!r}")
    return words
