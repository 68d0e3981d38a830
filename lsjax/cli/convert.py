"""Converts a Hugging Face directory, a GGUF file or a training run into a Hugging Face directory.

The result holds config.json, safetensors and the tokenizer. lsjax and transformers can load it.
It appears under its name only when it is complete.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import track

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.huggingface import check_destination, read_generation_defaults, save
from lsjax.cli.flags import program
from lsjax.config import Path
from lsjax.data.tokenizer_files import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Converts a model of any kind into a Hugging Face directory."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Directory with config.json and safetensors, GGUF file, or directory of a run (RUN@200 and
    RUN@best are steps of it); with its tokenizer."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """Directory to write; new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights. GGUF weights are always dequantised."""


def convert(arguments: Arguments) -> None:
    """Reads and writes the model.

    Raises CheckpointError if model and tokenizer do not match.
    """
    source, destination, dtype = arguments.source, arguments.destination, arguments.dtype
    console = Console(stderr=True)
    bar = partial(track, console=console, disable=not console.is_terminal, transient=True)
    check_destination(destination)
    opened, tokenizer = open_checkpoint(source), load_tokenizer(source)
    tokenizer.fitted(opened.config.vocab_size)  # fails before the long part
    model = load(opened, dtype=dtype, track=partial(bar, description="reading"))
    generation = read_generation_defaults(source)
    writing = partial(bar, description="writing")
    save(model, destination, generation=generation, tokenizer=tokenizer, track=writing)
    parameters = model.config.num_params / 1e6
    print(f"{destination}: {parameters:.1f} million parameters in {dtype}")


main = program(Arguments, convert, __doc__)

if __name__ == "__main__":
    sys.exit(main())
