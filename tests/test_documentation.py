"""README and docs/ have lines of at most 100 characters, and links and paths that exist; docstrings
open with their subject."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tutorial_notebook import NOTEBOOK, PAGE, notebook

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = "configuration.md"
LINK = re.compile(r"\[[^]]*\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")
PATH = re.compile(r"(?<![\w./-])(?:lsjax|configs|scripts|tests|benchmarks|docs)/[\w./-]*\w")
# Chosen by the reader, and written on an accelerator.
NOT_THERE = {"configs/X.py", "docs/accelerators.md"}
ROOMS = ("lsjax", "scripts", "benchmarks", "tests")
SOURCES = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]


def prose(text: str) -> Iterator[str]:
    """Lines that are neither code, nor part of a table, nor a link alone."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if not line.startswith(("|", "    ", "![", "http")):
            yield line


def anchors(file: Path) -> set[str]:
    """Headings as GitHub names them in links."""
    titles = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page(page):
    text = page.read_text()
    wide = [line for line in prose(text) if len(line) > 100]
    assert not wide or page.name == GENERATED
    for name, anchor in LINK.findall(text):
        file = page.parent / name if name else page
        assert file.exists(), f"no {name}"
        assert not anchor or anchor in anchors(file), f"no #{anchor} in {file.name}"
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert set(missing) <= NOT_THERE


def test_the_notebook_is_the_tutorial():
    assert NOTEBOOK.read_text() == notebook(PAGE.read_text())


def test_pages_named_in_code_exist():
    for file in (*SOURCES, *(ROOT / "configs").glob("*.py"), ROOT / "Makefile"):
        for path in re.findall(r"docs/[\w./-]*\w", file.read_text()):
            assert path in NOT_THERE or (ROOT / path).exists(), f"{file} names {path}"


def test_docstrings_do_not_open_with_of():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            assert not (text or "").startswith("Of "), f"{file}:{getattr(node, 'lineno', 1)}"
