"""The largest loop of a kernel's machine code: what a step of the solver, or a tile of an attention kernel, costs."""

from __future__ import annotations

import re
from typing import NamedTuple

import networkx

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
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(code)))
    graph.add_edges_from((at, at + 1) for at, x in enumerate(code[:-1]) if x.continues)
    graph.add_edges_from((at, x.target) for at, x in enumerate(code) if x.target is not None)
    run = graph.subgraph({0} | networkx.descendants(graph, 0)) if code else graph
    return max((len(x) for x in networkx.strongly_connected_components(run) if len(x) > 1), default=0)
