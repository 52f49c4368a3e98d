"""Prompts with targets and boxes from files in COCO's form."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .prompts import Entry


def read_coco(paths: Sequence[Path]) -> list[Entry]:
    """Read captions as prompts, with the categories that they name as targets, and the boxes of those.

    The files are JSON objects with `images`, `annotations` and `categories`; COCO has its captions in one and its
    boxes in another, so that several files may be given for the same pictures. Of a picture the first caption counts,
    and of a category in it the largest box. Pictures whose caption names no category are left out.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file of another form, or no prompt in all of them.
    """
    files = [(path, _parsed(path)) for path in paths]
    names: dict[Any, str] = {}
    captions: dict[Any, str] = {}
    sizes: dict[Any, tuple[float, float]] = {}
    boxes: dict[Any, list[tuple[Any, list[float]]]] = {}
    for path, file in files:
        try:
            names |= {category["id"]: str(category["name"]).lower() for category in file.get("categories", [])}
            sizes |= {image["id"]: (image["width"], image["height"]) for image in file.get("images", [])}
            for annotation in file["annotations"]:
                if "caption" in annotation:
                    captions.setdefault(annotation["image_id"], annotation["caption"].strip())
                if "bbox" in annotation:
                    one = annotation["category_id"], [float(number) for number in annotation["bbox"]]
                    boxes.setdefault(annotation["image_id"], []).append(one)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"--prompts {path} is not in COCO's form: {type(error).__name__} {error}") from error
    entries = [_entry(image, caption, names, sizes, boxes.get(image, [])) for image, caption in captions.items()]
    if not any(entries):
        listed = ", ".join(map(str, paths))
        raise ValueError(f"--prompts {listed} holds no caption that names one of its {len(names)} categories")
    return [entry for entry in entries if entry]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OSError(f"--prompts {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--prompts {path} is not JSON: {error}; a file of lines must not end in .json") from error
    if not isinstance(file, dict):
        raise ValueError(f"--prompts {path} is not in COCO's form: no object; a file of lines must not end in .json")
    return file


def _entry(
    image: Any,
    caption: str,
    names: dict[Any, str],
    sizes: dict[Any, tuple[float, float]],
    boxes: list[tuple[Any, list[float]]],
) -> Entry | None:
    found = {name: match.start() for name in names.values() if (match := _word(name).search(caption.lower()))}
    targets = sorted(found, key=lambda name: found[name])
    if not targets:
        return None
    entry: Entry = {"prompt": caption, "targets": targets, "groups": [(target,) for target in targets]}
    # The largest comes last and stays.
    placed = sorted(((names.get(kind), box) for kind, box in boxes), key=lambda one: one[1][2] * one[1][3])
    largest = {name: box for name, box in placed if name in found}
    if largest and image in sizes:
        width, height = sizes[image]
        entry["boxes"] = [
            (name, (x / width, y / height, (x + w) / width, (y + h) / height)) for name, (x, y, w, h) in largest.items()
        ]
    else:
        entry["skip"] = ["dense", "regions"]
    return entry


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}\b")
