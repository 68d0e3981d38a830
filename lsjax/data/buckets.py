"""What a bucket cannot do itself: models are copied to the cache, and lines appended in memory."""

import hashlib
import io
import re
import shutil
import time
from typing import IO

from lsjax.config import Path, check, in_bucket
from lsjax.data.files import gguf_parts, local_cache, whole_directory, write_whole

TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|generation_config)\.json"
    r"|tokenizer\.model|chat_template\.jinja"
)
WEIGHTS = re.compile(r"config\.json|.+\.safetensors(\.index\.json)?")
PAUSE = 60.0  # seconds between two writes of a growing file


def local_copy(path: Path, *, wanted: re.Pattern = TOKENIZER) -> Path:
    """The path itself, or a copy in the cache if it is in a bucket. A changed file is copied again.

    path: directory of a model, tokenizer file, or GGUF file, which is copied with all its parts.
    wanted: names of the files to copy from a directory.

    Raises FileNotFoundError, and ConfigError if the disk has too little space.
    """
    if not in_bucket(path):
        return path
    from lsjax.config.buckets import file_system

    storage, alone = file_system(), path.is_file()
    folder = path.parent if alone else path
    parts = {part.name for part in gguf_parts(path)} if alone else set()
    try:
        listed = storage.ls(str(folder), detail=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: does not exist: check the bucket and the name") from None
    found = {}
    for entry in listed:
        name = entry["name"].rpartition("/")[2]
        others = path.suffix != ".gguf" and wanted.fullmatch(name)
        if entry["type"] == "file" and (name in parts or others):
            found[name] = entry["size"], entry["generation"]
    key = hashlib.sha256(f"{folder} {sorted(found.items())}".encode()).hexdigest()[:16]
    copy = local_cache() / "models" / f"{folder.name}-{key}"
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        size, free = sum(size for size, _ in found.values()), shutil.disk_usage(copy.parent).free
        check(
            size < free,
            f"{path} has {size / 1e9:.1f} GB, but {copy.parent} has only {free / 1e9:.1f} GB free: "
            "remove old copies there, or set LSJAX_CACHE to a larger disk",
        )
        with whole_directory(copy) as partial:
            for name in found:
                storage.get_file(str(folder / name), str(partial / name))
    return copy / path.name if alone else copy


class Lines:
    """A text file that grows line by line.

    A file in a bucket can only be written as a whole. This happens at most once a minute, and at
    `flush` and `close`.
    """

    def __init__(self, file: Path):
        self._file, self._written = file, time.monotonic()
        self._text: IO[str]
        if in_bucket(file):
            self._text = io.StringIO()
            self._text.write(file.read_text() if file.exists() else "")
        else:
            self._text = file.open("a", encoding="utf-8")

    def write(self, line: str) -> None:
        """Appends a line; a local file has it at once."""
        self._text.write(line)
        if not in_bucket(self._file) or time.monotonic() - self._written > PAUSE:
            self.flush()

    def flush(self) -> None:
        """Writes every line."""
        self._text.flush()
        if in_bucket(self._file):
            write_whole(self._file, self._text.getvalue().encode())
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes every line and closes the file."""
        self.flush()
        self._text.close()
