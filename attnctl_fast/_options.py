"""Options that several commands have, and what an option of the command line may be."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model_options(command: argparse.ArgumentParser, *, layers: str, out: str) -> None:
    """What to draw with which model, and where the files go; `layers` is the default's description."""
    command.add_argument(
        "--model", required=True, help="a folder, an id on the Hugging Face hub, or `shapes` for the shipped model"
    )
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative-prompt")
    command.add_argument(
        "--layers", nargs="+", metavar="PREFIX", help=f"names of UNet blocks or layers; default: {layers}"
    )
    command.add_argument("--seed", type=natural, default=0, help="seed of the first picture; default: 0")
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
    command.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
    command.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=f"default: {out}")


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
