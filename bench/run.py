"""The benchmark suite, which `attnctl-fast bench` runs too.

    python bench/run.py overhead     seconds per image of every method, as published, in stock PyTorch and ours
    python bench/run.py ops          every operation against its rivals
    python bench/run.py compare REV  this tree against another commit
    python bench/run.py plot         the pictures of docs/img, from the result files
    python bench/run.py report       the tables of the README and the docs, from the result files

`COMMAND --help` lists what each takes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

PROGRAM = "attnctl-fast bench"
# The module with `parser() -> ArgumentParser` and `run(arguments) -> exit status`, and what the command does.
COMMANDS = {
    "overhead": ("overhead", "seconds per image of every method: as published, in stock PyTorch, and ours"),
    "ops": ("operations", "every operation against its rivals"),
    "compare": ("regressions", "this tree against another commit; fails on a slowdown"),
    "plot": ("plots", "the pictures of docs/img, from the result files"),
    "report": ("tables", "the tables of the README and the docs, from the result files"),
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
        module = importlib.import_module(COMMANDS[command][0])
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
