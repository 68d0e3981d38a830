"""Flags that several programs share: the model, chat messages and strategies."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lsjax.config import (
    AnyPath,
    Checked,
    Kernels,
    MeshConfig,
    Sampling,
    Weights,
    bounded,
    check,
)

# `Sampling` itself, without a prefix on the command line.
SamplingFlags = tyro.conf.OmitArgPrefixes[Sampling]
StrategyName = Literal["autoregressive", "early_exit", "self_speculative", "auto"]


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Checked, prefix="--"):
    """Model, devices and dtype."""

    model: AnyPath
    """Hugging Face directory (config.json, safetensors, tokenizer), .gguf file, or directory of a
    training run (RUN@200 and RUN@best are steps of it)."""
    exit_blocks: AnyPath | None = None
    """Run of exit blocks that draft for this model, or exported blocks. Both also decode as
    --model, if their base has not moved."""
    batch_size: int = 1
    """Prompts decoded in parallel."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    weights: Weights = "float"
    """Matrices and head: float as they are, or int8 with a scale for each output channel. int8
    takes half the memory of bfloat16. The texts then differ. On CPUs it saves no time."""
    max_length: int | None = None
    """Maximum tokens, prompt plus new text; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to decode on; one by default."""
    kernels: Kernels = "auto"
    """Tuned code: auto uses what is tuned for the platform, reference none of it."""


@dataclass(frozen=True, kw_only=True)
class ChatFlags(Checked, prefix="--"):
    """Prompts as chat messages."""

    chat: bool = False
    """Formats prompts with the model's chat template."""
    system: str | None = None
    """System message, with --chat."""

    def __post_init__(self):
        super().__post_init__()
        check(self.chat or self.system is None, "--system needs --chat: add it, or drop --system")


@dataclass(frozen=True, kw_only=True)
class StrategyFlags(Checked, prefix="--"):
    """Every combination of strategy, exit and draft length."""

    strategies: Annotated[tuple[StrategyName, ...], tyro.conf.arg(aliases=("--strategy",))] = ()
    """How text is made: one or several of these. autoregressive runs all layers. early_exit runs
    only the first layers. self_speculative drafts with the first layers and verifies with the
    others. auto chooses exit and draft length in each round, or looks drafts up in the text. These
    two give the tokens of greedy autoregressive decoding, up to rounding, or the same distribution
    of sampled text. Default: autoregressive, but decode.py takes auto if the model was trained with
    exits."""
    exit_layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--exit-layer",))] = ()
    """Number of layers that draft, or that early_exit runs. Default for self_speculative:
    assistant_early_exit in the model's generation_config.json. Default for auto: exits that the
    model was trained with."""
    num_draft_tokens: tuple[int, ...] = ()
    """Tokens drafted per round. Default: num_assistant_tokens in generation_config.json."""
    draft_vocab: int | None = bounded(None, low=1)
    """Drafts only from this many of the most frequent tokens, which makes the draft's head cheaper.
    lsjax count-tokens counts the tokens."""
    draft_weights: Literal["float", "int8-head", "int8"] = "float"
    """Weights of drafts, which do not change the text. int8-head rounds the head, for any exit or
    block. int8 rounds the first layers too, for self_speculative. The verification then runs all
    layers."""
    draft_confidence: tuple[float, ...] = ()
    """Stops drafting before the product of the exit's highest probabilities falls below this, so
    that fewer draft tokens are rejected. With 0, the default, drafts have their full length."""
