"""Text that every machine has: the standard library of the Python that runs this."""

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lsjax.config import check
from lsjax.data.documents import Document, Source

# Tests are repetitive; packages are whatever was installed; the rest tells of one machine.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
OF_ONE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize")


class PythonSource(Source):
    """Each module of the standard library is a document, in the order of their paths."""

    def __init__(self):
        self.name = f"standard library of Python {platform.python_version()}"
        root, found = Path(sysconfig.get_path("stdlib")), []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in LEFT_OUT]  # not walked into
            own = (name for name in names if not name.startswith(OF_ONE_MACHINE))
            found += [Path(folder, name) for name in own if name.endswith(".py")]
        self.files = sorted(found, key=Path.as_posix)
        check(
            bool(self.files),
            f"{root} has no .py files: this Python comes without its source, choose --data.source",
        )

    def documents(self) -> Iterator[Document]:
        """Modules that hold anything; one that is not UTF-8 is read with its bad bytes replaced."""
        for file in self.files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield Document(text)
