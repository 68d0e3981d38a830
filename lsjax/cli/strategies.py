"""Several strategies side by side, as programs are asked for them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from lsjax.cli import decoding_options
from lsjax.config import LlamaConfig, MeshConfig, check
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.choices import Choices
from lsjax.decoding.request import check_settings
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.sharding import make_mesh

StrategyName = Literal["autoregressive", "early_exit", "self_speculative"]


def choose_strategies(
    model: Path,
    tokenizer: Tokenizer,
    names: Sequence[StrategyName],
    exit_layers: Sequence[int],
    num_draft_tokens: int | None,
    draft_vocab: int | None,
    draft_confidence: float | None,
    *,
    flag: str,
) -> list[Strategy]:
    """Each strategy, those that exit early at every exit.

    flag: that names the strategies, for messages. Raises ConfigError for what does not fit.
    """
    names, exits = list(dict.fromkeys(names)), list(dict.fromkeys(exit_layers))
    check(bool(names), f"{flag} names no strategy")
    check(
        not exits or names != ["autoregressive"],
        f"--exit-layers means nothing to autoregressive decoding: add {flag} early_exit or "
        "self_speculative",
    )
    check(bool(exits) or "early_exit" not in names, "early_exit needs --exit-layers, one or more")
    drafts = {
        "num_draft_tokens": num_draft_tokens,
        "draft_vocab": draft_vocab,
        "draft_confidence": draft_confidence,
    }
    for name, value in drafts.items():
        check(
            value is None or "self_speculative" in names,
            f"--{name.replace('_', '-')} needs {flag} self_speculative",
        )
    strategies = []
    for name in names:
        own = drafts if name == "self_speculative" else {}
        for exit_layer in [None] if name == "autoregressive" else exits or [None]:
            options = decoding_options.Arguments(
                model=model, strategy=name, exit_layer=exit_layer, **own
            )
            strategies.append(decoding_options.choose_strategy(options, tokenizer))
    return strategies


def fitting_mesh(
    mesh_config: MeshConfig,
    strategies: Sequence[Strategy],
    config: LlamaConfig,
    *,
    batch_size: int,
    max_length: int | None,
) -> Mesh | None:
    """The mesh that was asked for, None for one device.

    Raises ConfigError where it does not fit the devices, or a strategy, the batch or the length do
    not fit the model and it.
    """
    mesh = None if mesh_config == MeshConfig() else make_mesh(mesh_config)
    for strategy in strategies:
        check_settings(
            config,
            strategy,
            batch_size=batch_size,
            max_length=max_length,
            data_axis=1 if mesh is None else mesh.shape["data"],
        )
    return mesh


def in_one_program(strategies: Sequence[Strategy]) -> list[Strategy]:
    """The same strategies; those that speculate share one compiled program."""
    drafting = [one for one in strategies if isinstance(one, SelfSpeculative)]
    if len(drafting) < 2:
        return list(strategies)
    choices = Choices.covering(
        (one.exit_layer for one in drafting),
        (length for one in drafting for length in one.lengths),
    )
    return [replace(one, choices=choices) if one in drafting else one for one in strategies]
