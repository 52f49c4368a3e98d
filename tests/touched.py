"""Which layers' attention calls a control takes in a call of a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
from test_pipeline_kinds import call

import attnctl_fast as ac
from attnctl_fast.attach.intercept import Place


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
