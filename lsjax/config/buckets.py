"""Files and paths in gs:// buckets, by etils.epath and gcsfs, with pathlib's behaviour on disks."""

import logging
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import fsspec.config
from etils import epath

for name in ("gcsfs", "fsspec"):
    logging.getLogger(name).setLevel(logging.CRITICAL)  # they log errors that they also raise
# Otherwise a listing hides what other processes have written since.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def bucket_files(pattern: str) -> dict[str, dict[str, Any]]:
    """Names of the files in a bucket that match a pattern, sorted, and what the bucket knows."""
    try:
        found = file_system().glob(pattern, detail=True)
    except FileNotFoundError:  # no such bucket
        return {}
    return {name: found[name] for name in sorted(found) if found[name]["type"] == "file"}


def file_system() -> Any:
    """The fsspec file system of gs:// paths."""
    return fsspec.filesystem("gs", finalize_on_close=True)


class BucketPath(type(epath.Path("gs://"))):
    """A path in a bucket, which has files and their prefixes, but no directories."""

    def resolve(self, strict: bool = False) -> "BucketPath":
        """The path itself."""
        return self

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing. epath would create a missing bucket."""

    def is_dir(self) -> bool:
        """Whether there are files below. Raises the bucket's errors; epath returns False."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """Whether this is a file; raises the bucket's errors."""
        return self._kind() == "file"

    def _kind(self) -> str | None:
        try:
            return file_system().info(str(self))["type"]
        except FileNotFoundError:
            return None
        except Exception as error:  # of the network, the bucket, or the account's rights
            raise OSError(
                f"{self} cannot be reached ({error}): check the bucket, and that this account may "
                "use it"
            ) from error

    def stat(self) -> Any:
        """Size, and time of the last change, by the names of os.stat."""
        found = file_system().info(str(self))
        written = int(found.get("generation", 0))  # in microseconds
        return SimpleNamespace(st_size=found["size"], st_mtime_ns=1000 * written)

    def write_bytes(self, data: bytes) -> int:
        """Writes a file, which appears when it is complete."""
        with suppress(FileNotFoundError):  # a failing server may forget a large upload
            return super().write_bytes(data)
        try:
            return super().write_bytes(data)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self} can't be written, as there is no such bucket: create it, or name another"
            ) from None
