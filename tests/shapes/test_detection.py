"""The detector of the shapes model and the scores made from it."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from attnctl_fast import shapes
from attnctl_fast.shapes import Detection, Scene
from attnctl_fast.shapes.detection import failures
from attnctl_fast.shapes.drawing import BACKGROUND, PALETTE, coverage


def pairs(detections: list[Detection]) -> list[tuple[str, str]]:
    return sorted((detection.colour, detection.shape) for detection in detections)


def paint(*objects: tuple[str, str, float, float, float]) -> Image.Image:
    canvas = np.full((64, 64, 3), BACKGROUND, dtype=float)
    for colour, shape, x, y, radius in objects:
        canvas += coverage(shape, x, y, radius)[..., None] * (np.array(PALETTE[colour]) - canvas)
    return Image.fromarray(canvas.round().astype(np.uint8))


@pytest.mark.parametrize("blur", [0.0, 0.8])
def test_right_on_over_98_percent_of_renders(blur: float) -> None:
    right = 0
    for seed in range(600):
        scene = shapes.scene_for_seed(seed, 1 + seed % 3)
        image = shapes.render(scene, seed).image
        if blur:
            image = image.filter(ImageFilter.GaussianBlur(blur))
        right += pairs(shapes.detect(image)) == sorted(scene.objects)
    assert right / 600 > 0.98


def test_right_under_noise() -> None:
    noise = np.random.default_rng(0)
    right = 0
    for seed in range(100):
        scene = shapes.scene_for_seed(seed, 2)
        pixels = np.asarray(shapes.render(scene, seed).image, dtype=float)
        pixels = np.clip(pixels + noise.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
        right += pairs(shapes.detect(Image.fromarray(pixels))) == sorted(scene.objects)
    assert right >= 95


@pytest.mark.parametrize(("colour", "shape"), list(itertools.product(shapes.COLOURS, shapes.SHAPES)))
def test_every_pair_is_told_from_every_other(colour: str, shape: str) -> None:
    for radius in (9.0, 11.5, 14.0):
        assert pairs(shapes.detect(paint((colour, shape, 30.3, 33.6, radius)))) == [(colour, shape)]


def test_two_of_a_kind_are_two_detections() -> None:
    image = paint(("red", "circle", 17, 17, 10), ("red", "circle", 46, 46, 10))
    assert pairs(shapes.detect(image)) == [("red", "circle")] * 2


def test_boxes_and_scores() -> None:
    (found,) = shapes.detect(paint(("blue", "circle", 20.5, 40.25, 10.5)))
    assert found.box == pytest.approx((10, 29.75, 31, 50.75), abs=0.5)
    assert 0.9 < found.score <= 1


def test_largest_first() -> None:
    found = shapes.detect(paint(("blue", "star", 15, 15, 10), ("red", "square", 45, 45, 14)))
    assert [detection.colour for detection in found] == ["red", "blue"]


def bow_tie() -> Image.Image:
    pixels = np.full((64, 64, 3), BACKGROUND, dtype=np.uint8)
    pixels[18:32, 18:32] = pixels[32:46, 32:46] = PALETTE["red"]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (64, 64), BACKGROUND),
        Image.new("RGB", (64, 64), "white"),
        Image.new("RGB", (64, 64), "black"),
        Image.new("L", (64, 64), 128),
        paint(("red", "circle", 32, 32, 2.5)),
        paint(("red", "circle", 20, 32, 10), ("red", "circle", 32, 32, 10), ("red", "circle", 44, 32, 10)),
        bow_tie(),
    ],
    ids=["background", "white", "black", "grey", "speck", "a long blob", "none of the shapes"],
)
def test_nothing_where_there_is_no_object(image: Image.Image) -> None:
    assert shapes.detect(image) == []


def test_a_blend_is_not_the_shape_of_one_colour() -> None:
    left, right = (np.asarray(paint((colour, "circle", 32, 32, 13))) for colour in ("red", "blue"))
    image = Image.fromarray(np.concatenate([left[:, :32], right[:, 32:]], axis=1))
    assert shapes.detect(image) == []


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="64x64 pictures, got 128x64: resize"):
        shapes.detect(Image.new("RGB", (128, 64)))


def detections(*found: tuple[str, str]) -> list[Detection]:
    return [Detection(colour, shape, (0.0, 0.0, 1.0, 1.0), 1.0) for colour, shape in found]


@pytest.mark.parametrize(
    ("found", "strict", "exact", "colours"),
    [
        ((("red", "circle"), ("blue", "star")), True, True, True),
        ((("blue", "star"), ("red", "circle")), True, True, True),
        ((("red", "circle"), ("blue", "star"), ("green", "ring")), True, False, True),
        ((("red", "circle"), ("blue", "star"), ("blue", "star")), True, False, True),
        ((("red", "star"), ("blue", "circle")), False, False, True),
        ((("red", "circle"), ("blue", "circle")), False, False, True),
        ((("red", "circle"),), False, False, False),
        ((), False, False, False),
    ],
)
def test_score(found: tuple[tuple[str, str], ...], strict: bool, exact: bool, colours: bool) -> None:
    scene = Scene((("red", "circle"), ("blue", "star")))
    assert shapes.score(scene, detections(*found)) == shapes.Score(strict, exact, colours)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((("red", "circle"), ("blue", "star")), set()),
        ((("blue", "star"),), {"neglect"}),
        ((), {"neglect"}),
        ((("red", "star"), ("blue", "star")), {"blend"}),
        ((("red", "star"), ("blue", "circle")), {"blend"}),
        ((("green", "circle"), ("blue", "star")), {"wrong colour"}),
        ((("red", "circle"), ("blue", "star"), ("red", "circle")), {"duplicate"}),
        ((("red", "circle"), ("red", "circle")), {"duplicate", "neglect"}),
        ((("red", "circle"), ("blue", "star"), ("green", "ring")), set()),
    ],
)
def test_how_a_picture_fails(found: tuple[tuple[str, str], ...], expected: set[str]) -> None:
    scene = Scene((("red", "circle"), ("blue", "star")))
    assert failures(scene, [Detection(*pair, (0, 0, 9, 9), 1.0) for pair in found]) == expected
