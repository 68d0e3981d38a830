"""LayerSkip in JAX: early-exit training and lossless self-speculative decoding of Llamas.

>>> import lsjax
>>> model = lsjax.load("path/to/model")
>>> engine = lsjax.Engine(model, lsjax.load_tokenizer("path/to/model"))
>>> print(engine.generate(["Once upon a time"], max_new_tokens=32)[0].text)
"""

from lsjax.checkpoints import (
    CheckpointError,
    GenerationDefaults,
    load,
    read_generation_defaults,
    save,
)
from lsjax.config import ConfigError, LlamaConfig, MeshConfig, RopeScaling
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.completion import Completion
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.model.cache import KVCache
from lsjax.model.llama import Llama, stacked, unstacked
from lsjax.sharding import make_mesh

__all__ = [
    "Autoregressive",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Conversation",
    "EarlyExit",
    "Engine",
    "GenerationDefaults",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "MeshConfig",
    "Request",
    "RopeScaling",
    "Sampling",
    "SelfSpeculative",
    "load",
    "load_tokenizer",
    "make_mesh",
    "read_generation_defaults",
    "save",
    "stacked",
    "unstacked",
]
