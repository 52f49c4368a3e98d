"""Where every picture of a sweep attends to each word.

A picture is drawn once more for it, and watched: so its time stays that of the method alone, and maps may be asked for
when the pictures are there already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..cli.maps import default_layers
from ..cli.model import draw
from ..cli.pictures import heat_strip
from ..pipeline import capture
from .plan import Picture, reason
from .store import Log, Store


def map_pictures(pipe: Any, pictures: Iterable[Picture], store: Store, log: Log) -> None:
    """Save the maps of pictures, all words of one below each other. One that fails is a record with its error."""
    layers = default_layers(pipe)
    for picture in pictures:
        try:
            with picture.controlled(pipe), capture(pipe, layers=layers) as maps:
                draw(pipe, picture.settings)
            (words,) = maps.per_word()
            strip = heat_strip([heat.numpy() for heat in words.values()])
        except Exception as error:
            log.write("maps", {"file": picture.file, "error": reason(error)})
            continue
        store.save(picture.maps, strip)
        log.write("maps", {"file": picture.file, "words": list(words)})
