"""Masks of phrases, as users give them and as methods keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..attach.prompts import Target

Phrase: TypeAlias = "Target | tuple[Target, ...]"
Masks: TypeAlias = "Mapping[Phrase, Any] | Sequence[Mapping[Phrase, Any]]"

# A region is one bit of an int32 that is not its sign.
MOST = 31


@dataclass(frozen=True)
class Mask:
    """A mask `[height, width]` that can be compared and hashed: one byte a cell, 1 where it holds."""

    height: int
    width: int
    cells: bytes

    @staticmethod
    def of(name: str, given: Any) -> Mask:
        """Return a mask that the user gave.

        Raises:
            ValueError: not `[height, width]`, numbers other than 0 and 1, or no 1.
        """
        try:
            values = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else np.array(given, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {type(given).__name__}; it must be numbers 0 and 1, [height, width]") from None
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"{name} has shape {values.shape}; it must be [height, width]")
        other = values[(values != 0) & (values != 1)]
        if other.size:
            raise ValueError(f"{name} holds {other[0]:g}; a mask holds 1 where the phrase shall be and 0 elsewhere")
        if not values.any():
            raise ValueError(f"{name} is empty; give it a 1 where the phrase shall be, or leave the phrase out")
        height, width = values.shape
        return Mask(height, width, values.astype(np.uint8).tobytes())

    def tensor(self) -> Tensor:
        """Return the mask `[height, width]`, float32."""
        cells = np.frombuffer(self.cells, np.uint8).astype(np.float32)
        return torch.from_numpy(cells.reshape(self.height, self.width))


Row: TypeAlias = "tuple[tuple[tuple[Target, ...], Mask], ...]"


def targets_of(phrase: Any) -> tuple[Target, ...]:
    """Return the phrases or token ids that a key of a mapping names."""
    targets = phrase if isinstance(phrase, tuple) else (phrase,)
    for target in targets:
        word = isinstance(target, str) and target.strip()
        if not word and (isinstance(target, (str, bool)) or not isinstance(target, int) or target < 0):
            raise ValueError(
                f"masks holds {phrase!r}; its keys are phrases of the prompt, token ids from 0 on, or tuples of them"
            )
    if not targets:
        raise ValueError("masks holds (); its keys are phrases of the prompt, token ids, or tuples of them")
    return targets


def prompt_of(phrase: Any) -> tuple[Target, ...]:
    """Return the prompt of a region, which is a key of a mapping."""
    (text,) = phrase if isinstance(phrase, tuple) and len(phrase) == 1 else (phrase,)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"masks holds {phrase!r}; its keys are the regions' prompts")
    return (text,)


def check_masks(masks: Any, key: Callable[[Any], tuple[Target, ...]] = targets_of) -> tuple[Row, ...]:
    """Return masks in hashable form, one row of (key, mask) per mapping; as they were where they are so already.

    Args:
        masks: as users give them.
        key: checks a key of a mapping and makes it hashable.

    Raises:
        ValueError: no mapping, an empty one, one of too many masks, keys that `key` refuses, masks that `Mask.of`
            refuses or of several sizes.
    """
    given = [masks] if isinstance(masks, Mapping) else masks
    if isinstance(given, tuple) and all(isinstance(row, tuple) for row in given):
        given = [dict(row) for row in given]
    if not isinstance(given, Sequence) or not given or not all(isinstance(row, Mapping) for row in given):
        raise ValueError(
            f"masks is {type(masks).__name__}; pass a mapping from phrases to masks such as {{'a red ball': mask}}, or "
            "a list of one mapping per prompt"
        )
    rows = tuple(tuple((key(phrase), _mask(phrase, mask)) for phrase, mask in row.items()) for row in given)
    for row in rows:
        if not row:
            raise ValueError("masks has an empty mapping; give every prompt the mask of at least one phrase")
        if len(row) > MOST:
            raise ValueError(f"masks holds {len(row)} masks for one prompt; at most {MOST} are supported")
    sizes = sorted({(mask.height, mask.width) for row in rows for _, mask in row})
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ValueError(f"masks have different sizes ({shown}); draw all of them at one size")
    return rows


def _mask(phrase: Any, mask: Any) -> Mask:
    return mask if isinstance(mask, Mask) else Mask.of(f"masks[{phrase!r}]", mask)


def on_grid(row: Row, latents: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return a mapping's masks on a layer's grid, `[masks,M]`: resized to the latents and then to it.

    Raises:
        ValueError: they have other proportions than the picture.
    """
    height, width = row[0][1].height, row[0][1].width
    if height * latents[1] != width * latents[0]:
        raise ValueError(
            f"masks are {height}x{width}, which has not the proportions of the picture (latents "
            f"{latents[0]}x{latents[1]}); draw them at the picture's size"
        )
    masks = torch.stack([mask.tensor() for _, mask in row]).unsqueeze(1)
    return F.interpolate(F.interpolate(masks, size=latents), size=grid).flatten(1)
