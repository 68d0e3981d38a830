"""Flags that choose strategies, and the strategies made from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import tyro

from lsjax.checkpoints.huggingface import read_generation_defaults
from lsjax.checkpoints.run import RunSource
from lsjax.cli.flags import OpenModel
from lsjax.config import Checked, ConfigError, check
from lsjax.data.files import cache_directory
from lsjax.data.vocabulary import find_counts
from lsjax.decoding.adaptive import Adaptive
from lsjax.decoding.cost import best_draft_vocab
from lsjax.decoding.draft import DraftVocabulary
from lsjax.decoding.engine import check_settings
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit, Strategy

StrategyName = Literal["autoregressive", "early_exit", "self_speculative", "auto"]
MOST_EXITS = 4  # of a model, that auto chooses from


@dataclass(frozen=True, kw_only=True)
class StrategyFlags(Checked, prefix="--"):
    """Every combination of strategy, exit and draft length."""

    strategies: Annotated[tuple[StrategyName, ...], tyro.conf.arg(aliases=("--strategy",))] = (
        "autoregressive",
    )
    """autoregressive runs all layers. early_exit runs only the first layers. self_speculative
    drafts with the first layers and verifies with the others. auto chooses exit and draft length in
    each round, or looks drafts up in the text. These two give the tokens of greedy autoregressive
    decoding, up to rounding, or the same distribution of sampled text."""
    exit_layers: Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--exit-layer",))] = ()
    """Number of layers that draft, or that early_exit runs. Default for self_speculative:
    assistant_early_exit in the model's generation_config.json. Default for auto: exits that the
    model was trained with."""
    num_draft_tokens: tuple[int, ...] = ()
    """Tokens drafted per round. Default: num_assistant_tokens in generation_config.json."""
    draft_vocab: int | None = None
    """Drafts only from this many of the most frequent tokens, which makes the draft's head cheaper.
    python -m lsjax.cli.count_tokens counts the tokens."""
    draft_confidence: tuple[float, ...] = ()
    """Stops drafting before the product of the exit's highest probabilities falls below this, so
    that fewer draft tokens are rejected. With 0, the default, drafts have their full length."""


def make_strategies(
    flags: StrategyFlags, model: OpenModel, counts: Mapping[int, int] | None = None
) -> list[Strategy]:
    """Every requested strategy, with every exit and draft length.

    The model's directory has defaults for the exit and draft length of self-speculation. counts:
    token counts for the draft vocabulary; by default those stored for this model.

    Raises ConfigError for a missing or unused number, or for settings that do not fit the model or
    the mesh.
    """
    names, exits = list(dict.fromkeys(flags.strategies)), list(dict.fromkeys(flags.exit_layers))
    check(bool(names), "--strategies is empty: name one or more")
    check(
        not exits or names != ["autoregressive"],
        "--exit-layer has no effect on autoregressive decoding: choose another --strategy",
    )
    check(bool(exits) or "early_exit" not in names, "early_exit needs --exit-layer, such as 8")
    for name in ("num_draft_tokens", "draft_vocab", "draft_confidence"):
        uses = {"self_speculative", *["auto"] * (name == "draft_vocab")}
        check(
            getattr(flags, name) in (None, ()) or bool(uses & {*names}),
            f"{flags.name_of(name)} has no effect on {' and '.join(names)}: add --strategy "
            "self_speculative",
        )
    made: dict[str, list[Strategy]] = {
        "autoregressive": [Autoregressive()],
        "early_exit": [EarlyExit(exit_layer) for exit_layer in exits],
    }
    if "auto" in names:
        made["auto"] = [_adaptive(flags, model, tuple(sorted(exits)), counts)]
    if "self_speculative" in names:
        lengths = list(dict.fromkeys(flags.num_draft_tokens))
        if not exits or not lengths:
            kept = read_generation_defaults(model.flags.model)
            exits = exits or [one for one in [kept.exit_layer] if one is not None]
            lengths = lengths or [one for one in [kept.num_draft_tokens] if one is not None]
        missing = ["--exit-layer"] * (not exits) + ["--num-draft-tokens"] * (not lengths)
        check(
            not missing,
            f"self_speculative needs {' and '.join(missing)}: {model.flags.model} has no default",
        )
        vocabulary = None
        if (size := flags.draft_vocab) is not None:
            counts = counts_of(model) if counts is None else counts
            vocabulary = DraftVocabulary.most_frequent(counts, size, model.tokenizer.vocab_size)
        confidences = dict.fromkeys(flags.draft_confidence or (0.0,))
        made["self_speculative"] = [
            SelfSpeculative(exit_layer, length, vocabulary, draft_confidence=confidence or None)
            for exit_layer, length, confidence in product(exits, lengths, confidences)
        ]
    strategies = [strategy for name in names for strategy in made[name]]
    for strategy in strategies:
        check_settings(
            model.source.config,
            strategy,
            batch_size=model.flags.batch_size,
            max_length=model.flags.max_length,
            mesh=model.mesh,
        )
    return strategies


def _adaptive(
    flags: StrategyFlags,
    model: OpenModel,
    exits: tuple[int, ...],
    counts: Mapping[int, int] | None,
) -> Adaptive:
    """The strategy that chooses its drafts, with the trained exits and the best draft vocabulary by
    default. Without token counts, exits may draft all tokens."""
    exits, size = exits or trained_exits(model), flags.draft_vocab
    check(bool(exits) or size is None, "--draft-vocab has no effect without exits: leave it out")
    if not exits:
        return Adaptive()
    if counts is None:
        try:
            counts = counts_of(model)
        except ConfigError:
            if size is not None:
                raise
    if size is None and counts:
        size = best_draft_vocab(model.source.config, exits[len(exits) // 2], counts)
    if size is None:
        return Adaptive(exits)
    vocab_size = model.tokenizer.vocab_size
    return Adaptive(exits, DraftVocabulary.most_frequent(counts, size, vocab_size))


def counts_of(model: OpenModel) -> Mapping[int, int]:
    """Token counts stored for the model. Raises ConfigError if they are missing."""
    return find_counts(model.flags.model, cache_directory(), model.tokenizer)


def trained_exits(model: OpenModel) -> tuple[int, ...]:
    """Exits that the model was trained with, at most four; none for a model without LayerSkip.

    If all of them were trained, those at a sixteenth, an eighth, a quarter and half of the layers.
    """
    layers, own = model.source.config.num_layers, ()
    if isinstance(model.source, RunSource):
        curriculum = model.source.early_exit.get("curriculum", "none")
        if curriculum in ("none", "subset"):
            return tuple(sorted(model.source.early_exit.get("exits", ())))[:MOST_EXITS]
    else:
        exit_layer = read_generation_defaults(model.flags.model).exit_layer
        if exit_layer is None:
            return ()
        own = (exit_layer,)
    more = [max(1, round(layers / part)) for part in (4, 2, 8, 16)]
    return tuple(sorted([*dict.fromkeys((*own, *more))][:MOST_EXITS]))
