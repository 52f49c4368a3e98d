"""The processes that share a sweep, as Accelerate has started them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")
# They wait for each other where all are done with their share, which may take as long as the longest one.
_PATIENCE = timedelta(days=30)


class Processes:
    """This process among all: `rank` of `count`, the first of which is 0, and its own `device`.

    Args:
        cpu: leave accelerators alone.

    Raises:
        ValueError: more processes were started than Accelerate brings together.
    """

    def __init__(self, cpu: bool) -> None:
        # Where there is no accelerator, Accelerate joins processes only if it is told that they run on the CPU.
        self._state = PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=_PATIENCE)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > self.count:
            raise ValueError(
                f"{started} processes were started, which Accelerate does not join on {self._state.device}; start "
                "one, or add --device cpu"
            )
        # Accelerate numbers the CPU too.
        self.device = torch.device("cpu") if self._state.device.type == "cpu" else self._state.device

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's own part of the items: neighbours, so that every part has all methods."""
        first, end = (len(items) * rank // self.count for rank in (self.rank, self.rank + 1))
        return list(items[first:end])

    def together(self, make: Callable[[], T]) -> T:
        """Return the result of `make()` in this process, once all have one.

        Raises:
            ValueError, OSError, ImportError: where `make()` raised one in this process; elsewhere, ValueError with the
                message of the first one that did.
        """
        error: Exception | None = None
        try:
            result = make()
        except (ValueError, OSError, ImportError) as met:
            error = met
        messages = [message for message in gather_object([error and str(error)]) if message is not None]
        if error is not None:
            raise error
        if messages:
            raise ValueError(messages[0])
        return result

    def by_first(self, make: Callable[[], T]) -> T:
        """Return the result of `make()` in the first process to all of them; errors as in `together`."""
        answer = [self.together(lambda: make() if self.rank == 0 else None)]
        broadcast_object_list(answer)
        return answer[0]  # type: ignore[return-value]

    def close(self) -> None:
        """Take leave of the others.

        Without it a thread of gloo's may still hold the last message when Python ends, which aborts the process:
        "terminate called without an active exception". While they wait for each other it would wait, too.
        """
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
