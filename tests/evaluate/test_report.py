"""The page of a sweep, clicked through in a real Chromium; prompts that want to be more than text."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from attnctl_fast.cli.model import Settings
from attnctl_fast.cli.pictures import heat_strip
from attnctl_fast.evaluate import report
from attnctl_fast.evaluate.plan import Picture
from attnctl_fast.evaluate.store import Record, Store
from attnctl_fast.evaluate.summary import summary

METHODS = ["plain", "regulation", "excite"]
WORDS = ["a", "red", "circle"]
HOSTILE = [
    "</script><script>window.hurt = 1</script>",
    '"><img src=x onerror="window.hurt = 1">',
    "<!--<script>&lt;b&gt; ${window.hurt = 1} $SCRIPT \u2028 \ud800",
    "../../../etc/passwd",
    "javascript:window.hurt=1",
    "\u202eesrever \u0000 'quoted'",
]
# Of every text with what lies behind it, by the formula of WCAG 2.
CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const says = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.offsetParent && !element.disabled && says(element))
    .map((element) => {
      const pair = [parse(getComputedStyle(element).color), ground(element)].map(light).sort((x, y) => y - x);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), element.tagName, element.textContent.slice(0, 20)];
    });
}"""
CHROMIUM = next(
    filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]),
    None,
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None,
    reason="needs Chromium (apt-get install chromium, or its path in CHROMIUM) and playwright (pip install playwright)",
)


def sweep(folder: Path, prompts: list[str], seeds: int, drawn: int) -> tuple[list[Picture], list[Record]]:
    """A finished sweep's pictures and rows, those of the first prompts with files. Regulation gains prompt 0, loses
    prompt 1 and fails at prompt 2."""
    pictures, rows = [], []
    (folder / "pictures").mkdir(parents=True)
    (folder / "maps").mkdir()
    for place, prompt in enumerate(prompts):
        for seed in range(seeds):
            for index, method in enumerate(METHODS):
                settings = Settings(model="shapes", prompt=prompt, seed=seed, steps=3)
                picture = Picture(place, method, settings, {}, None, {"prompt": prompt})
                row = {**picture.record(), "run": "2026-01-01T00:00:00", "rank": 0, "seconds": 1.0 + index}
                strict = place > 1 or (place == 0) == (index == 1)
                if place == 3 and index == 2:
                    continue
                row |= {"strict": strict, "clip": 20.0 + index, "words": WORDS}
                if place == 2 and index == 1:
                    row = {**picture.record(), "error": f"RuntimeError: <b>{prompt}</b>"}
                elif place < drawn:
                    shade = (40 * place % 256, 80 * index, 30 * seed % 256)
                    Image.new("RGB", (64, 64), shade).save(folder / picture.file)
                    heat_strip([np.eye(4) * (at + 1) for at in range(3)]).save(folder / picture.maps)
                pictures.append(picture)
                rows.append(row)
    return pictures, rows


def written(folder: Path, prompts: list[str], seeds: int = 1, drawn: int = 99, **options: Any) -> Path:
    pictures, rows = sweep(folder, prompts, seeds, drawn)
    store = Store(folder)
    figures = summary(rows, METHODS)
    store.write(report.FILE, report.page(store, pictures, rows, figures, model="<i>m</i>", **options))
    return folder / report.FILE


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Open a page; at the end nothing may stand in its console and nothing may have been asked for elsewhere."""
    said: list[str] = []
    context: Any = None

    def go(path: Path, **options: Any) -> Any:
        nonlocal context
        context = browser.new_context(**options)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(f"failed {request.url}"))
        inside = (path.parent.as_uri() + "/", "data:")
        page.on("request", lambda request: request.url.startswith(inside) or said.append(f"outside {request.url}"))
        page.goto(path.as_uri())
        return page

    yield go
    context.close()
    assert said == []


def visible(page: Any) -> list[str]:
    """The prompts of the rows that are shown."""
    return page.locator("article h2").all_inner_texts()


def pictures_of(page: Any) -> list[str]:
    return [
        file.rpartition("/")[2]
        for file in page.eval_on_selector_all("figure:not([hidden]) img", "all => all.map(i => i.src)")
    ]


@needs_browser
def test_the_page_clicked_through(tmp_path: Path, opened: Any) -> None:
    prompts = ["a red circle", "a blue star", "a green ring", *(f"a cross {index}" for index in range(30))]
    page = opened(written(tmp_path / "out", prompts))
    assert page.title() == "Sweep of <i>m</i>" and page.locator("i").count() == 0
    assert page.locator("tbody tr").count() == 3
    assert "96.97 %" not in page.locator("table").inner_text() and "+1 -1, p = 1" in page.locator("table").inner_text()
    assert len(visible(page)) == 24 and page.locator("#page").inner_text() == "Page 1 of 2"
    assert pictures_of(page)[:3] == [f"00000-0-{method}.png" for method in METHODS]
    assert page.locator("img").first.evaluate("i => i.naturalWidth") == 64
    assert page.locator("figcaption").nth(1).inner_text() == "regulation · strict ✓ · CLIP score 21.00"

    assert page.locator("article").nth(3).locator("figcaption").last.inner_text() == "excite · not in the sweep"

    # Filters, of all methods and of one.
    page.get_by_label("gained").check()
    assert visible(page) == ["a red circle"]
    page.get_by_label("lost").check()
    assert visible(page) == ["a blue star"]
    page.get_by_label("failed").check()
    assert visible(page) == ["a red circle", "a blue star", "a green ring"]
    page.get_by_role("tab", name="regulation").click()
    assert visible(page) == ["a blue star", "a green ring"]
    assert "RuntimeError: <b>a green ring</b>" in page.locator("figcaption").all_inner_texts()[-2]
    page.get_by_label("Judged by").select_option("CLIP score")
    page.get_by_label("gained").check()
    assert len(visible(page)) == 24 and page.locator("#count").inner_text() == "32 of 33 prompts and seeds"
    page.get_by_label("all", exact=True).check()

    # Pages and search.
    page.get_by_role("button", name="Next").click()
    assert len(visible(page)) == 9 and page.get_by_role("button", name="Next").is_disabled()
    page.get_by_label("Prompt").fill("CROSS 2")
    assert visible(page) == [prompt for prompt in prompts if "cross" in prompt and "2" in prompt]
    page.get_by_label("Prompt").fill("nothing")
    assert visible(page) == [] and page.locator("#count").inner_text() == "0 of 33 prompts and seeds"


@needs_browser
def test_the_page_by_keyboard_alone(tmp_path: Path, opened: Any) -> None:
    page = opened(written(tmp_path / "out", [f"a cross {index}" for index in range(30)], seeds=2))
    press = page.keyboard.press
    assert page.locator("[aria-selected=true]").inner_text() == "side by side"
    press("ArrowRight")
    assert page.locator("[aria-selected=true]").inner_text() == "plain" and set(pictures_of(page)) >= {
        "00000-0-plain.png"
    }
    press("2")
    assert all(file.endswith("regulation.png") for file in pictures_of(page))
    press("ArrowLeft")
    press("ArrowLeft")
    assert page.locator("[aria-selected=true]").inner_text() == "side by side"
    press("ArrowLeft")
    assert page.locator("[aria-selected=true]").inner_text() == "excite"
    press("0")
    press("n")
    assert page.locator("#page").inner_text() == "Page 2 of 3"
    press("p")
    press("j")
    press("j")
    assert page.evaluate("document.activeElement.querySelector('.seed').textContent") == "seed 1"
    press("Tab")
    word = page.evaluate("document.activeElement.textContent")
    shown = page.locator("article").nth(1).locator(".heat")
    assert word == "a" and shown.count() == 3
    assert "maps/00000-1-plain.png" in shown.first.evaluate("e => e.style.backgroundImage")
    press("Tab")
    assert shown.first.evaluate("e => e.style.backgroundPosition") == "0px 50%"
    press("k")
    assert shown.count() == 0
    press("/")
    page.keyboard.type("cross 29 ")
    assert visible(page) == ["a cross 29"] * 2
    press("Escape")
    press("3")
    assert len(pictures_of(page)) == 2
    # Everything that Tab reaches has a name, and the focus never gets caught.
    names = []
    for _ in range(30):
        press("Tab")
        names.append(page.evaluate("document.activeElement.textContent || document.activeElement.ariaLabel || ''"))
    assert len(set(names)) > 8


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone_in_the_light_and_in_the_dark(tmp_path: Path, opened: Any, scheme: str) -> None:
    prompts = ["a red circle " + "and a very long word " * 9, "x" * 300]
    page = opened(written(tmp_path / "out", prompts), viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator(".words button").first.hover()
    assert page.locator(".heat").count() == 3
    found = page.evaluate(CONTRASTS)
    assert len(found) > 20 and min(found)[0] >= 4.5, min(found)


@needs_browser
@pytest.mark.parametrize("embed", [False, True])
def test_hostile_prompts_are_text(tmp_path: Path, opened: Any, embed: bool) -> None:
    path = written(tmp_path / "out", HOSTILE, embed=embed)
    if embed:
        shutil.rmtree(tmp_path / "out" / "pictures")
        shutil.rmtree(tmp_path / "out" / "maps")
    page = opened(path)
    texts = "[...document.querySelectorAll('article h2')].map((title) => title.textContent)"
    assert page.evaluate(f"{texts}.length") == len(HOSTILE)
    assert page.evaluate(f"{texts}.every((text, place) => text === data.prompts[place])")
    assert page.evaluate("window.hurt") is None
    assert page.locator("script").count() == 2 and page.locator("[onerror]").count() == 0
    inside = re.escape(path.parent.as_uri())
    pattern = r"data:image/png;base64,[\w+/=]+" if embed else rf"{inside}/pictures/\d{{5}}-\d+-\w+\.png"
    sources = page.eval_on_selector_all("img", "all => all.map(i => i.src)")
    assert len(sources) == 16 and all(re.fullmatch(pattern, source) for source in sources)
    assert page.eval_on_selector_all("img", "all => all.slice(0, 3).map(i => i.naturalWidth)") == [64] * 3
    page.locator(".words button").first.hover()
    assert page.locator(".heat").count() == 3


def test_a_page_is_one_element_of_data_whatever_a_prompt_says(tmp_path: Path) -> None:
    text = written(tmp_path / "out", HOSTILE).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script id="data" type="application/json">(.*)</script>', text)
    assert json.loads(data)["prompts"] == HOSTILE and not re.search("[<>&\u2028]", data)
    assert text.count("<script") == text.count("</script") == 2
    assert "$" not in text.partition("<style>")[0]


@needs_browser
def test_ten_thousand_pictures_open_as_a_page_of_them(tmp_path: Path, opened: Any) -> None:
    """No clock: what costs time is elements and pictures, and there are those of one page, however many there are."""
    path = written(tmp_path / "out", [f"a circle and a star {index}" for index in range(334)], seeds=10, drawn=3)
    page = opened(path)
    assert page.locator("#count").inner_text() == "3340 of 3340 prompts and seeds"
    assert page.locator("article").count() == 24 and page.evaluate("document.querySelectorAll('*').length") < 1200
    assert page.eval_on_selector_all("img", "all => all.every(i => i.loading === 'lazy')")
    assert path.stat().st_size < 2_000_000
