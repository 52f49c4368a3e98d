"""The documentation against the code: what works with what, which errors there are, and that nothing is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnctl_fast as ac
from attnctl_fast import ops
from tests.docs import models

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "attnctl_fast"
PAGES = sorted(DOCS.rglob("*.md"))
# A function's docstring says what it does; one that begins with these says what something is.
NOUNS = {"a", "all", "an", "both", "every", "from", "how", "of", "one", "that", "the", "this", "those", "what", "where"}
NOUNS |= {"which", "whether", "with"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", models.TABLES)
def test_what_works_with_what(name: str) -> None:
    """The page holds what every method does on every pipeline; `python -m tests.docs.models --update` writes it."""
    page = models.PAGE.read_text(encoding="utf-8")
    made = models.filled(page, name, models.TABLES[name]())
    assert made == page, "docs/models.md is out of date: python -m tests.docs.models --update"


def test_every_public_name_is_documented() -> None:
    shown = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.M)}
    last = {name.rpartition(".")[2] for name in shown}
    assert set(ops.__all__) <= {name.rpartition(".")[2] for name in shown if name.startswith("attnctl_fast.ops.")}
    assert set(ac.__all__) - {"ops", "schedules", "shapes"} <= last
    assert set(ac.schedules.__all__) - {"Schedule", "ScheduleLike", "factors"} <= last


def functions() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
                decorators = {getattr(x, "id", getattr(x, "attr", "")) for x in node.decorator_list}
                if not decorators & {"property", "cached_property"}:
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text.splitlines()[0]


def test_docstrings_say_what_a_function_does() -> None:
    wrong = [
        f"{where}: {line}"
        for where, line in functions()
        if not line[0].isupper() or re.split(r"\W", line)[0].lower() in NOUNS
    ]
    assert not wrong, "\n".join(wrong)


def messages() -> set[str]:
    """The messages of all errors and warnings of the package, with a mark for every value."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_troubleshooting_shows_real_messages() -> None:
    known = messages()
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(shown) > 30 and text.count("**Cause.**") == text.count("**Remedy.**") == len(shown)
    for heading in shown:
        pieces = [piece.strip() for piece in re.split(r"'[^']*'|\d+|\btargets\b|AttentionRegulation", heading)]
        pieces = [piece for piece in pieces if len(piece) > 4]
        assert any(all(piece in message for piece in pieces) for message in known), heading


def test_pictures_are_small() -> None:
    drawn = list((DOCS / "img" / "methods").glob("*.png"))
    sizes = {path.name: path.stat().st_size for path in drawn}
    assert max(sizes.values()) < 100_000 and sum(sizes.values()) < 1_000_000, sizes
    used = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [path.name for path in drawn if path.name not in used] == []


def test_the_readme_is_short_and_its_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_code_on_pages_is_python(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        ast.parse(block)


def test_the_code_of_the_first_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With five steps instead of the pipeline's own number."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.S)[0]
    monkeypatch.chdir(tmp_path)
    assert code.count("pipe(prompt, ") == 2
    exec(code.replace("pipe(prompt, ", "pipe(prompt, num_inference_steps=5, "), {})
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "controlled.png").read_bytes()
