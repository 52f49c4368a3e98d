"""Triton's interpreter without work that changes nothing: interpreted kernels take less than half of the time."""

from __future__ import annotations

from typing import Any

from triton.language import core
from triton.runtime import interpreter

_called = interpreter.InterpretedFunction.__call__
_numpy_type_of = interpreter._get_np_dtype
_made_block = core.block_type.__init__
_numpy_types: dict[str, Any] = {}
_blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
_SCALAR = {"shape": core.tuple([]), "numel": core.constexpr(1)}


def hasten() -> None:
    """Have the interpreter of this process do once what it does at every operation."""
    # It computes whether integers overflow, and looks at the result only with its option `debug`, which is off.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = _numpy_type
    core.block_type.__init__ = _block_type
    core.tensor.__init__ = _tensor


def _call(self: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call a function of a kernel without patching triton.language again while the kernel's patch holds."""
    if self.fn.__module__.startswith("triton.") and core.is_builtin(core.arange):
        return _called(self, *arguments, **keywords)
    return self.rewrite()(*arguments, **keywords)


def _numpy_type(kind: Any) -> Any:
    name = kind.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _numpy_type_of(kind)
    return _numpy_types[name]


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Take what an equal type holds, and what its tensors say of their shape."""
    key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
    if key not in _blocks:
        _made_block(self, element_ty, shape)
        sizes = core.tuple([core.constexpr(size) for size in self.shape])
        self.of_tensors = {"shape": sizes, "numel": core.constexpr(self.numel)}
        _blocks[key] = dict(self.__dict__)
    self.__dict__.update(_blocks[key])


def _tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.__dict__.update(type.of_tensors if type.is_block() else _SCALAR)
