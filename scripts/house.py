"""Counts the files and lines of each room of lsjax/, and checks which room imports which.

    python scripts/house.py

Prints a table. Exits with 1 if a file is too long, modules import each other in a circle, or a room
imports one from a higher floor. A new room is added to FLOORS. Imports inside functions count;
imports only for type hints do not.
"""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A room may import those of lower floors.
FLOORS = (
    ("config", "interrupts", "terminal"),
    ("io",),
    ("sharding",),
    ("platforms", "data"),
    ("kernels",),
    ("model",),
    ("checkpoints",),
    ("training", "decoding"),
    ("evaluation", "aot"),
    ("cli",),
)
LONGEST = 300  # lines of a file


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
        f"{file.relative_to(ROOT)} has {n} lines, more than {LONGEST}: split it by its ideas"
        for file, n in package.items()
        if n > LONGEST
    ]
    wrong += [f"{name} has no floor: add its room to FLOORS" for name in modules if no_floor(name)]
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
    print("\n".join(wrong) or "no circle, no import upward, no file too long")
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


def no_floor(module: str) -> bool:
    """Whether a module other than lsjax itself is in a room that FLOORS does not list."""
    return bool(room_of(module)) and height(module) == len(FLOORS)


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
