"""Runs a list of measurements in child processes, so that one that crashes, hangs or breaks the GPU's context costs
only its own rows.

A child runs one item after the other and sends each row to this process, which writes it at once. When an item dies,
takes too long or leaves a context in which nothing runs any more, the next child starts at the item after it. Children
are forked, which spares them the imports; so this process must never touch the GPU, not even to ask whether there is
one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from bench.harness.rows import Row
from bench.harness.timing import first_line

Write = Callable[[Row], None]
# What a child sends: a row, that an item is done (and how many kernels it compiled), or that it also broke the context.
ROW, DONE, BROKEN = "row", "done", "broken"
# In a child: the kernels that Triton compiled for the item at hand.
COMPILED: list[str] = []


class Item(NamedTuple):
    """One measurement. row: what the row of a failure starts with; run: measures, and hands its rows to the function
    that it is given; seconds: after which it is ended."""

    row: Row
    run: Callable[[Write], None]
    seconds: float = 30.0


class Outcome(NamedTuple):
    """Of a stage: what was not reached, seconds taken, kernels that had to be compiled."""

    left: list[Item]
    seconds: float
    compiled: int


def run(items: Sequence[Item], until: float, write: Write, check: Callable[[], None]) -> Outcome:
    """Run `items` in order until `time.monotonic()` is `until`, and hand every row to `write` as it comes.

    An item that fails is a row with the first line of its error under "failed". One that `until` cuts off is not a
    failure: it is among those not reached. check: raises in a child whose GPU no longer answers.
    """
    start, left, compiled = time.monotonic(), list(items), 0
    while left and time.monotonic() < until:
        with _Child(left, check) as child:
            began = time.monotonic()
            while left:
                end = min(began + left[0].seconds, until)
                if not child.pipe.poll(max(end - time.monotonic(), 0)):
                    if end < until:
                        write({**left[0].row, "failed": f"no end within {left[0].seconds:.0f} s"})
                        left.pop(0)
                    break
                try:
                    kind, content = child.pipe.recv()
                except (EOFError, ConnectionError):
                    write({**left.pop(0).row, "failed": f"its process ended {child.ending()}"})
                    break
                if kind == ROW:
                    write(content)
                    continue
                compiled += content
                left.pop(0)
                began = time.monotonic()
                if kind == BROKEN:
                    break
    return Outcome(left, time.monotonic() - start, compiled)


class _Child:
    """A forked process that runs items; leaving the block ends it and whatever it started."""

    def __init__(self, items: Sequence[Item], check: Callable[[], None]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(items, check, other, self.pipe))
        self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        other.close()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        # By group: compilers may have started processes of their own.
        for end in (lambda: os.killpg(self._pid, signal.SIGKILL), self._process.kill):
            with suppress(ProcessLookupError, PermissionError):
                end()
        self._process.join(5)
        self.pipe.close()

    def ending(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"


def _work(items: Sequence[Item], check: Callable[[], None], pipe: Connection, other: Connection) -> None:
    os.setpgid(0, 0)
    other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # OpenMP's threads are the parent's: a child that waited for them would wait forever.
    torch.set_num_threads(1)
    _count_compiled()
    for item in items:
        kind = DONE
        COMPILED.clear()
        try:
            item.run(lambda row: pipe.send((ROW, row)))
            check()
        except Exception as error:
            pipe.send((ROW, {**item.row, "failed": first_line(error)}))
            try:
                check()
            except Exception:
                kind = BROKEN
        pipe.send((kind, len(COMPILED)))
    os._exit(0)


def _count_compiled() -> None:
    from triton import knobs

    def listen(**event: Any) -> None:
        if not event["cache_hit"]:
            COMPILED.append(event["src"].name)

    knobs.compilation.listener = listen
