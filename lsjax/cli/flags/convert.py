"""Converts a model directory, GGUF file or training run into a Hugging Face directory.

The result holds config.json, safetensors and the tokenizer. lsjax and transformers can load it.
It appears under its name only when it is complete. Of a run of exit blocks, it holds the blocks
alone, for --exit-blocks.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from lsjax.cli.flags.parse import Program
from lsjax.config import AnyPath, Checked, bounded


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


PROGRAM = Program(
    "convert",
    "lsjax.cli.convert:convert",
    Arguments,
    __doc__,
    common="""
        source destination dtype exit_layer
    """,
    usage="SOURCE DESTINATION",
)
