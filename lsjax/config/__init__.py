"""Configurations: frozen, hashable dataclasses that say what is wrong with a bad value."""

from lsjax.config.errors import ConfigError, check
from lsjax.config.llama import LlamaConfig, RopeScaling
from lsjax.config.mesh import MeshConfig

__all__ = ["ConfigError", "LlamaConfig", "MeshConfig", "RopeScaling", "check"]
