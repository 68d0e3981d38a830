"""Configuration of a Llama: its shape and initialisation."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lsjax.config.checked import Checked, bounded, check


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked, prefix="rope_scaling."):
    """Scaling of rotary frequencies for contexts longer than in training.

    kind: "linear" divides every frequency by `factor` (position interpolation); "llama3" divides
      the low frequencies, keeps the high ones and blends between the two (Llama 3.1); "yarn" does
      so with other limits, and scales sines and cosines (YaRN; Peng et al., 2023).
    low_freq_factor, high_freq_factor: of "llama3". beta_fast, beta_slow: of "yarn", which keeps
      pairs of channels that turn more than beta_fast times in original_context, and divides those
      below beta_slow. truncate: at whole pairs. attention_factor: of its sines and cosines.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = bounded(low=1)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = bounded(8192, low=1)
    beta_fast: float = bounded(32.0, above=0)
    beta_slow: float = bounded(1.0, above=0)
    attention_factor: float = bounded(1.0, above=0)
    truncate: bool = True

    def __post_init__(self):
        super().__post_init__()
        check(
            self.kind != "llama3" or 0 < self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling needs 0 < low_freq_factor ({self.low_freq_factor}) < "
            f"high_freq_factor ({self.high_freq_factor})",
        )
        check(
            self.kind != "yarn" or self.beta_slow < self.beta_fast,
            f"rope_scaling needs beta_slow ({self.beta_slow}) < beta_fast ({self.beta_fast})",
        )


class LayerKind(NamedTuple):
    """How one layer differs from the others. rope: "full" has rope_theta and rope_scaling, "window"
    window_rope_theta alone. window: number of keys that a query sees, its own included."""

    rope: Literal["none", "full", "window"]
    window: int | None


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Checked):
    """The shape of a Llama. Letters as in docs/method.md."""

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
    """H: size of a head; usually D / N, but checkpoints may differ."""
    max_context: int = bounded(low=1)
    """Longest context that the model was trained on."""
    rope_theta: float = bounded(10_000.0, above=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the frequencies for a longer context."""
    norm_eps: float = bounded(1e-5, above=0)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head shares the embedding's weights."""
    attention_bias: bool = False
    """Biases on queries, keys, values and the output of attention."""
    qkv_bias: bool = False
    """Biases on queries, keys and values, not on the output (Qwen2)."""
    mlp_bias: bool = False
    """Biases on gate, up and down."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys before rope: of each head (Qwen3) or all heads (OLMo 2)."""
    norm_after: bool = False
    """Whether norms follow attention and feed-forward (OLMo 2) instead of preceding them."""
    no_rope_layers: tuple[int, ...] = bounded((), low=0)
    """Indices of layers without rope (SmolLM3)."""
    sliding_window: int | None = bounded(None, low=1)
    """Number of keys that a query sees, its own included; None for all before it (Mistral)."""
    full_attention_layers: tuple[int, ...] = bounded((), low=0)
    """Indices of layers that ignore the sliding window."""
    window_rope_theta: float | None = bounded(None, above=0)
    """Base of the frequencies in layers with a sliding window, which are then not scaled (OLMo 3);
    None for the frequencies of other layers."""
    init_std: float = bounded(0.02, low=0)
    """Standard deviation of new weights, normally distributed."""
    scaled_init: bool = False
    """Whether initial weights that write to the residual stream are divided by sqrt(2 L), because
    each layer adds twice (GPT-2; Radford et al., 2019)."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        check(self.head_dim % 2 == 0, f"head_dim {self.head_dim} must be even for rope")

    def layer_kind(self, layer: int) -> LayerKind:
        """The switches of the layer with this index."""
        window = None if layer in self.full_attention_layers else self.sliding_window
        if layer in self.no_rope_layers:
            return LayerKind("none", window)
        own = window is not None and self.window_rope_theta is not None
        return LayerKind("window" if own else "full", window)

    @property
    def layer_period(self) -> int:
        """Smallest number of layers, a divisor of L, after which the kinds of layers repeat."""
        kinds = [self.layer_kind(layer) for layer in range(self.num_layers)]
        sizes = (size for size in range(1, self.num_layers + 1) if self.num_layers % size == 0)
        return next(size for size in sizes if kinds == kinds[:size] * (self.num_layers // size))

    @property
    def layer_params(self) -> int:
        """Parameters of one transformer block."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = (self.attention_bias or self.qkv_bias) * (q + 2 * kv)
        biases += self.attention_bias * d + self.mlp_bias * (2 * f + d)
        norms = 2 * d + {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        return d * (2 * q + 2 * kv) + 3 * d * f + norms + biases

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

    @classmethod
    def tiny(cls, **changes) -> "LlamaConfig":
        """A small model for tests: 4 layers, width 64, 4 heads over 2 K/V heads."""
        return _preset(changes, 258, 64, 128, 4, 4, 2, 512, init_std=0.2)

    @classmethod
    def smollm2_135m(cls, **changes) -> "LlamaConfig":
        """SmolLM2-135M (Hugging Face, 2024): deep and narrow; its tied head equals 8 layers."""
        rest = dict(rope_theta=1e5, tie_embeddings=True)
        return _preset(changes, 49_152, 576, 1_536, 30, 9, 3, 8_192, **rest)

    @classmethod
    def layerskip_1_5b(cls, **changes) -> "LlamaConfig":
        """The paper's Llama 1.5B (Table 10). The feed-forward width is ours; the paper omits it."""
        return _preset(changes, 32_000, 2_048, 5_632, 24, 16, 16, 4_096)

    @classmethod
    def llama2_7b(cls, **changes) -> "LlamaConfig":
        """Llama-2 7B."""
        return _preset(changes, 32_000, 4_096, 11_008, 32, 32, 32, 4_096)

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


def _preset(changes: dict[str, Any], *sizes: int, **rest: Any) -> LlamaConfig:
    """The config with these sizes and fields."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers")
    names += ("num_heads", "num_kv_heads", "max_context")
    shape = dict(zip(names, sizes, strict=True))
    shape["head_dim"] = shape["hidden_size"] // shape["num_heads"]
    return LlamaConfig(**(shape | rest | changes))
