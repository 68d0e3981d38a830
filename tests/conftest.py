"""Everything runs on CPUs, in exact float32, with shapes checked at run time."""

import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

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

import jax
import jaxtyping
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# Tracing makes many objects. Rare collections save a tenth of the time.
gc.set_threshold(200_000, 50, 1000)

# Not the modules of pytrees (cache, state, self_speculative): jax also builds those from
# placeholders that have no shape.
CHECKED = [
    "lsjax.checkpoints",
    "lsjax.data",
    *(f"lsjax.model.{name}" for name in ("attention", "block", "llama", "operations")),
    *(f"lsjax.decoding.{name}" for name in ("strategy", "completion", "engine", "programs")),
    "lsjax.platforms",
    "lsjax.sharding",
]
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    import lsjax

    for name in lsjax.__all__:
        getattr(lsjax, name)

import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from lsjax.checkpoints.huggingface import GenerationDefaults
from lsjax.cli import flags
from lsjax.config import LlamaConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_backends import ByteTokenizer, HuggingFaceTokenizer, bytes_by_character
from lsjax.model.llama import Llama
from tests.shared_programs import SharedPrograms


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` leaves out what takes long: tests/long, and tests with the mark."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "long"):
            item.add_marker(pytest.mark.long)


def pytest_sessionfinish() -> None:
    """The next run finds what this one has compiled."""
    link_entries(OWN_CACHE, CACHE)


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """Engines of equal models share their programs. Compiling takes most of the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsjax.decoding.engine.Programs", SharedPrograms)
        yield


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    """Four layers, grouped queries, a vocabulary of bytes."""
    return LlamaConfig.tiny()


@pytest.fixture(scope="session")
def model(config) -> Llama:
    """A random Llama whose exits agree now and then, so that drafts are accepted and refused."""
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="session")
def shallow() -> Llama:
    """Two layers: its programs are compiled soon."""
    return jax.jit(lambda: Llama(LlamaConfig.tiny(num_layers=2), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="session")
def model_directory(model, tokenizer, tmp_path_factory) -> Path:
    """The tiny model with a byte tokenizer; it says to draft 4 tokens with 3 layers."""
    directory = tmp_path_factory.mktemp("models") / "tiny [x] :smile:"  # no markup, no picture
    defaults = GenerationDefaults(exit_layer=3, num_draft_tokens=4)
    lsjax.save(model, directory, generation=defaults, tokenizer=tokenizer)
    return directory


@pytest.fixture(autouse=True)
def programs_keep_the_cache(monkeypatch) -> None:
    """They would change JAX's settings for all tests that follow."""
    monkeypatch.setattr(flags, "keep_compiled_programs", lambda: None)


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Given a size in bytes, a context in which no file can grow beyond it."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        # jax would keep broken entries in its cache of programs.
        name = "jax_persistent_cache_min_compile_time_secs"
        seconds, before = getattr(jax.config, name), resource.getrlimit(resource.RLIMIT_FSIZE)
        jax.config.update(name, 1e9)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            jax.config.update(name, seconds)

    return limited


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes: every token of the tiny model is one."""
    return ByteTokenizer(add_bos=False)


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    """As many bytes as the golden models have tokens."""
    vocab = dict(list(bytes_by_character().items())[:64])
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(backend)
