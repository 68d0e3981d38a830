"""Converts a Hugging Face directory, GGUF file or training run into a Hugging Face directory."""

import jax

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.card import blocks_card, model_card
from lsjax.checkpoints.exit_blocks import BlocksSource, ExitBlocksRun
from lsjax.checkpoints.exported_blocks import save_exit_blocks
from lsjax.checkpoints.huggingface import (
    GenerationDefaults,
    check_destination,
    read_generation_defaults,
    save,
)
from lsjax.checkpoints.run import RunSource
from lsjax.cli.flags.convert import Arguments
from lsjax.cli.notes import notes_console
from lsjax.cli.setup import bar
from lsjax.config import check
from lsjax.data.token_counts import COUNTS
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.cost import best_exit
from lsjax.decoding.strategy import check_exit
from lsjax.model.exit_model import first_layers
from lsjax.terminal import SafeConsole


def convert(arguments: Arguments) -> None:
    """Reads and writes the model. Raises CheckpointError if model and tokenizer do not match."""
    source, destination, dtype = arguments.source, arguments.destination, arguments.dtype
    notes, options = notes_console(), {}
    check_destination(destination)
    opened, tokenizer = open_checkpoint(source), load_tokenizer(source)
    tokenizer.fitted(opened.config.vocab_size)  # fails before the long part
    exit_layer = arguments.exit_layer
    if isinstance(opened, BlocksSource):
        check(
            isinstance(opened, ExitBlocksRun) and exit_layer is None,
            f"{source} has exit blocks: they are written without --exit-layer, from their run",
        )
        return convert_blocks(arguments, opened, tokenizer)
    check_exit(exit_layer or 1, opened.config.num_layers)
    model = load(opened, dtype=dtype, track=bar(notes, "reading"))
    if exit_layer is not None:  # defaults and card of the full model do not fit
        model = first_layers(model, exit_layer)
    elif isinstance(opened, RunSource):
        options = of_run(opened, destination.name)
    else:
        options = {"generation": read_generation_defaults(source)}
    save(model, destination, tokenizer=tokenizer, track=bar(notes, "writing"), **options)
    size = f"{model.config.num_params / 1e6:.1f} million parameters in {dtype}"
    SafeConsole(soft_wrap=True).print(f"{destination}: {size}")


def convert_blocks(arguments: Arguments, run: ExitBlocksRun, tokenizer: Tokenizer) -> None:
    """Writes the blocks of a run, without their base."""
    model = load(run, dtype=arguments.dtype, track=bar(notes_console(), "reading"))
    size, destination = (
        sum(leaf.size for leaf in jax.tree.leaves(model.exit_blocks)),
        arguments.destination,
    )
    card = blocks_card(destination.name, run, size)
    save_exit_blocks(model, run, destination, tokenizer, card)
    words = f"exit blocks with {size / 1e6:.1f} million parameters in {arguments.dtype}"
    SafeConsole(soft_wrap=True).print(f"{destination}: {words}")


def of_run(run: RunSource, name: str) -> dict[str, GenerationDefaults | dict[str, bytes]]:
    """Arguments of `save` that only a run has: its best exit, its token counts and a model card.
    name: of the exported model."""
    generation = read_generation_defaults(run.path)
    if (agreement_E := run.agreement_E) is not None:
        exit_layer, drafts = best_exit(run.config, agreement_E) or (None, None)
        generation = GenerationDefaults(
            exit_layer=exit_layer, num_draft_tokens=drafts, agreement_E=agreement_E
        )
    files = {"README.md": model_card(name, run, generation).encode()}
    counts = run.path / COUNTS
    if counts.is_file():
        files[COUNTS] = counts.read_bytes()
    return {"generation": generation, "files": files}
