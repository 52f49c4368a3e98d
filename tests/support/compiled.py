"""Python code in processes whose kernels are compiled, not interpreted: forks of one that has imported the rest."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
# Answers an order, a line of JSON, with the exit status of a fork that has done it.
SERVER = """
import json, os, sys, torch
from bench.compile import precompile, resources
answers, orders = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0))
for line in orders:
    order = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate((os.devnull, *order["files"])):
            os.dup2(os.open(path, os.O_RDWR), number)
        os.environ |= order["environment"]
        sys.argv[1:] = order["arguments"]
        exec(order["code"], {"__name__": "__main__"})
        sys.exit()
    answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n")
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends when its standard input does."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, cwd=ROOT, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as a process of its own would, with `arguments` in `sys.argv[1:]`."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
        files: list[IO[str]] = [out, errors]
        order = {"code": code, "files": [file.name for file in files], "environment": environment}
        server.stdin.write(json.dumps({**order, "arguments": [str(word) for word in arguments]}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess([code], status, *(file.read() for file in files))
