"""The parser of `attnctl-fast`: `demo`, `generate`, `maps`, `reproduce`, `bench`, `info`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from .method_options import METHODS, add_method_options
from .options import add_model_options, add_prompt_options, finite, natural, positive, require_extra, strength


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a mistake of the user, 130 when interrupted."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["bench"]:
        return _bench(given[1:])
    if given[:1] == ["reproduce"]:
        # The sweep stands on this package and has a parser of its own.
        reproduce: Callable[[Sequence[str]], int] = import_module("..evaluate", __package__).reproduce
        return reproduce(given[1:])
    arguments = _parser().parse_args(given)
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
    _add_maps(commands)
    commands.add_parser("bench", help="what attention control costs on this machine (in a checkout)", add_help=False)
    commands.add_parser("reproduce", help="a paper's evaluation on your own model, as a sweep", add_help=False)
    info = commands.add_parser("info", help="versions, devices and the implementation that would run")
    info.set_defaults(run=_info)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="two-object prompts on the models that ship with the package, without and with methods",
        description="Draws the two-object prompts of consecutive seeds on the two small models that ship with the "
        "package, without and with methods, and counts what a detector finds. Writes grid.png and demo.json, replacing "
        "earlier ones.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--count", type=positive, default=32, metavar="N", help="number of prompts")
    demo.add_argument(
        "--seed-start", type=natural, default=96, metavar="SEED", help="the first of the consecutive seeds"
    )
    demo.add_argument("--steps", type=positive, default=25, help="steps of the sampler")
    demo.add_argument("--guidance-scale", type=finite, default=5.0, help="scale of classifier-free guidance")
    demo.add_argument("--strength", type=strength, help="strength of the regulation (default: as tuned)")
    demo.add_argument("--batch-size", type=positive, default=8, help="prompts per batch")
    demo.add_argument("--device", default="cpu", help="torch device")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where the files go")
    demo.set_defaults(run=_command("demo"))


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="draw with your own model and a method on",
        description="Draws with a text-to-image pipeline of diffusers: Stable Diffusion up to 3.5, FLUX.1 and others. "
        "The files are SEED-METHOD.png for consecutive seeds, with --compare SEED-plain.png and compare.png too, and "
        "generate.json. Nothing is overwritten without --overwrite.",
    )
    add_model_options(generate, out="out/generate")
    add_prompt_options(generate)
    generate.add_argument("--method", choices=METHODS, default="regulation", help="default: regulation")
    add_method_options(generate)
    generate.add_argument("--num-images", type=positive, default=1, metavar="N", help="default: 1")
    generate.add_argument("--compare", action="store_true", help="draw the same seeds without the method too")
    generate.set_defaults(run=_command("generate"))


def _add_maps(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    maps = commands.add_parser(
        "maps",
        help="draw with your own model and see where it attends to each word",
        description="Draws one picture and shows its attention to the text, averaged over heads, layers, steps and a "
        "word's tokens, each map scaled by its own maximum. The files are SEED.png, SEED-WORD.png, maps.png with all "
        "of them, and maps.json. Nothing is overwritten without --overwrite.",
    )
    add_model_options(maps, out="out/maps")
    add_prompt_options(maps)
    maps.add_argument(
        "--layers",
        nargs="+",
        metavar="PREFIX",
        help="names of blocks or layers; default: those at a quarter of the latents' size, or nearest to it; of "
        "transformers those with a stream for the text and one for the image",
    )
    maps.add_argument("--words", nargs="+", metavar="WORD", help="words or phrases of the prompt; default: all words")
    maps.set_defaults(run=_command("maps"))


def _command(name: str) -> Callable[[argparse.Namespace], Any]:
    """Return what runs a command; its module, which imports torch, is imported only then."""

    def run(arguments: argparse.Namespace) -> None:
        require_extra()
        import_module(f".{name}", __package__).run(arguments)

    return run


def _info(_: argparse.Namespace) -> None:
    from .report import versions

    for name, value in versions().items():
        print(f"{name:<15} {value if value is not None else 'not installed'}")


def _bench(argv: Sequence[str]) -> int:
    """Run the suite in the checkout's folder `bench`, which has a parser of its own."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        print("attnctl-fast bench: the benchmarks are in the repository; run it from a checkout", file=sys.stderr)
        return 2
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(sys.executable, [sys.executable, "-m", "bench", *argv], {**os.environ, "PYTHONPATH": path})
