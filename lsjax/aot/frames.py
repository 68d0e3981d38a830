"""Functions that an instruction comes from, by the tables at the head of a compiled program.

FunctionNames
1 "Block.extend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=11 end_column=11}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
"""

import re
from collections.abc import Mapping


def stack_functions(text: str) -> Mapping[int, frozenset[str]]:
    """The functions on the stack of each frame; empty where the program has no tables."""
    names = dict(_table(text, "FunctionNames", r'"(.*)"'))
    places = dict(_table(text, "FileLocations", r"{file_name_id=\d+ function_name_id=(\d+)"))
    found: dict[int, frozenset[str]] = {}
    pattern = r"{(?:file_location_id=(\d+))?(?: ?parent_frame_id=(\d+))?"
    frames = _table(text, "StackFrames", pattern)
    # jax 0.10 writes parents one too high, and 1 for the root, which has none.
    shift = int(bool(frames) and (frames[0][1][1] or "0") == "1")
    for frame, (place, parent) in frames:
        above = found.get(int(parent or 0) - shift, frozenset())
        name = names.get(int(places.get(int(place or 0), 0)))
        found[frame] = above | ({name} - {None})
    return found


def _table(text: str, title: str, pattern: str) -> list[tuple[int, str | tuple[str, ...]]]:
    """Rows of a table: number and what the pattern's groups find."""
    begin = re.search(rf"^{title}$", text, re.MULTILINE)
    if begin is None:
        return []
    rows = []
    for line in text[begin.end() + 1 :].split("\n"):
        row = re.match(rf"(\d+) {pattern}", line)
        if row is None:
            break
        number, *groups = row.groups()
        rows.append((int(number), groups[0] if len(groups) == 1 else tuple(groups)))
    return rows
