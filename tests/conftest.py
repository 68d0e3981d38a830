"""Everything runs on CPUs, with a compilation cache. What needs jax is in fixtures.py."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from scripts.xla_flags import known_flags

os.environ["JAX_PLATFORMS"] = "cpu"
# jax's cache can't be shared by processes that write to it. So each process of pytest-xdist has its
# own, which begins with links to the entries of the shared one, and links its new ones there.
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla")))
OWN_CACHE = CACHE / os.environ.get("PYTEST_XDIST_WORKER", ".")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(OWN_CACHE)


def link_entries(source: Path, target: Path) -> None:
    """Makes the compiled programs of one cache known to another."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in source.glob("*-cache"):
        with suppress(FileExistsError):
            (target / entry.name).hardlink_to(entry)


link_entries(CACHE, OWN_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# Most of the time goes into compiling. XLA's own passes stay, so that compiled programs read the
# same. What follows them is as short as it can be, unless XLA_FLAGS asks for more.
SHORT = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # which inherits them; they are in the cache's keys
    os.environ["XLA_FLAGS"] = f"{known_flags(SHORT)} {os.environ.get('XLA_FLAGS', '')}"


def pytest_configure(config: pytest.Config) -> None:
    """Loads fixtures.py, but not in the process of pytest-xdist that only starts the others."""
    if not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` leaves out what takes long: tests/long, and tests with the mark."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "long"):
            item.add_marker(pytest.mark.long)


def pytest_sessionfinish() -> None:
    """The next run finds what this one has compiled."""
    link_entries(OWN_CACHE, CACHE)
