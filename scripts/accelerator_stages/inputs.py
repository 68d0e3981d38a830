"""Random models and prompts: the stages need no file and no library of tokenizers."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lsjax.config import LlamaConfig
from lsjax.data.tokenizer import Tokenizer, TokenizerError
from lsjax.model.llama import Llama


class Numbers(Tokenizer):
    """Spells token 17 as " 17"; nothing ends a text."""

    bos_id, eos_ids, add_bos, chat_template = None, (), False, None
    special_spelling: dict[int, str] = {}

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._pieces = {token: f" {token}".encode() for token in range(vocab_size)}

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        return [int(word) for word in text.split()]

    def _save_model(self, directory: Path) -> str:
        raise TokenizerError("numbers as tokens have no files: save the model's own tokenizer")


def random_model(config: LlamaConfig, dtype: str) -> Llama:
    """Random weights, made on the device."""
    return jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))()


def random_prompts(config: LlamaConfig, lengths: list[int]) -> list[list[int]]:
    """A prompt of each length."""
    rng = np.random.default_rng(0)
    return [rng.integers(config.vocab_size, size=length).tolist() for length in lengths]
