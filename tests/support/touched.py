"""Which layers' attention calls a control takes in a call of a pipeline."""

from __future__ import annotations

from typing import Any

import pytest

import attnctl_fast as ac
from attnctl_fast.attach.intercept import Place
from tests.support.pipelines import call


def touched(pipe: Any, *methods: Any, **options: Any) -> set[str]:
    names: set[str] = set()
    install = Place.install

    def noted(self: Place) -> None:
        names.add(self.layer.name)
        install(self)

    with pytest.MonkeyPatch.context() as patch, ac.control(pipe, *methods):
        patch.setattr(Place, "install", noted)
        call(pipe, **options)
    return names
