"""Converts a Hugging Face directory, a GGUF file or a training run into a Hugging Face directory.

The result holds config.json, safetensors and the tokenizer. lsjax and transformers can load it.
It appears under its name only when it is complete.
"""

from lsjax.interrupts import run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.convert")

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.huggingface import check_destination, read_generation_defaults, save
from lsjax.cli.setup import bar, program
from lsjax.cli.show import notes_console
from lsjax.config import AnyPath, Checked, bounded, check
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.model.llama import first_layers
from lsjax.terminal import SafeConsole


@dataclass(frozen=True, kw_only=True)
class Arguments(Checked):
    """Converts a model of any kind into a Hugging Face directory."""

    source: Annotated[AnyPath, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Directory with config.json and safetensors, GGUF file, or directory of a run (RUN@200 and
    RUN@best are steps of it); with its tokenizer."""
    destination: Annotated[AnyPath, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """Directory to write; new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights. GGUF weights are always dequantised."""
    exit_layer: Annotated[int | None, tyro.conf.arg(aliases=("--exit",))] = bounded(None, low=1)
    """Writes only the first layers up to this exit, with norm and head: a draft model for other
    engines."""


def convert(arguments: Arguments) -> None:
    """Reads and writes the model. Raises CheckpointError if model and tokenizer do not match."""
    source, destination, dtype = arguments.source, arguments.destination, arguments.dtype
    notes = notes_console()
    check_destination(destination)
    opened, tokenizer = open_checkpoint(source), load_tokenizer(source)
    tokenizer.fitted(opened.config.vocab_size)  # fails before the long part
    exit_layer, layers = arguments.exit_layer, opened.config.num_layers
    check(
        exit_layer is None or exit_layer <= layers,
        f"--exit-layer {exit_layer} is out of range: use 1..{layers}",
    )
    model = load(opened, dtype=dtype, track=bar(notes, "reading"))
    generation, writing = read_generation_defaults(source), bar(notes, "writing")
    if exit_layer is not None:  # defaults of the full model do not fit
        model, generation = first_layers(model, exit_layer), None
    save(model, destination, generation=generation, tokenizer=tokenizer, track=writing)
    size = f"{model.config.num_params / 1e6:.1f} million parameters in {dtype}"
    SafeConsole(soft_wrap=True).print(f"{destination}: {size}")


main = program(Arguments, convert, __doc__)
