"""Every command of the README and of docs/ is one that its program takes."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro

from lsjax.cli.main import PROGRAMS, find

ROOT = Path(__file__).parents[1]
SCRIPTS = r"python (train\.py|decode\.py|benchmarks/\w+\.py)"
COMMAND = re.compile(rf"(?:{SCRIPTS}|lsjax ({'|'.join(PROGRAMS)})\b)([^\n`|;]*)")
LEFT_OUT = {"benchmarks/peers.py"}  # needs torch


def commands() -> Iterator[tuple[str, str, str]]:
    """Page, program and flags."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        for script, name, flags in COMMAND.findall(text):
            program = script or name
            shown_in_part = "..." in flags or flags.strip() in ("", "--help")
            if not shown_in_part and program not in LEFT_OUT:
                yield page.name, program, flags


def words(flags: str) -> list[str]:
    """What a shell makes of them, without the quote that ends around them and [--optional]'s
    brackets; a configuration that the reader chooses is one of the paper's."""
    if flags.count('"') % 2:
        flags = flags.rpartition('"')[0]
    flags = re.sub(r"--config (configs/X\.py|FILE)", "--config configs/from_scratch_7b.py", flags)
    flags = flags.replace("gs://", "/")  # which need a package
    return shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", flags), comments=True)


@pytest.mark.parametrize("page, program, flags", list(commands()))
def test_a_documented_command_is_taken(page, program, flags, monkeypatch, model_directory):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "benchmarks"), *sys.path])
    given = words(flags)
    if program.startswith("benchmarks/"):
        name = program.removesuffix(".py").replace("/", ".")
        tyro.cli(importlib.import_module(name).Arguments, args=given)
        return
    if program == "report" and {"--config", "--model"} <= {*given}:
        at = given.index("--model")  # a model of the configuration's shape
        given = given[:at] + given[at + 2 :]
    if program == "report":  # whose recipe depends on the model
        known = dict.fromkeys(("PATH", "smollm2"), [str(model_directory)])
        known["RUN"] = [*known["PATH"], "--data.source", "python_source"]
        given = [part for word in given for part in known.get(word, [word])]
    found = find(program.removesuffix(".py")).parsed(given)
    if hasattr(found, "fields"):
        found.fields.mesh.sizes(128)
