"""Exact float32 with shapes checked at run time; what tests share: models, tokenizers, programs."""

import gc
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

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
    *(
        f"lsjax.model.{name}"
        for name in ("attention", "block", "cached_attention", "llama", "rope")
    ),
    "lsjax.kernels",
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
from lsjax.cli import engines
from lsjax.config import LlamaConfig
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_backends import ByteTokenizer, HuggingFaceTokenizer, bytes_by_character
from lsjax.model.llama import Llama
from tests.shared_programs import SharedPrograms


@pytest.fixture(scope="session", autouse=True)
def shared_programs() -> Iterator[None]:
    """Engines of equal models share their programs. Compiling takes most of the tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsjax.decoding.runtime.Programs", SharedPrograms)
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
    """Two layers: its programs are compiled soon. It sees more than the smallest cache holds."""
    config = LlamaConfig.tiny(num_layers=2, max_context=2048)
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()


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
    monkeypatch.setattr(engines, "keep_compiled_programs", lambda: None)


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
