"""Counts the files and lines of each room of lsjax/, and checks which room imports which.

    python scripts/house.py

Prints a table. Exits with 1 if a limit is exceeded, modules import each other in a circle, or a
room imports one from a higher floor. Imports inside functions count; imports only for type hints do
not.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A room may import those of lower floors.
FLOORS = (
    ("config",),
    ("sharding", "data"),
    ("model",),
    ("checkpoints",),
    ("training", "decoding"),
    ("evaluation", "aot"),
    ("cli",),
)
# 90 files and 13,000 lines. Families, pods and auto may add 6 files and 2,770 lines to them.
MOST_FILES, MOST_LINES = 96, 15_770
LONGEST, MOST_LINES_OF_SCRIPTS = 300, 2_000


def main() -> int:
    """Prints the counts and all violations. Returns 1 if there are any."""
    package = lines_of("lsjax")
    scripts = sum((lines_of("scripts") | lines_of("benchmarks")).values())
    modules = {module_of(file): file for file in package}
    imports = {name: imported(name, file, modules) for name, file in modules.items()}
    for floor in FLOORS:
        for room in floor:
            own = [n for file, n in package.items() if room_of(module_of(file)) == room]
            print(f"{room:<12} {len(own):>3} files {sum(own):>6} lines")
    print(f"{'lsjax/':<12} {len(package):>3} files {sum(package.values()):>6} lines")
    print(f"{'scripts':<12} {scripts:>23} lines, benchmarks among them")
    wrong = [
        f"{file.relative_to(ROOT)} has {n} lines" for file, n in package.items() if n > LONGEST
    ]
    wrong += [f"{len(package)} files, more than {MOST_FILES}"] * (len(package) > MOST_FILES)
    lines = sum(package.values())
    wrong += [f"{lines} lines, more than {MOST_LINES}"] * (lines > MOST_LINES)
    wrong += [f"{scripts} lines of scripts"] * (scripts > MOST_LINES_OF_SCRIPTS)
    wrong += [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if room_of(name) != room_of(other) and height(other) >= height(name) < len(FLOORS)
    ]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " -> ".join(error.args[1]))
    print("\n".join(wrong) or "no circle, no import upward, all within the limits")
    return int(bool(wrong))


def lines_of(folder: str) -> dict[Path, int]:
    """Lines of each Python file below a folder."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def module_of(file: Path) -> str:
    """Dotted name of a file's module."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The package below lsjax, or the module there; empty for lsjax itself."""
    return (module.split(".") + [""])[1]


def height(module: str) -> int:
    """Number of a module's floor; lsjax itself is above all."""
    room = room_of(module)
    return next((i for i, floor in enumerate(FLOORS) if room in floor), len(FLOORS))


def imported(name: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of lsjax that this one imports."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = [block for block in blocks if getattr(block.test, "id", "") == "TYPE_CHECKING"]
    hidden = {id(node) for block in for_types for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {other for other in found & modules.keys() if other not in (name, "lsjax")}


if __name__ == "__main__":
    sys.exit(main())
