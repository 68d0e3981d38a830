"""Converts a Hugging Face directory, GGUF file or training run into a Hugging Face directory."""

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.huggingface import check_destination, read_generation_defaults, save
from lsjax.cli.flags.convert import Arguments
from lsjax.cli.setup import bar
from lsjax.cli.show import notes_console
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.strategy import check_exit
from lsjax.model.exit_model import first_layers
from lsjax.terminal import SafeConsole


def convert(arguments: Arguments) -> None:
    """Reads and writes the model. Raises CheckpointError if model and tokenizer do not match."""
    source, destination, dtype = arguments.source, arguments.destination, arguments.dtype
    notes = notes_console()
    check_destination(destination)
    opened, tokenizer = open_checkpoint(source), load_tokenizer(source)
    tokenizer.fitted(opened.config.vocab_size)  # fails before the long part
    exit_layer = arguments.exit_layer
    check_exit(exit_layer or 1, opened.config.num_layers)
    model = load(opened, dtype=dtype, track=bar(notes, "reading"))
    generation, writing = read_generation_defaults(source), bar(notes, "writing")
    if exit_layer is not None:  # defaults of the full model do not fit
        model, generation = first_layers(model, exit_layer), None
    save(model, destination, generation=generation, tokenizer=tokenizer, track=writing)
    size = f"{model.config.num_params / 1e6:.1f} million parameters in {dtype}"
    SafeConsole(soft_wrap=True).print(f"{destination}: {size}")
