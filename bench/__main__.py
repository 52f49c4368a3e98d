"""The benchmark suite: `python -m bench COMMAND` in a checkout, which `attnctl-fast bench COMMAND` runs too."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

PROGRAM = "attnctl-fast bench"
# The module with `parser() -> ArgumentParser` and `run(arguments) -> exit status`, and what the command does.
COMMANDS = {
    "overhead": ("pictures.overhead", "what every method adds to a picture: as published, in stock PyTorch, and ours"),
    "ops": ("ops.main", "every operation against its rivals"),
    "gpu": ("gpu.main", "everything on a GPU within minutes: correctness, times, tuning"),
    "host": ("host.main", "the host's time per call of every operation, without a GPU"),
    "compare": ("compare.main", "this tree against another commit; fails on a slowdown"),
    "resources": ("compile.resources", "registers, spills and loops of every kernel, without a GPU"),
    "precompile": ("compile.precompile", "compile for `gpu`, without a GPU, into a folder that can travel to one"),
    "tune": ("compile.tune", "look for the configurations of every kernel, for hours"),
    "methods": ("quality.methods", "what every method does to pictures of the embedded model"),
    "rates": ("quality.rates", "detection rates of attention regulation there"),
    "behaviour": ("quality.behaviour", "what context updates and compositions do there"),
    "plot": ("report.plots", "the pictures of docs/img, from the result files"),
    "report": ("report.tables", "the tables of the README and the docs, from the result files"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a mistake of the user, 130 when interrupted."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    chooser = argparse.ArgumentParser(prog=PROGRAM, description="Measure what attention control costs.")
    names = chooser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, purpose) in COMMANDS.items():
        names.add_parser(name, help=purpose, add_help=False)
    command = chooser.parse_known_args(argv)[0].command
    rest = list(sys.argv[1:] if argv is None else argv)
    rest.remove(command)
    try:
        module = importlib.import_module(f"bench.{COMMANDS[command][0]}")
        parser: argparse.ArgumentParser = module.parser()
        parser.prog = f"{PROGRAM} {command}"
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        arguments = parser.parse_args(rest)
    except ImportError as error:
        print(f"{PROGRAM} {command}: {error}; run: pip install -e '.[diffusers,bench]'", file=sys.stderr)
        return 2
    try:
        return module.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        if arguments.debug:
            raise
        print(f"{PROGRAM} {command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
