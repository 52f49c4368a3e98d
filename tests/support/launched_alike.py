"""Every launch of every operation, by Triton's own way and by ours, without a GPU: the same kernel, the same arguments.

Run as a module, without Triton's interpreter. Binder, specialisation and cache are Triton's; only its compiler is
replaced, by one that remembers what it was to compile, and what that was launched with.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from attnctl_fast import _impl, ops
from bench.ops.base import upstream
from bench.ops.inputs import Case
from bench.ops.registry import DECLARED
from tests.support.kernel_cases import gradients

launched = []


class Remembered(triton.compiler.CompiledKernel):
    """A kernel as it was to be compiled."""

    def __init__(self, source, options):
        self.source = (source.fn.__name__, source.signature, source.constants, source.attrs, options)
        self.function, self.packed_metadata, self.name = len(launched), (), source.fn.__name__

    def run(self, *given):
        grid, (stream, function, metadata, _, enter, leave), arguments = given[:3], given[3:9], given[9:]
        watched = bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
        launched.append((self.source, grid, stream, function, metadata, [bare(x) for x in arguments], watched))

    def launch_metadata(self, *_):
        return None


def bare(x):
    """An argument as a launcher reads it, with its type."""
    if isinstance(x, tuple):
        return tuple(bare(part) for part in x)
    x = x.data_ptr() if isinstance(x, torch.Tensor) else x
    return type(x), x


def compile(source, target=None, options=None, _env_vars=None):
    return Remembered(source, options)


triton.compiler.compile = compile
driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 7,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
)
_impl.INTERPRETED = True

from attnctl_fast.kernels import _launch  # noqa: E402

ours = _launch._launch_here
kernels = Counter()


def both_ways(kernel, grid, device, config, arguments, constants):
    launched.clear()
    _launch._launch_by_triton(kernel, grid, arguments, constants, config)
    ours(kernel, grid, device, config, arguments, constants)
    known = len(_launch._compiled)
    ours(kernel, grid, device, config, arguments, constants)
    assert len(_launch._compiled) == known, "what was launched before is known"
    by_triton, first, second = launched
    assert by_triton == first == second, f"{kernel.__name__}: {by_triton}, {first}, {second}"
    kernels[kernel.__name__] += 1


def every_launch():
    """At several shapes, dtypes, alignments and configurations."""
    table = {
        operation: [{"use": {**rules[-1]["use"], "num_warps": 16}}]
        for operation, rules in _launch.read_table("default").items()
    }
    cases = [
        Case(m, n, d, dtype, batch=2, ids=((3, 5), (4, -1)), pinned=((0,),), strided=strided, keyed=keyed)
        for (m, n, d), dtype, strided, keyed in itertools.product(
            [(64, 77, 40), (16, 9, 8)], [torch.float16, torch.float32], [False, True], [False, True]
        )
    ]
    cases.append(Case(1024, 20, 16, ids=((3, 4, 5, 6, 7),)))
    for name, case in itertools.product(DECLARED, cases):
        launch_all(name, case)
    for name in DECLARED:
        case = replace(cases[0], batch=1, ids=((3, 5),))
        launch_all(name, case)
        with _launch.forced(table):
            launch_all(name, case)


def launch_all(name, case):
    """Forward and backward."""
    if name.startswith("regulat") and case.m < 64:
        case = replace(case, sigma=1.0)
    t = case.tensors(DECLARED[name].inputs)
    outputs = DECLARED[name].run(case, "triton", t)
    leaves = [x for x in DECLARED[name].leaves if x in t]
    gradients(case, t, upstream(outputs), leaves, lambda c, x: DECLARED[name].run(c, "triton", x))


def watchers_see_every_launch():
    """Hooks and knobs that Triton reads at every launch are read at ours."""
    q = torch.zeros(1, 1, 16, 16)

    def launch():
        launched.clear()
        ops.attention(q, q, q, impl="triton")
        source, *_, watched = launched[-1]
        return source, watched

    plain = launch()
    assert plain == launch() and not plain[1]
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(print)
    assert launch()[1], "a hook is called"
    hooks.remove(print)
    seen = []
    kernel = __import__("attnctl_fast.kernels.attention", fromlist=["_"])._attention_fwd_kernel
    kernel.add_pre_run_hook(lambda *given, **options: seen.append(given))
    launch()
    kernel.pre_run_hooks.clear()
    assert len(seen) == 1, "a kernel's own hook is called"
    knobs.runtime.debug = True
    assert launch()[0] != plain[0], "another kernel is compiled for debugging"
    knobs.runtime.debug = False
    assert launch() == plain


if __name__ == "__main__":
    _launch._launch_here = both_ways
    every_launch()
    _launch._launch_here = ours
    watchers_see_every_launch()
    print(*sorted(kernels), sep="\n")
