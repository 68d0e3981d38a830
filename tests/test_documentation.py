"""README and docs/ have lines of at most 100 characters, and links and paths that exist; docstrings
open with their subject."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDTH = 100
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./-])(?:lsjax|configs|scripts|tests|benchmarks|docs)/[\w./-]*\w")
CHOSEN_BY_THE_READER = {"configs/X.py"}
WRITTEN_LATER = {"docs/accelerators.md"}
SOURCES = [
    file
    for room in ("lsjax", "scripts", "benchmarks", "tests")
    for file in (ROOT / room).rglob("*.py")
]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is neither code nor part of a table."""
    fenced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("|", "    ")):
            yield number, line


def headings(file: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_at_most_100_characters_wide(page):
    if page.name == "configuration.md":
        pytest.skip("made by scripts/document_configuration.py")
    for number, line in prose(page.read_text()):
        is_link = re.fullmatch(r"!?\[.*\]\(.*\)\.?|https?://\S+", line.strip())
        assert len(line) <= WIDTH or is_link, f"{page.name}:{number} has {len(line)} characters"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    for path in PATH.findall(page.read_text()):
        known = path in CHOSEN_BY_THE_READER or path in WRITTEN_LATER
        assert known or (ROOT / path).exists(), f"{page.name} names {path}"


def test_docstrings_do_not_open_with_of():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            assert not (text or "").startswith("Of "), f"{file}:{getattr(node, 'lineno', 1)}"


def test_pages_named_in_code_exist():
    for file in (*SOURCES, *(ROOT / "configs").glob("*.py"), ROOT / "Makefile"):
        for path in re.findall(r"docs/[\w./-]*\w", file.read_text()):
            assert path in WRITTEN_LATER or (ROOT / path).exists(), f"{file} names {path}"
