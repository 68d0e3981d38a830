"""Everything runs on CPUs, with a compilation cache. What needs jax is in fixtures.py."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from scripts.xla_flags import known_flags

os.environ["JAX_PLATFORMS"] = "cpu"
# jax's cache can't be shared by processes that write to it. So each process of pytest-xdist has its
# own. After each file of tests, it gets links to what the others have compiled, and gives its own.
ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla")))
OWN_CACHE = CACHE / os.environ.get("PYTEST_XDIST_WORKER", ".")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(OWN_CACHE)


def exchange_programs() -> None:
    """Makes the compiled programs of the shared cache and of this process known to one another."""
    OWN_CACHE.mkdir(parents=True, exist_ok=True)
    own, shared = (set(os.listdir(cache)) for cache in (OWN_CACHE, CACHE))
    for new, source, target in ((own - shared, OWN_CACHE, CACHE), (shared - own, CACHE, OWN_CACHE)):
        for name in new:
            if name.endswith("-cache"):
                with suppress(FileExistsError):
                    (target / name).hardlink_to(source / name)


exchange_programs()
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


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After a file, the other processes find what this one has compiled, and so does a next run."""
    if nextitem is None or item.path != nextitem.path:
        exchange_programs()
