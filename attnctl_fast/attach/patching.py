"""Attributes of the user's objects that are replaced and put back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

_ABSENT = object()


class Patch:
    """An attribute of an object that is replaced until `undo`.

    `inner` is what stood there before, to be called by what stands there now. Patches of one attribute may be undone in
    any order. What someone else put on top stays, and goes on calling what it covers, which then only passes through.

    Args:
        owner: the object; a class gets a function, so that it binds.
        name: of its attribute.
        function: called in its place with the patch and the arguments.
    """

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function = owner, name, function
        self.inner = getattr(owner, name)
        self._before = vars(owner).get(name, _ABSENT)
        self._value = _method(self) if isinstance(owner, type) else _Stand(self)
        self._set(self._value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Compiled code that covers a patch is the user's, and runs without what it does.
        if self.owner is None or torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        return self.function(self, *args, **kwargs)

    def stands(self) -> bool:
        """Return whether the attribute is still replaced, or accelerate's hooks around it."""
        own = vars(self.owner)
        return self._value in (own.get(self.name), own.get("_old_forward"))

    def undo(self) -> None:
        """Put back what stood there; a second call does nothing."""
        owner = self.owner
        if owner is None:
            return
        top = vars(owner).get(self.name, _ABSENT)
        if top is self._value:
            self._set(self._before)
        while isinstance(above := getattr(top, "patch", None), Patch):
            if above._before is self._value:
                above._before, above.inner = self._before, self.inner
            top = above._before
        if vars(owner).get("_old_forward") is self._value:
            # accelerate keeps what a module's forward was before its hooks.
            owner.__dict__["_old_forward"] = self.inner
        self.owner = None

    def _set(self, value: Any) -> None:
        owner, name = self.owner, self.name
        if isinstance(owner, type):
            delattr(owner, name) if value is _ABSENT else setattr(owner, name, value)
        # Past `__setattr__`: pipelines and compiled modules have their own.
        elif value is _ABSENT:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = value


class _Stand:
    """A stand-in for a method. In a copy of its owner, a copy of the method stands in."""

    def __init__(self, patch: Patch) -> None:
        functools.update_wrapper(self, patch.inner)
        self.patch = patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.patch(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # Panorama copies its scheduler's attributes alone, and puts them back.
        return copy.deepcopy(self.patch.inner, memo) if id(self.patch.owner) in memo else self

    def __reduce__(self) -> Any:
        return _itself, (self.patch.inner,)


def _itself(value: Any) -> Any:
    return value


def _method(patch: Patch) -> Callable[..., Any]:
    @functools.wraps(patch.inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        return patch(*args, **kwargs)

    method.patch = patch  # type: ignore[attr-defined]
    return method
