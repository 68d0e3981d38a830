"""Exit blocks in a directory that can be published: safetensors, settings, a model card, base.json.

In the file, the block of exit 4 has Hugging Face's names of layer 4, the layer that it replaces in
drafts. So other engines can read it. base.json has the path of the base model, and a fingerprint of
it in each dtype.
"""

import shutil
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lsjax.checkpoints.exit_blocks import BASE, BlocksSource, ExitBlocksRun
from lsjax.checkpoints.huggingface import (
    SINGLE,
    GenerationDefaults,
    check_destination,
    read_generation_defaults,
    read_safetensors,
    typed_tensor,
)
from lsjax.checkpoints.run import CONFIG
from lsjax.checkpoints.steps import EXIT_BLOCKS
from lsjax.checkpoints.tensors import (
    CheckpointError,
    TensorSource,
    parts_of,
    read_parameter,
)
from lsjax.config import AnyPath, LlamaConfig
from lsjax.config.checked import from_json, without_version
from lsjax.data.token_counts import COUNTS
from lsjax.data.tokenizer import Tokenizer
from lsjax.io.files import (
    WEIGHTS,
    local_copy,
    one_line,
    read_json,
    whole_directory,
    write_json,
    write_whole,
    writing,
)
from lsjax.model.llama import Llama
from lsjax.model.parameters import named_leaves, sharding_of

SETTINGS = ("version", "model", "exit_blocks", "init_from")  # of a run, that its blocks need


class ExportedBlocks(BlocksSource, TensorSource):
    """A directory that `save_exit_blocks` wrote."""

    names = "huggingface"

    def __init__(self, directory: AnyPath, base: Any):
        self.path = directory
        file = directory / CONFIG
        self.settings = without_version(read_json(file, CheckpointError), str(file))
        self.config = from_json(LlamaConfig, self.settings.get("model"), f"{file}: model")
        local = local_copy(directory, wanted=WEIGHTS)
        self.tensors = read_safetensors(local / SINGLE)
        self.shapes = {name: tuple(each.get_shape()) for name, (_, each) in self.tensors.items()}
        self.agreement_E = read_generation_defaults(directory).agreement_E
        self.hang_off(base)

    def read(self, name: str) -> Any:
        """One tensor in its stored dtype."""
        return typed_tensor(self, name)

    def read_blocks(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: jnp.dtype, mesh: Mesh | None
    ) -> dict[str, Array]:
        """Those of the file. Raises CheckpointError if it has others."""
        stored = {
            part.tensor: part.stored_shape(shape)
            for name, shape in shapes.items()
            for part in parts_of(as_layer(name), self.names)
        }
        if stored != self.shapes:
            wrong = sorted({*stored.items()} ^ {*self.shapes.items()})[0][0]
            raise CheckpointError(
                f"{self.where(wrong)} is missing or has another shape: the file is of other blocks"
            )
        return {
            name: read_parameter(self, as_layer(name), shape, dtype, sharding_of(name, shape, mesh))
            for name, shape in shapes.items()
        }


def as_layer(name: str) -> str:
    """The path of the same parameter of the layer whose place the block takes."""
    return name.replace(EXIT_BLOCKS, "layers.", 1)


def save_exit_blocks(
    model: Llama, run: ExitBlocksRun, directory: AnyPath, tokenizer: Tokenizer, card: str
) -> None:
    """Writes the model's blocks atomically, in the dtype of their parameters. run: that trained
    them. Raises CheckpointError if the directory is not empty."""
    directory = directory.resolve()
    check_destination(directory)
    tensors = {
        part.tensor: part.stored(leaf)
        for name, leaf in named_leaves(model).items()
        if name.startswith(EXIT_BLOCKS)
        for part in parts_of(as_layer(name), "huggingface")
    }
    settings = read_json(run.path / CONFIG, CheckpointError)
    measured = GenerationDefaults(agreement_E=run.agreement_E).to_json()
    with writing(directory), whole_directory(directory, last=CONFIG) as partial:
        write_json(partial / CONFIG, {name: settings[name] for name in SETTINGS} | measured)
        tokenizer.save(partial)
        for name in (BASE, COUNTS):
            write_whole(partial / name, (run.path / name).read_bytes())
        write_whole(partial / "README.md", card.encode())
        try:
            save_file(tensors, partial / SINGLE, {"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{directory}: can't be written ({one_line(error)})") from error
        # safetensors makes files that only their owner reads, whatever the umask.
        shutil.copymode(partial / CONFIG, partial / SINGLE)
