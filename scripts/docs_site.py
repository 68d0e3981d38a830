"""Hooks of mkdocs: pages from outside of docs/, an API reference, and links to sources.

README.md becomes the first page. Sources that pages link to are copied, so that no link leads out
of the site. Links to directories become text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import lsjax

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
PAGES = {"index.md": "README.md", "changes.md": "CHANGELOG.md"}
ABOUT_API = """\
# API

The public names of `lsjax`, by topic. Everything else may change between versions.
"""
TOPICS = {
    "Models and files": ("checkpoints", "model", "sharding", "data"),
    "Decoding": ("decoding",),
    "Training": ("training", "cli"),
    "Reinforcement learning": ("rollouts",),
    "Measuring": ("evaluation", "reporting"),
    "Configuration": ("config",),
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages, and the sources that pages link to."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "api.md", content=api()))
    linked = {link for file in ROOT.glob("docs/*.md") for link in sources_in(file.read_text())}
    for name in sorted(linked):
        content = (ROOT / name).read_text()
        files.append(File.generated(config, f"source/{name}.txt", content=content))
    return files


def sources_in(text: str) -> set[str]:
    """Files outside of docs/ that a page of docs/ links to."""
    links = {posixpath.normpath(f"docs/{link}") for link, _ in LINK.findall(text)}
    return {link for link in links if not link.startswith("docs/") and (ROOT / link).is_file()}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Makes links lead to pages and copies of the site."""
    folder = "." if page.file.src_uri in PAGES else "docs"

    def repaired(found: re.Match[str]) -> str:
        target = posixpath.normpath(f"{folder}/{found[1]}")
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{found[2] or ''})"
        names = {source: name for name, source in PAGES.items()}
        if target in names:
            return f"]({names[target]}{found[2] or ''})"
        if (ROOT / target).is_file() and folder == "docs":
            return f"](source/{target}.txt)"
        return "](#)"

    markdown = LINK.sub(repaired, markdown)
    return re.sub(r"\[([^]]*)\]\(#\)", r"\1", markdown)


def api() -> str:
    """A page with every public name, by the module where it is defined."""
    lines, home = [ABOUT_API], {**lsjax._HOME, "train": "", "report": ""}
    for topic, rooms in TOPICS.items():
        lines.append(f"## {topic}\n")
        for name, module in home.items():
            room = module.partition(".")[0] or {"train": "training", "report": "reporting"}[name]
            if room in rooms:
                path = f"lsjax.{module}.{name}" if module else f"lsjax.{name}"
                lines.append(f"::: {path}\n")
    return "\n".join(lines)
