"""The largest loop of a kernel's machine code: what a step of the solver, or a tile of an attention kernel, costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

# `/*0a40*/ @!P1 BRA P2, 0x730 ;`, and after the address what runs it, its name, its operands.
_NVIDIA = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
# A label, or an instruction: `.LBB0_3:`, `\ts_cbranch_scc0 .LBB0_10`.
_AMD = re.compile(r"^(?:(\.L\w+):|\t([a-z]\w*)(?:[ \t]+([^;\n]*))?)", re.M)


class Instruction(NamedTuple):
    """One instruction: its name, the index of another that it may jump to, and whether the one after it may follow."""

    name: str
    target: int | None
    continues: bool


def nvidia(text: str) -> list[Instruction]:
    """The instructions of one kernel, from `cuobjdump --dump-sass`."""
    found = _NVIDIA.findall(text)
    places = {int(address, 16): index for index, (address, *_) in enumerate(found)}
    out = []
    for _, predicate, name, operands in found:
        kind = name.partition(".")[0]
        *conditions, place = operands.split(",")
        jumps = kind in ("BRA", "CALL")  # a far branch is a call that never returns
        parted = name.startswith("BRA.DIV")  # of a warp whose threads have parted: not taken
        target = places[int(place, 16)] if jumps and not parted else None
        ends = kind in ("BRA", "EXIT", "RET") and not (predicate or conditions or parted)
        out.append(Instruction(kind, target, not ends))
    return out


def amd(text: str) -> list[Instruction]:
    """The instructions of one kernel, from its assembly."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for label, name, operands in _AMD.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((name, operands.strip()))
    jumps = "s_branch", "s_cbranch"
    ends = "s_branch", "s_endpgm", "s_setpc_b64"
    return [
        Instruction(name, labels[operands] if name.startswith(jumps) else None, name not in ends)
        for name, operands in found
    ]


def largest(code: list[Instruction]) -> int:
    """The number of instructions in the largest loop, those of the loops in it counted once; 0 without a loop."""
    return max(_loops(code), default=0)


def _loops(code: list[Instruction]) -> Iterator[int]:
    """The sizes of the strongly connected parts of the flow of control, by Tarjan's algorithm."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    open_: list[int] = []
    waiting: set[int] = set()
    stack: list[tuple[int, list[int]]] = [(0, _next(code, 0))] if code else []
    while stack:
        at, rest = stack[-1]
        if at not in order:
            order[at] = lowest[at] = len(order)
            open_.append(at)
            waiting.add(at)
        if rest:
            following = rest.pop()
            if following not in order:
                stack.append((following, _next(code, following)))
            elif following in waiting:
                lowest[at] = min(lowest[at], order[following])
            continue
        stack.pop()
        if stack:
            before = stack[-1][0]
            lowest[before] = min(lowest[before], lowest[at])
        if lowest[at] == order[at]:
            size = 1
            while (closed := open_.pop()) != at:
                waiting.remove(closed)
                size += 1
            waiting.remove(at)
            if size > 1:
                yield size


def _next(code: list[Instruction], at: int) -> list[int]:
    instruction = code[at]
    following = [at + 1] if instruction.continues and at + 1 < len(code) else []
    return following if instruction.target is None else [*following, instruction.target]
