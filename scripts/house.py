"""Measures the code of lsjax/, and checks the rules that its layout follows.

    python scripts/house.py

Prints the files and lines of each room, and the ways of docs/method.md with their lines. Then it
prints what breaks a rule, and exits with 1:

    a room imports one from a higher floor (FLOORS), or modules import each other in a circle;
    imports for types and inside functions count
    a file, a function or its nesting is too long or too deep
    a question about the platform is asked outside of the files in MAY_ASK
    a file of a way does not import the next one, or the way is too long
"""

import ast
import re
import sys
from collections.abc import Iterator
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
    ("evaluation", "aot", "rollouts"),
    ("reporting",),
    ("cli",),
    ("__main__",),
)
LONGEST_FILE, LONGEST_FUNCTION, DEEPEST = 300, 60, 4  # lines, lines, nested statements
# Functions of lsjax.platforms that say what the platform is, and the rooms that may ask.
QUESTIONS = {"platform", "tuned_for", "tuning", "nvidia_capability", "TUNINGS"}
MAY_ASK = {"kernels", "sharding", "platforms"}
WAYS = ROOT / "docs" / "method.md"
# Headings of the ways there, with the most files and lines.
LIMITS = {"From train.py to the loss": (6, 1_000), "From decode.py to a round": (7, 1_300)}
FILES = {  # of single limits
    "lsjax/decoding/self_speculative.py": 160,
}
NESTED = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.FunctionDef)


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
        f"{file.relative_to(ROOT)} has {lines} lines, more than {most}: split it by its ideas"
        for file, lines in package.items()
        if lines > (most := FILES.get(str(file.relative_to(ROOT)), LONGEST_FILE))
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
    for file in package:
        wrong += long_functions(file)
        wrong += questions(file)
    for heading, limits in LIMITS.items():
        wrong += way(heading, *limits, imports)
    print("\n".join(wrong) or "no rule is broken")
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
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {other for other in found & modules.keys() if other not in (name, "lsjax")}


def long_functions(file: Path) -> Iterator[str]:
    """Functions of a file that are too long or too deeply nested."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines, levels = node.end_lineno - node.lineno + 1, depth(node)
            place = f"{file.relative_to(ROOT)}, {node.name}"
            if lines > LONGEST_FUNCTION:
                yield f"{place} has {lines} lines, more than {LONGEST_FUNCTION}"
            if levels > DEEPEST:
                yield f"{place} is nested {levels} deep, more than {DEEPEST}"


def depth(node: ast.AST) -> int:
    """Nested statements below a node. A chain of elif counts once."""
    own = []
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        own.append(depth(child) + (isinstance(child, NESTED) and not is_elif))
    return max(own, default=0)


def questions(file: Path) -> Iterator[str]:
    """Questions about the platform in a file that may not ask."""
    if room_of(module_of(file)) in MAY_ASK:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "lsjax.platforms":
            for name in sorted({alias.name for alias in node.names} & QUESTIONS):
                yield f"{file.relative_to(ROOT)} asks for the platform by {name}: ask in kernels/"


def way(heading: str, most_files: int, most_lines: int, imports: dict) -> Iterator[str]:
    """Prints the files of a way, and yields what is wrong with it."""
    text = WAYS.read_text(encoding="utf-8")
    section = text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    files = [ROOT / name for name in re.findall(r"^\d+\. \[.*?\]\(\.\./(.+?\.py)\)", section, re.M)]
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    print(f"{heading}: {len(files)} files, {sum(lines)} lines")
    if not files or len(files) > most_files or sum(lines) > most_lines:
        yield f"{heading}: more than {most_files} files or {most_lines} lines, or none"
    for first, second in zip(files[1:], files[2:], strict=False):  # the program runs the first
        pair = module_of(first), module_of(second)
        if pair[1] not in imports[pair[0]] and pair[0] not in imports[pair[1]]:
            yield f"{heading}: neither of {pair[0]} and {pair[1]} imports the other"


if __name__ == "__main__":
    sys.exit(main())
