"""Results line by line in a file that a program which was killed goes on with."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lsjax.config import ConfigError, check


class ResultLog(AbstractContextManager):
    """JSON lines behind a header, which says what they are results of.

    settings: what the results depend on; JSON values by name. rows: the results that the file has
    from before; its last line is left out if it was cut off.

    Raises ConfigError where the file's header has other settings, or a line is no JSON object.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.rows = file, []
        file.parent.mkdir(parents=True, exist_ok=True)
        whole, _, _ = file.read_bytes().rpartition(b"\n") if file.exists() else (b"", b"", b"")
        lines = whole.split(b"\n") if whole else []
        found = [self._object(line, number) for number, line in enumerate(lines, start=1)]
        if found:
            self._check_header(found[0].get("settings"), json.loads(json.dumps(settings)))
            self.rows = found[1:]
        self._lines = file.open("r+b" if file.exists() else "w+b")
        self._lines.truncate(len(whole) + bool(whole))
        self._lines.seek(0, 2)
        if not found:
            self.write({"settings": settings})

    def write(self, row: dict[str, Any]) -> None:
        """One more result, safe from then on from an end of this program."""
        self._lines.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._lines.flush()

    def __exit__(self, *_) -> None:
        self._lines.close()

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(
                f"{self.file}, line {number} is no result: remove the line, or the file"
            )
        return row

    def _check_header(self, found: Any, settings: dict[str, Any]) -> None:
        check(isinstance(found, dict), f"{self.file} holds something else: name another --output")
        for name in settings | found:
            here, now = found.get(name), settings.get(name)
            check(
                here == now,
                f"{self.file} was begun with {name.replace('_', ' ')} {here}, and this is {now}: "
                "go on with the same, or name another --output",
            )
