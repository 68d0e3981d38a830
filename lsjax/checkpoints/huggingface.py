"""Reads and writes Hugging Face directories: config.json, safetensors, generation_config.json.

The safetensors package reads and writes the files. Its writer takes all tensors of a file at once.
So an export holds one file in memory beside the model.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lsjax.checkpoints.compressed import KEY, quantization_config, without_quantization
from lsjax.checkpoints.families import config_json, llama_config
from lsjax.checkpoints.tensors import CheckpointError, Part, TensorSource, Track, parts_of
from lsjax.config import AnyPath, Checked, ConfigError, as_path, bounded, split_step
from lsjax.data.tokenizer import Tokenizer
from lsjax.io.files import (
    one_line,
    read_json,
    whole_directory,
    write_json,
    write_whole,
    writing,
)
from lsjax.model.int8 import Int8Rows
from lsjax.model.llama import Llama, unstacked
from lsjax.model.parameters import named_leaves

SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = {
    "exit_layer": "assistant_early_exit",
    "num_draft_tokens": "num_assistant_tokens",
    "agreement_E": "exit_agreement",  # of ours alone
}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults(Checked):
    """A checkpoint's defaults for decoding; None if unset."""

    exit_layer: int | None = bounded(None, low=1)  # layers that draft, E
    num_draft_tokens: int | None = bounded(None, low=1)  # drafted per round, d
    # Share of greedy drafts of exits 1 to L that were right in training, at index E - 1.
    agreement_E: tuple[float, ...] | None = bounded(None, low=0, high=1)

    def to_json(self) -> dict[str, Any]:
        """The set fields by their names in generation_config.json."""
        early = {name: getattr(self, field) for field, name in _GENERATION.items()}
        return {name: value for name, value in early.items() if value is not None}


def read_generation_defaults(path: str | AnyPath) -> GenerationDefaults:
    """Reads generation_config.json, else config.json; empty for a GGUF file.

    Raises CheckpointError if a file is not JSON, or a value is out of range.
    """
    path, raw = split_step(path)[0], {}
    for file in (path / "config.json", path / "generation_config.json"):
        said = read_json(file, CheckpointError) if file.is_file() else {}
        raw |= {key: value for key, value in said.items() if value is not None}
    given = {field: raw.get(key) for field, key in _GENERATION.items()}
    if isinstance(shares := given["agreement_E"], list):
        given["agreement_E"] = tuple(shares)
    try:
        return GenerationDefaults(**given)
    except ConfigError as error:
        names = " and ".join(_GENERATION.values())
        raise CheckpointError(f"{path}: {names} of its configuration: {error}") from error


class HuggingFaceSource(TensorSource):
    """A directory with config.json and one or several safetensors files."""

    names = "huggingface"

    def __init__(self, path: AnyPath):
        self.path, file = path, path / "config.json"
        if not file.is_file():
            ggufs = sorted(found.name for found in path.glob("*.gguf"))
            fix = f"give {ggufs[0]} itself" if ggufs else "give the directory of a complete model"
            raise CheckpointError(f"{file}: does not exist: {fix}")
        try:
            raw, self.is_int8 = without_quantization(read_json(file, CheckpointError))
            self.config = llama_config(raw, str(file))
        except ConfigError as error:
            raise CheckpointError(f"{file}: {error}") from error
        self.tensors = {}
        for file in _files(path):
            self.tensors |= read_safetensors(file)
        self.shapes = {name: tuple(each.get_shape()) for name, (_, each) in self.tensors.items()}

    @property
    def agreement_E(self) -> tuple[float, ...] | None:
        """As in `GenerationDefaults`."""
        return read_generation_defaults(self.path).agreement_E

    def read(self, name: str) -> Any:
        """One tensor in its stored dtype; slicing it reads the file."""
        return typed_tensor(self, name)


def read_safetensors(file: AnyPath) -> dict[str, tuple[AnyPath, Any]]:
    """The file and the unread tensor, by name. Raises CheckpointError."""
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        fix = "damaged or cut off, download it again"
        raise CheckpointError(f"{file}: {one_line(error)}: {fix}") from error
    return {name: (file, opened.get_slice(name)) for name in [*opened.keys()]}


def typed_tensor(source: TensorSource, name: str) -> Any:
    """A tensor of a safetensors file. Raises CheckpointError unless it has a float dtype, or int8
    if the checkpoint has a scale for it."""
    _, tensor = source.tensors[name]
    is_int8 = source.is_int8 and f"{name}_scale" in source.tensors
    kinds, dtype = ("I8",) if is_int8 else _FLOATS, tensor.get_dtype()
    if dtype not in kinds:
        raise CheckpointError(
            f"{source.where(name)} has the dtype {dtype}, not {' or '.join(kinds)}: convert the "
            "checkpoint to bfloat16 first"
        )
    return tensor


def _files(directory: AnyPath) -> list[AnyPath]:
    """Files with the tensors: model.safetensors, or those that an index names."""
    single, index = directory / SINGLE, directory / _INDEX
    if single.exists():
        return [single]
    if not index.exists():
        fix = ": add the weights as safetensors"
        if pickles := sorted(file.name for file in directory.glob("*.bin")):
            fix = (
                f", only {pickles[0]}: pickles can run code and are never read: if you trust it, "
                'run python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{directory}').save_pretrained('NEW')\" and copy the tokenizer "
                "files to NEW"
            )
        raise CheckpointError(f"{directory}: holds neither {SINGLE} nor {_INDEX}{fix}")
    weight_map = read_json(index, CheckpointError).get("weight_map")
    files = [*weight_map.values()] if isinstance(weight_map, dict) else [weight_map]
    for file in files:
        if not isinstance(file, str) or file in ("", "..") or AnyPath(file).name != file:
            raise CheckpointError(
                f"{index}: weight_map names {file!r}, but must name files of the same directory"
            )
    return [directory / file for file in sorted({*files})]


def save(
    model: Llama,
    directory: str | AnyPath,
    *,
    generation: GenerationDefaults | None = None,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, bytes] = MappingProxyType({}),
    shard_bytes: int = 5_000_000_000,
    track: Track = iter,
) -> None:
    """Writes atomically a directory that transformers and `load` read.

    Args:
        model: stacked or not; written in the dtype of its parameters.
        directory: new or empty; it appears under its name once it is complete.
        generation: defaults for decoding, for generation_config.json.
        tokenizer: adds its files and the ids of its begin and end tokens.
        files: contents of further files by name, such as README.md.
        shard_bytes: maximum size of a file, unless a single tensor is larger.
        track: wraps the sequence of tensors, for a progress bar.

    Raises CheckpointError if the directory is not empty, the model has exit blocks, or the weights
    can't be written.
    """
    if len(model.exit_blocks):
        raise CheckpointError(
            f"{directory}: the format has no exit blocks: save without_exit_blocks(model), or use "
            "the run that trained them"
        )
    directory = as_path(directory).resolve()
    check_destination(directory)
    eos = list(tokenizer.eos_ids) if tokenizer else []
    # Null if unknown: transformers would use Llama-2's 1 and 2 for a missing key.
    ids = {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
        "pad_token_id": None,
    }
    said = {key: value for key, value in ids.items() if value is not None}
    said |= generation.to_json() if generation else {}
    config, quantised = model.config, {}
    if isinstance(model.head, Int8Rows):  # a head of its own, whether tied or not
        config = replace(config, tie_embeddings=False)
        quantised = {KEY: quantization_config([])}
    with writing(directory), whole_directory(directory, last="config.json") as partial:
        write_json(partial / "config.json", config_json(config, model.dtype) | ids | quantised)
        write_json(partial / "generation_config.json", said)
        if tokenizer is not None:
            tokenizer.save(partial)
        for name, content in files.items():
            write_whole(partial / name, content)
        try:
            _write_weights(unstacked(model), partial, shard_bytes, track)
        except SafetensorError as error:
            raise CheckpointError(
                f"{directory}: can't be written ({one_line(error)}): free space there, or choose "
                "another place, and start again"
            ) from error


def check_destination(directory: AnyPath) -> None:
    """Raises CheckpointError unless the directory is new or empty."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: is not an empty directory: choose a new one")


def _write_weights(model: Llama, directory: AnyPath, shard_bytes: int, track: Track) -> None:
    """Writes one file, or several and their index."""
    parameters = named_leaves(model)
    files: list[list[Part]] = [[]]
    filled = 0
    for path, parameter in parameters.items():
        for part in parts_of(path, "huggingface"):
            size = math.prod(part.stored_shape(parameter.shape)) * parameter.dtype.itemsize
            if filled and filled + size > shard_bytes:
                files.append([])
                filled = 0
            files[-1].append(part)
            filled += size
    tracked = iter(track([part for parts in files for part in parts]))
    weight_map: dict[str, str] = {}
    for number, parts in enumerate(files, 1):
        several = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file = SINGLE if len(files) == 1 else several
        some = islice(tracked, len(parts))
        tensors = {part.tensor: part.stored(parameters[part.path]) for part in some}
        save_file(tensors, directory / file, {"format": "pt"})
        # safetensors makes files that only their owner reads, whatever the umask.
        shutil.copymode(directory / "config.json", directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        total = sum(parameter.nbytes for parameter in parameters.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / _INDEX, index)
