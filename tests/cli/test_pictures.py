"""Sheets of pictures and heat maps."""

import numpy as np
from PIL import Image

from attnctl_fast.cli import pictures
from attnctl_fast.cli.pictures import heat_map


def test_found_lines_tell_right_wrong_and_extra():
    red, blue, ring = ("red", "circle"), ("blue", "star"), ("cyan", "ring")
    assert pictures.found_lines([red, blue], [blue, red]) == [("right", "red circle"), ("right", "blue star")]
    assert pictures.found_lines([red, blue], [red, red]) == [
        ("right", "red circle"),
        ("wrong", "blue star"),
        ("extra", "red circle"),
    ]
    assert pictures.found_lines([red], [ring, red, blue])[1] == ("extra", "cyan ring and 1 more")


def test_a_sheet_shows_every_picture_with_the_colour_of_its_frame():
    panels = [
        pictures.Panel(Image.new("RGB", (64, 64), (0, 0, 200)), "one", [("right", "it")], True),
        pictures.Panel(Image.new("RGB", (32, 64), (0, 200, 200)), "two", [], False),
    ]
    picture = pictures.draw_sheet([pictures.Strip("a prompt " * 9, panels)] * 3, title="title", columns=2, side=100)
    counts = {colour: count for count, colour in picture.getcolors(picture.width * picture.height)}
    assert counts[(0, 0, 200)] == 3 * 92 * 92
    assert counts[(0, 200, 200)] == 3 * 46 * 92
    assert counts[pictures._RIGHT] > 0 and counts[pictures._WRONG] > 0


def test_heat_map_is_brightest_at_its_maximum():
    image = Image.new("RGBA", (60, 30), (0, 200, 90, 255))
    values = np.zeros((4, 8), dtype=np.float32)
    values[1, 2] = 0.03
    picture = heat_map(image, values)
    assert picture.mode == "RGB" and picture.size == image.size
    light = np.asarray(picture.convert("L")).astype(int)
    row, column = np.unravel_index(light.argmax(), light.shape)
    assert abs(row - 11) <= 2 and abs(column - 18) <= 3
    assert light[-1, -1] == light.min()
    assert np.array_equal(picture, heat_map(image, 20 * values))
    assert len(heat_map(image, np.zeros((4, 8), dtype=np.float32)).getcolors()) == 1
