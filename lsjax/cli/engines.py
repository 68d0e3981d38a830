"""The engine and the strategies that flags ask for (lsjax/cli/flags/shared.py)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from jax.sharding import Mesh
from rich.console import Console

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.exit_blocks import BlocksSource
from lsjax.checkpoints.huggingface import read_generation_defaults
from lsjax.checkpoints.run import RunSource
from lsjax.checkpoints.tensors import TensorSource
from lsjax.cli.flags.shared import ModelFlags, StrategyFlags
from lsjax.cli.setup import bar, choose_dtype, keep_compiled_programs, waiting
from lsjax.config import GREEDY, ConfigError, MeshConfig, Sampling, check
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.cost import best_draft_vocab
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine, check_settings
from lsjax.decoding.int8_drafts import Int8Drafts
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit, Strategy
from lsjax.io.files import cache_directory
from lsjax.model.llama import Llama
from lsjax.sharding import make_mesh

FILTERS = ("top_k", "top_p", "min_p")  # fields of `Sampling` without effect on greedy decoding
MOST_EXITS = 4  # of a model, that auto chooses from
Counts = Mapping[int, int]  # token id -> occurrences


class OpenModel(NamedTuple):
    """A checkpoint's metadata, its tokenizer and the requested mesh; weights are not loaded."""

    flags: ModelFlags
    source: TensorSource | RunSource
    tokenizer: Tokenizer
    mesh: Mesh | None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `Engine` and `check_settings` that the flags give."""
        flags = self.flags
        return dict(batch_size=flags.batch_size, max_length=flags.max_length, mesh=self.mesh)


def open_model(flags: ModelFlags) -> OpenModel:
    """Opens a checkpoint and its tokenizer. Raises CheckpointError or TokenizerError for damaged
    files, and ConfigError if the mesh does not fit."""
    flags.mesh.check_decoding()
    source = open_checkpoint(flags.model, flags.exit_blocks)
    tokenizer = load_tokenizer(flags.model).fitted(source.config.vocab_size)
    mesh = None if flags.mesh == MeshConfig() else make_mesh(flags.mesh)
    return OpenModel(flags, source, tokenizer, mesh)


def load_engine(
    model: OpenModel,
    notes: Console,
    *,
    change: Callable[[Llama], Llama] = lambda model: model,
    **options: Any,
) -> Engine:
    """An engine with the checkpoint's weights, loaded with a progress bar if `notes` is a terminal.

    change: applied to the model after loading. options: other arguments of `Engine`.
    """
    keep_compiled_programs()
    dtype = choose_dtype(model.flags.dtype)
    what = f"loading {model.flags.model.name}"
    with nullcontext() if notes.is_terminal else waiting(notes, what):  # a terminal shows a bar
        given = dict(dtype=dtype, mesh=model.mesh, weights=model.flags.weights)
        loaded = load(model.source, track=bar(notes, "loading"), **given)
    options["kernels"] = model.flags.kernels
    options["compiling"] = partial(waiting, notes)
    options["track"] = bar(notes, "timing rounds, once for this machine")
    return Engine(change(loaded), model.tokenizer, **model.settings, **options)


def check_sampling(sampling: Sampling, num_samples: int) -> None:
    """Raises ConfigError if decoding is greedy and a flag affects only sampling."""
    given = [name for name in FILTERS if getattr(sampling, name) != getattr(GREEDY, name)]
    given += ["num_samples"] * (num_samples > 1)
    if given and sampling.temperature == 0:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect on greedy decoding: choose a "
            "--temperature above 0"
        )


def make_strategies(
    flags: StrategyFlags, model: OpenModel, counts: Counts | None = None
) -> list[Strategy]:
    """Every requested strategy, with every exit and draft length.

    counts: token counts for the draft vocabulary; by default those stored for this model. Raises
    ConfigError for a missing or unused number, or for settings that do not fit model or mesh.
    """
    names = list(dict.fromkeys(flags.strategies)) or ["autoregressive"]
    exits = list(dict.fromkeys(flags.exit_layers))
    check(
        not exits or names != ["autoregressive"],
        "--exit-layer has no effect on autoregressive decoding: choose another --strategy",
    )
    check(bool(exits) or "early_exit" not in names, "early_exit needs --exit-layer, such as 8")
    for name in ("num_draft_tokens", "draft_vocab", "draft_confidence", "draft_weights"):
        int8_head = name == "draft_weights" and flags.draft_weights == "int8-head"
        uses = {"self_speculative", *["auto"] * (name == "draft_vocab" or int8_head)}
        check(
            getattr(flags, name) in (None, (), "float") or bool(uses & {*names}),
            f"{flags.name_of(name)} has no effect on {' and '.join(names)}: add --strategy "
            "self_speculative",
        )
    made: dict[str, list[Strategy]] = {
        "autoregressive": [Autoregressive()],
        "early_exit": [EarlyExit(exit_layer) for exit_layer in exits],
    }
    size = flags.draft_vocab
    if "auto" in names:
        own = tuple(sorted(exits)) or trained_exits(model)
        check(bool(own) or size is None, "--draft-vocab has no effect without exits: leave it out")
        int8_head = flags.draft_weights == "int8-head"
        check(bool(own) or not int8_head, "--draft-weights has no effect without exits: name some")
        vocabulary = _vocabulary(model, flags, counts, own[len(own) // 2]) if own else None
        made["auto"] = [Adaptive(own, vocabulary, agreement=measured_agreement(model, own))]
    if "self_speculative" in names:
        lengths = list(dict.fromkeys(flags.num_draft_tokens))
        if not exits or not lengths:
            defaults = read_generation_defaults(model.flags.model)
            exits = exits or [defaults.exit_layer]
            lengths = lengths or [defaults.num_draft_tokens]
        missing = ["--exit-layer"] * (None in exits) + ["--num-draft-tokens"] * (None in lengths)
        check(
            not missing,
            f"self_speculative needs {' and '.join(missing)}: {model.flags.model} has no default",
        )
        vocabulary = None
        if size or trained_vocab(model) or flags.draft_weights == "int8-head":
            vocabulary = _vocabulary(model, flags, counts, exits[0])
        confidences = dict.fromkeys(flags.draft_confidence or (0.0,))
        kind = Int8Drafts if flags.draft_weights == "int8" else SelfSpeculative
        made["self_speculative"] = [
            kind(exit_layer, length, vocabulary, draft_confidence=confidence or None)
            for exit_layer, length, confidence in product(exits, lengths, confidences)
        ]
    strategies = [strategy for name in names for strategy in made[name]]
    for strategy in strategies:
        check_settings(model.source.config, strategy, **model.settings)
    return strategies


def _vocabulary(
    model: OpenModel, flags: StrategyFlags, counts: Counts | None, exit_layer: int
) -> DraftVocabulary | None:
    """The most frequent tokens: as many as the flags say, or the best number for drafts of this
    exit. Without a number and counts it is None, which drafts all tokens, or all with an int8
    head."""
    size, is_int8 = flags.draft_vocab, flags.draft_weights == "int8-head"
    size = size or trained_vocab(model)
    try:
        if counts is None:
            counted = model.flags.exit_blocks or model.flags.model
            counts = find_counts(counted, cache_directory(), model.tokenizer)
    except ConfigError:
        if size is not None:
            raise
    if size is None and counts:
        size = best_draft_vocab(model.source.config, exit_layer, counts)
    if size is None:
        return DraftVocabulary.every(model.source.config.vocab_size) if is_int8 else None
    found = DraftVocabulary.most_frequent(counts, size, model.tokenizer.vocab_size)
    return replace(found, is_int8=is_int8)


def measured_agreement(model: OpenModel, exits: Sequence[int]) -> tuple[float, ...]:
    """Share of greedy drafts of each exit that were right in training; empty if it is unknown."""
    agreement_E = model.source.agreement_E
    if agreement_E is None:
        return ()
    layers = model.source.config.num_layers
    check(
        len(agreement_E) == layers,
        f"{model.source.path}: has the agreement of {len(agreement_E)} exits, but {layers} layers: "
        "restore the file, or remove exit_agreement from it",
    )
    return tuple(agreement_E[exit_layer - 1] for exit_layer in exits)


def trained_vocab(model: OpenModel) -> int | None:
    """Draft vocabulary that the model's exit blocks were trained on; None for all tokens."""
    return model.source.blocks.draft_vocab if isinstance(model.source, BlocksSource) else None


def trained_exits(model: OpenModel) -> tuple[int, ...]:
    """Exits that the model was trained with, at most four; none for a model without LayerSkip. If
    all were trained, those at a sixteenth, an eighth, a quarter and half of the layers."""
    layers, exits = model.source.config.num_layers, []
    if isinstance(model.source, RunSource | BlocksSource):
        early_exit = model.source.early_exit
        if early_exit.get("curriculum", "none") in ("none", "subset"):
            exits = sorted(early_exit.get("exits", ()))
            return tuple(exit_layer for exit_layer in exits if exit_layer < layers)[:MOST_EXITS]
    else:
        exits = [read_generation_defaults(model.flags.model).exit_layer]
        if exits == [None]:
            return ()
    exits += [max(1, round(layers / part)) for part in (4, 2, 8, 16)]
    exits = [exit_layer for exit_layer in dict.fromkeys(exits) if exit_layer < layers]
    return tuple(sorted(exits[:MOST_EXITS]))
