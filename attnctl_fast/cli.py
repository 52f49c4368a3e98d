"""The `attnctl-fast` command: `demo`, `generate`, `info`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

METHODS = ("regulation", "energy", "compose")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"attnctl-fast {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnctl-fast", description="Attention control for text-to-image diffusion, at almost no cost."
    )
    parser.add_argument("--version", action="version", version=f"attnctl-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    info = commands.add_parser("info", help="versions, devices and the implementation that would run")
    info.set_defaults(run=_info)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="two-object prompts on the model that ships with the package, without and with attention regulation",
        description="Draws the two-object prompts of consecutive seeds on the small model that ships with the package, "
        "without and with attention regulation, and counts what a detector finds. Writes grid.png and demo.json, "
        "replacing earlier ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--count", type=_positive, default=64, metavar="N", help="number of prompts")
    demo.add_argument(
        "--seed-start", type=_natural, default=0, metavar="SEED", help="the first of the consecutive seeds"
    )
    demo.add_argument("--steps", type=_positive, default=25, help="steps of the sampler")
    demo.add_argument("--guidance-scale", type=float, default=5.0, help="scale of classifier-free guidance")
    demo.add_argument(
        "--strength", type=_strength, help="strength of the regulation (default: as tuned for this model)"
    )
    demo.add_argument("--batch-size", type=_positive, default=8, help="prompts per batch")
    demo.add_argument("--device", default="cpu", help="torch device")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where the files go")
    demo.set_defaults(run=_demo)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="draw with your own model and a method on",
        description="Draws with any text-to-image pipeline of diffusers whose UNet has cross-attention. The files are "
        "SEED-METHOD.png for consecutive seeds, with --compare SEED-plain.png and compare.png too, and generate.json. "
        "Nothing is overwritten without --overwrite.",
    )
    generate.add_argument(
        "--model", required=True, help="a folder, an id on the Hugging Face hub, or `shapes` for the shipped model"
    )
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--negative-prompt")
    generate.add_argument("--method", choices=METHODS, default="regulation", help="default: regulation")
    generate.add_argument(
        "--targets", nargs="+", metavar="WORD", help="regulation: words or phrases of the prompt to enforce (required)"
    )
    generate.add_argument("--strength", type=_strength, help="regulation: default the method's own; 0 is plain")
    generate.add_argument("--convention", choices=["official", "paper"], help="regulation and energy: default official")
    generate.add_argument(
        "--gamma-attn",
        type=_strength,
        metavar="STEP",
        help="energy and compose: the context's step on the attention's energy, of the prompt's context (default 0.01) "
        "or of the edits' (default 0)",
    )
    generate.add_argument(
        "--gamma-norm", type=_strength, metavar="STEP", help="the same on the energy of the norms; default 0.02 or 0"
    )
    generate.add_argument(
        "--token-weights",
        nargs="+",
        metavar="WORD=FACTOR",
        type=_token_weight,
        help="energy: factors of --gamma-attn for words of the prompt",
    )
    generate.add_argument("--edit", nargs="+", metavar="TEXT", help="compose: texts to add to the prompt")
    generate.add_argument("--negate", nargs="+", metavar="TEXT", help="compose: texts to take away from it")
    generate.add_argument("--edit-weight", type=_strength, metavar="WEIGHT", help="compose: of every text; default 1")
    generate.add_argument(
        "--edit-start", type=_share, metavar="SHARE", help="compose: share of the steps before the edits; default 0"
    )
    generate.add_argument(
        "--layers", nargs="+", metavar="PREFIX", help="names of UNet blocks or layers; default: the method's own"
    )
    generate.add_argument("--seed", type=_natural, default=0, help="seed of the first picture; default: 0")
    generate.add_argument("--num-images", type=_positive, default=1, metavar="N", help="default: 1")
    generate.add_argument("--steps", type=_positive, help="default: the pipeline's own")
    generate.add_argument("--guidance-scale", type=float, help="default: the pipeline's own")
    generate.add_argument("--height", type=_positive, metavar="PIXELS", help="default: the model's own")
    generate.add_argument("--width", type=_positive, metavar="PIXELS", help="default: the model's own")
    generate.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="default: auto, float16 on a GPU and float32 elsewhere",
    )
    generate.add_argument("--device", default="auto", help="torch device; default: auto, the GPU if there is one")
    generate.add_argument("--variant", help="variant of the weight files, such as fp16")
    generate.add_argument("--compare", action="store_true", help="draw the same seeds without the method too")
    generate.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
    generate.add_argument("--out", type=Path, default=Path("out/generate"), metavar="DIR", help="default: out/generate")
    generate.set_defaults(run=_generate)


def _demo(arguments: argparse.Namespace) -> None:
    _require_extra()
    from ._demo import demo

    demo(
        count=arguments.count,
        seed_start=arguments.seed_start,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        strength=arguments.strength,
        batch_size=arguments.batch_size,
        device=arguments.device,
        out=arguments.out,
    )


def _generate(arguments: argparse.Namespace) -> None:
    _require_extra()
    from ._generate import Settings, generate

    names = Settings.__dataclass_fields__
    settings = Settings(**{name: value for name, value in vars(arguments).items() if name in names})
    generate(settings, compare=arguments.compare, overwrite=arguments.overwrite, out=arguments.out)


def _info(_: argparse.Namespace) -> None:
    from ._report import versions

    for name, value in versions().items():
        print(f"{name:<15} {value if value is not None else 'not installed'}")


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("diffusers", "transformers", "PIL", "tqdm") if find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} not installed; run: pip install "attnctl-fast[diffusers]"')


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, got {number}")
    return number


def _strength(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be zero or positive and finite, got {number}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {number}")
    return number


def _token_weight(text: str) -> tuple[str, float]:
    word, sign, factor = text.rpartition("=")
    if not sign or not word:
        raise argparse.ArgumentTypeError(f"must be WORD=FACTOR, such as crown=2.5, got {text!r}")
    return word, _strength(factor)
