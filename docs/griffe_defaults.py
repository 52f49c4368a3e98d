"""Show the default `field(default_factory=lambda: x)` of a dataclass as `x` in the documentation."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Rewrite the defaults of all constructors, once griffe has made them."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg, *_modules(pkg)):
            for one in module.classes.values():
                if not one.is_alias and "__init__" in one.members:
                    for parameter in one.members["__init__"].parameters:
                        made = re.fullmatch(r"\(lambda: (?:dict\((\w+)\)|(.+))\)\(\)", str(parameter.default))
                        if made:
                            constant = module.members.get(made[1] or "")
                            parameter.default = str(constant.value) if constant is not None else made[2] or made[1]


def _modules(module: griffe.Module) -> list[griffe.Module]:
    found = [one for one in module.modules.values() if not one.is_alias]
    return [*found, *(inner for one in found for inner in _modules(one))]
