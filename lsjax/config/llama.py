"""The shape of a Llama."""

import math
from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, bounded, check


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked, prefix="rope_scaling."):
    """How rotary frequencies are stretched beyond the context that they were trained on.

    kind: "linear" divides every frequency by `factor` (position interpolation); "llama3" divides
      the low frequencies, keeps the high ones and blends between the two (Llama 3.1).
    low_freq_factor, high_freq_factor, original_context: read by "llama3" only.
    """

    kind: Literal["linear", "llama3"]
    factor: float = bounded(low=1)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = bounded(8192, low=1)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.kind != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling needs 0 < low_freq_factor ({self.low_freq_factor}) < "
            f"high_freq_factor ({self.high_freq_factor})",
        )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Checked):
    """The shape of a Llama. Letters: V, D, F, L, N, K, H as in lsjax/model/llama.py."""

    vocab_size: int = bounded(low=1)
    """V: tokens of the vocabulary."""
    hidden_size: int = bounded(low=1)
    """D: width of the model."""
    intermediate_size: int = bounded(low=1)
    """F: width of the feed-forward part."""
    num_layers: int = bounded(low=1)
    """L: layers."""
    num_heads: int = bounded(low=1)
    """N: heads of queries."""
    num_kv_heads: int = bounded(low=1)
    """K: heads with keys and values; N for multi-head attention, fewer for grouped-query."""
    head_dim: int = bounded(low=1)
    """H: size of a head; usually D / N, but a checkpoint may say otherwise."""
    max_context: int = bounded(low=1)
    """Positions that the model was trained on."""
    rope_theta: float = bounded(10_000.0, above=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the frequencies for a longer context."""
    norm_eps: float = bounded(1e-5, above=0)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head is the embedding."""
    attention_bias: bool = False
    """Biases on queries, keys, values and the output of attention."""
    mlp_bias: bool = False
    """Biases on gate, up and down."""
    init_std: float = bounded(0.02, low=0)
    """Standard deviation of new weights, normally distributed."""
    scaled_init: bool = False
    """Whether weights that write to the residual stream start smaller by sqrt(2 L), as each layer
    adds twice (GPT-2; Radford et al., 2019)."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rope")

    @property
    def layer_params(self) -> int:
        """Parameters of one transformer block."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = self.attention_bias * (q + 2 * kv + d) + self.mlp_bias * (2 * f + d)
        return d * (2 * q + 2 * kv) + 3 * d * f + 2 * d + biases

    @property
    def head_params(self) -> int:
        """Parameters that one pass through the head reads."""
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        """All parameters; a tied head counts once."""
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * self.layer_params + tables * self.head_params + self.hidden_size

    @property
    def residual_std(self) -> float:
        """Standard deviation of new weights that write to the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_layers if self.scaled_init else 1)

    def cache_bytes(self, batch: int, capacity: int, itemsize: int) -> int:
        """Bytes of a key/value cache of `capacity` slots for `batch` rows."""
        return 2 * self.num_layers * batch * capacity * self.num_kv_heads * self.head_dim * itemsize

    @classmethod
    def tiny(cls, **changes) -> "LlamaConfig":
        """Small enough for a test: 4 layers, width 64, 4 heads over 2 K/V heads."""
        return _preset(changes, 258, 64, 128, 4, 4, 2, 512, init_std=0.2)

    @classmethod
    def smollm2_135m(cls, **changes) -> "LlamaConfig":
        """SmolLM2-135M (Hugging Face, 2024): deep and narrow, a tied head of 8 layers' weight."""
        rest = dict(rope_theta=1e5, tie_embeddings=True)
        return _preset(changes, 49_152, 576, 1_536, 30, 9, 3, 8_192, **rest)

    @classmethod
    def layerskip_1_5b(cls, **changes) -> "LlamaConfig":
        """The paper's Llama 1.5B (its Table 10); the feed-forward width, not given, is ours."""
        return _preset(changes, 32_000, 2_048, 5_632, 24, 16, 16, 4_096)

    @classmethod
    def llama_7b(cls, **changes) -> "LlamaConfig":
        """Llama 7B (Touvron et al., 2023)."""
        return _preset(changes, 32_000, 4_096, 11_008, 32, 32, 32, 2_048, norm_eps=1e-6)

    @classmethod
    def llama2_7b(cls, **changes) -> "LlamaConfig":
        """Llama-2 7B."""
        return _preset(changes, 32_000, 4_096, 11_008, 32, 32, 32, 4_096)

    @classmethod
    def llama2_13b(cls, **changes) -> "LlamaConfig":
        """Llama-2 13B."""
        return _preset(changes, 32_000, 5_120, 13_824, 40, 40, 40, 4_096)

    @classmethod
    def llama3_8b(cls, **changes) -> "LlamaConfig":
        """Llama-3 8B."""
        return _preset(changes, 128_256, 4_096, 14_336, 32, 32, 8, 8_192, rope_theta=5e5)

    @classmethod
    def llama3_2_1b(cls, **changes) -> "LlamaConfig":
        """Llama-3.2 1B."""
        scaling = RopeScaling(kind="llama3", factor=32.0)
        rest = dict(rope_theta=5e5, rope_scaling=scaling, tie_embeddings=True)
        return _preset(changes, 128_256, 2_048, 8_192, 16, 32, 8, 131_072, **rest)


def _preset(changes: dict, v, d, f, layers, heads, kv_heads, context, **rest) -> LlamaConfig:
    shape = dict(
        vocab_size=v,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d // heads,
        max_context=context,
    )
    return LlamaConfig(**(shape | rest | changes))
