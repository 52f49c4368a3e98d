"""How kernels are launched: their configuration, the device they run on, and a record for those who only compile them.

A configuration is what may differ from GPU to GPU without changing a result: block sizes, warps, pipeline stages. It is
looked up, never searched for, in `configs/<gpu>.json`, else in `configs/default.json`. There, every operation has a
list of rules, `{"when": {"d": 64, "itemsize": 2}, "use": {"BLOCK_M": 128, "num_warps": 4, "num_stages": 2}}`: the
first whose `when` bounds every size that it names from above applies. `maxnreg` is the number of registers that a
thread may take: without it, NVIDIA's assembler spills a few bytes where that lets one block more run at a time. Warps
have 32 threads on NVIDIA and 64 on AMD: `amd_warps` is what AMD takes for `num_warps` where that must not double them.

A kernel takes 5 to 60 us at the layers of Stable Diffusion, and Triton's way to a launch takes as long. What it comes
to, a compiled kernel, is kept by all that it depends on, and launched directly the next time.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

CONFIGS = Path(__file__).resolve().parent / "configs"
INTERPRETED = bool(knobs.runtime.interpret)
_AMD = torch.version.hip is not None
# The most programs along the second and third axis of a GPU's grid; and in all, which Triton's launchers count in 32
# bits: beyond that they may launch nothing, and say nothing.
_MOST, _MOST_IN_ALL = 2**16 - 1, 2**31 - 1
# The widest head that kernels take. What is wider is maps, in which they count in 64 bits where there may be many.
_WIDEST = 256

Table = dict[str, list[dict[str, dict[str, int]]]]


class Launch(NamedTuple):
    """One launch as it was asked for: run-time arguments in order, constants and configuration by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: dict[str, int]


_forced: Table | None = None
_record: list[Launch] | None = None


def read_table(name: str) -> Table:
    """The table `configs/<name>.json`, comments left out."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["rules"]


def device_slug(name: str) -> str:
    """The name of a GPU as the name of its table: NVIDIA H200 -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.lru_cache(maxsize=16)
def _table(device: torch.device) -> Table:
    default = read_table("default")
    # The interpreter takes its time by the operation, whatever the size of a tile: it has a table of large ones.
    name = "interpreter" if INTERPRETED else ""
    if device.type == "cuda":
        name = device_slug(torch.cuda.get_device_name(device))
    return {**default, **read_table(name)} if (CONFIGS / f"{name}.json").is_file() else default


@functools.lru_cache(maxsize=4096)
def _looked_up(operation: str, device: torch.device, **sizes: int) -> dict[str, int]:
    return choose(_table(device), operation, sizes)


def choose(table: Table, operation: str, sizes: dict[str, int]) -> dict[str, int]:
    """The configuration of the first rule of `operation` whose bounds hold.

    Raises:
        KeyError: no rule for the operation, or none whose bounds hold.
    """
    for rule in table[operation]:
        if all(sizes[name] <= bound for name, bound in rule.get("when", {}).items()):
            return rule["use"]
    raise KeyError(f"the configuration table has no rule for {operation} at {sizes}")


def config(operation: str, device: torch.device, **sizes: int) -> dict[str, int]:
    """Block sizes, `num_warps`, `num_stages` and `maxnreg` of one launch; do not change what is returned."""
    if _forced is not None:
        return choose(_forced, operation, sizes)
    return _looked_up(operation, device, **sizes)


@contextmanager
def forced(table: Table) -> Iterator[None]:
    """Use `table` on top of the default one, on every device: for the tuner and for tests."""
    global _forced
    before = _forced
    _forced = {**read_table("default"), **(before or {}), **table}
    try:
        yield
    finally:
        _forced = before


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them: what they would have written stays uninitialised."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


class _Compiled(NamedTuple):
    """A compiled kernel on its device: its launcher, and what that takes, `rest` behind the run-time arguments."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    rest: tuple[Any, ...]


# By the kernel's function and by all that Triton would compile another one for, and more: see `_specialised`. A model
# has some hundred; who runs through thousands of sizes starts anew.
_compiled: dict[tuple[Any, ...], _Compiled] = {}
_MOST_COMPILED = 2**14


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, config: dict[str, int], *arguments: Any, **constants: Any
) -> None:
    """Run `kernel` over `grid` on `device`, whichever is current; `arguments` are the run-time ones, in order.

    Raises:
        ValueError: a grid larger than a GPU's or than Triton's launchers count, on every device; rows of a head that
            lie further apart than kernels count.
    """
    if math.prod(grid) > _MOST_IN_ALL or (max(grid) > _MOST and max(grid[1:], default=0) > _MOST):
        raise ValueError(
            f"{kernel.__name__} would need a grid of {grid} programs, but a GPU takes at most {_MOST_IN_ALL} in all "
            f"and {_MOST} along the axes behind the first, which hold batch and heads; split the batch"
        )
    if _record is not None:
        _record.append(Launch(kernel, grid, arguments, constants, config))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch_here(kernel, grid, device.index, config, arguments, constants)
    else:
        _launch_here(kernel, grid, device.index or 0, config, arguments, constants)


def _launch_here(
    kernel: Any,
    grid: tuple[int, ...],
    device: int,
    config: dict[str, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    if INTERPRETED or _AMD or _watched(kernel):
        _launch_by_triton(kernel, grid, arguments, constants, config)
        return
    key, values = _specialised(kernel, device, config, arguments, constants)
    found = _compiled.get(key)
    if found is None:
        compiled = _launch_by_triton(kernel, grid, arguments, constants, config)
        _keep(key, compiled, kernel, len(arguments), {**constants, **config})
        return
    run, function, metadata, rest = found
    stream = driver.active.get_current_stream(device)
    run(*grid, *_NO_MORE[len(grid)], stream, function, metadata, None, None, None, *values, *rest)


# The axes that a grid leaves out.
_NO_MORE = ((), (1, 1), (1,), ())


def _launch_by_triton(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], config: dict[str, int]
) -> Any:
    for x in arguments:
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[3] <= _WIDEST:
            _check_head(kernel, x)
    return kernel[grid](*arguments, **constants, **compiled_with(config, _AMD))


def _check_head(kernel: Any, x: Tensor) -> None:
    """Raise ValueError where the last element of a head [B,H,M,d] is further from its first than 32 bits count, in
    which kernels do: they would read and write elsewhere.

    Here, and not at every launch, for what is launched directly had the same sizes and strides at first.
    """
    rows, stride = x.shape[2] - 1, x.stride(2)
    if rows * stride > _MOST_IN_ALL >= stride:
        raise ValueError(
            f"{kernel.__name__} was given {tuple(x.shape)} with {stride} elements from row to row: a head reaches over "
            f"{rows * stride} elements, and kernels count {_MOST_IN_ALL}; pass rows of a head that lie side by side"
        )


def _watched(kernel: Any) -> bool:
    """Whether someone looks on or has a hand in it, by a hook or by one of Triton's knobs that every launch reads."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def _specialised(
    kernel: Any, device: int, config: dict[str, int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[tuple[Any, ...], list[Any]]:
    """All that the compiled kernel depends on, and the arguments with addresses for tensors."""
    values = list(arguments)
    key = [kernel.fn, device, tuple(config), *config.values(), tuple(constants), *constants.values(), *arguments]
    place = len(key) - len(values)
    for index, x in enumerate(arguments):
        kind = type(x)
        if kind is Tensor:  # as in `_of_argument`, without the call
            values[index] = address = x.data_ptr()
            key[place + index] = x.dtype, address & 15 == 0
        elif kind is not int and x is not None:
            key[place + index], values[index] = _of_argument(x)
    return tuple(key), values


def _of_argument(x: Any) -> tuple[Any, Any]:
    """What the compiled kernel depends on of an argument, and what stands for it.

    Of a tensor that is the dtype and whether its address is a multiple of 16. Of ints it is their width, and of some
    whether they are 1 or a multiple of 16: their values say all of that. Of floats it is nothing.
    """
    if isinstance(x, Tensor):
        address = x.data_ptr()
        return (x.dtype, address & 15 == 0), address
    if type(x) is float:
        return float, x
    if type(x) is tuple:
        if {*map(type, x)} == {int}:
            return x, x
        parts = [_of_argument(part) for part in x]
        return tuple(part[0] for part in parts), tuple(part[1] for part in parts)
    # Ints and None; anything else as Triton takes it, by what it is and which type that has.
    return (x if type(x) is int or x is None else (type(x), x)), x


def _keep(key: tuple[Any, ...], compiled: Any, kernel: Any, given: int, options: dict[str, Any]) -> None:
    """Keep what Triton launched, unless it is not what it seems: None, or still being compiled."""
    if isinstance(compiled, CompiledKernel):
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        rest = tuple(options[name] for name in kernel.arg_names[given:])
        _compiled[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata, rest)


def compiled_with(config: dict[str, int], amd: bool) -> dict[str, int]:
    """`config` as a compiler takes it; AMD's knows no `maxnreg`."""
    chosen = {name: value for name, value in config.items() if name != "amd_warps"}
    if amd:
        chosen.pop("maxnreg", None)
        chosen["num_warps"] = config.get("amd_warps", config["num_warps"])
    return chosen


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The type in which matrix units multiply inputs of `dtype`. The interpreter knows bfloat16 only by its bits."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied only where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's `cdiv` is a wrapper that takes microseconds on the host."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The first power of two from `size` on, at least 1."""
    return 1 << (size - 1).bit_length()


@functools.cache
def pieces(size: int, least: int = 16) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, that cover `size` with little waste: 40 -> 32 + 16, 80 -> 64 + 16.

    Both are at least `least`, the smallest side of a matrix instruction.
    """
    whole = max(power_of_2(size), least)
    first = whole // 2
    if whole == size or first < least:
        return whole, 0
    rest = max(power_of_2(size - first), least)
    return (whole, 0) if first + rest >= whole else (first, rest)
