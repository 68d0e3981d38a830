"""Hugging Face directories: safetensors and generation_config.json, in and out.

The safetensors package reads and writes the files. Its writer takes all tensors of a file at once,
so an export holds one file beside the model.
"""

import math
import secrets
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lsjax.checkpoints.huggingface_config import read_config_json, to_config_json
from lsjax.checkpoints.tensors import (
    CheckpointError,
    Part,
    TensorSource,
    Track,
    parts_of,
    read_json,
    take,
    write_json,
)
from lsjax.config import split_step
from lsjax.model.llama import Llama, unstacked
from lsjax.model.parameters import named_leaves

if TYPE_CHECKING:
    from lsjax.data.tokenizer import Tokenizer

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GENERATION = {"exit_layer": "assistant_early_exit", "num_draft_tokens": "num_assistant_tokens"}
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint says about how to decode it; None where it says nothing."""

    exit_layer: int | None = None  # layers that draft, E
    num_draft_tokens: int | None = None  # drafted per round, d


def read_generation_defaults(path: str | Path) -> GenerationDefaults:
    """From generation_config.json, else config.json; nothing for a GGUF file.

    Raises:
        CheckpointError: a file that is not JSON, or a value that is not a number of at least 1.
    """
    path, found = split_step(path)[0], {}
    for file in (path / "generation_config.json", path / "config.json"):
        raw = read_json(file) if file.is_file() else {}
        for field, name in _GENERATION.items():
            value = take(raw, name, int, None, file)
            if value is not None and value < 1:
                raise CheckpointError(f"{file}: {name} is {value}, but must be at least 1")
            if found.get(field) is None:
                found[field] = value
    return GenerationDefaults(**found)


class HuggingFaceSource(TensorSource):
    """A directory with config.json and safetensors in one file or several."""

    names = "huggingface"

    def __init__(self, path: Path):
        self.path = path
        self.config = read_config_json(path)
        self._tensors = _open_tensors(path)
        self.shapes = {
            name: tuple(tensor.get_shape()) for name, (_, tensor) in self._tensors.items()
        }

    def where(self, name: str) -> str:
        """File and name."""
        file = self._tensors[name][0] if name in self._tensors else self.path
        return f"{file}: tensor {name!r}"

    def read(self, name: str) -> Any:
        """One tensor in its stored dtype; what is sliced out of it is read."""
        file, tensor = self._tensors[name]
        dtype = tensor.get_dtype()
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{file}: dtype {dtype} of a weight is not one of {', '.join(_FLOATS)}: "
                "convert the checkpoint to bfloat16 first"
            )
        return tensor


def _open_tensors(directory: Path) -> dict[str, tuple[Path, Any]]:
    """File and unread content of each tensor: of model.safetensors, or as an index says."""
    single, index = directory / _WEIGHTS, directory / _INDEX
    if single.exists():
        return _open_file(single)
    if not index.exists():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        instead = f", only {pickles[0]}" if pickles else ""
        raise CheckpointError(
            f"{directory}: holds neither {_WEIGHTS} nor {_INDEX}{instead}: only safetensors are "
            "read, never pickles, which can run code"
        )
    weight_map = take(read_json(index), "weight_map", dict, {}, index)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise CheckpointError(
                f"{index}: tensor {name!r} is said to be in {file!r}, "
                "but must be in a file of the same directory"
            )
    tensors: dict[str, tuple[Path, Any]] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise CheckpointError(f"{index}: {file!r} is missing: download it again")
        found = _open_file(directory / file)
        placed = {name for name, place in weight_map.items() if place == file}
        for name in sorted(found.keys() ^ placed):
            raise CheckpointError(
                f"{directory / file}: {'holds' if name in found else 'lacks'} tensor {name!r}, "
                f"which {_INDEX} places in {weight_map.get(name)!r}: the files are not of one "
                "checkpoint"
            )
        tensors |= found
    return tensors


def _open_file(file: Path) -> dict[str, tuple[Path, Any]]:
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {' '.join(str(error).split())}: damaged or cut short, download it again"
        ) from error
    names = opened.keys()
    return {name: (file, opened.get_slice(name)) for name in names}


def save(
    model: Llama,
    directory: str | Path,
    *,
    generation: GenerationDefaults | None = None,
    tokenizer: "Tokenizer | None" = None,
    shard_bytes: int = 5_000_000_000,
    track: Track = iter,
) -> None:
    """Writes a directory that transformers and `load` read: all of it, or nothing.

    Args:
        model: stacked or not; written in the dtype of its parameters.
        directory: new or empty; it appears under its name when everything is in it.
        generation: how to decode it, for generation_config.json.
        tokenizer: gives its files and the ids of the begin and end tokens.
        shard_bytes: a file is not made longer than this, unless by a single tensor.
        track: wraps the sequence of tensors that is written, for a progress bar.
    Raises:
        CheckpointError: the directory holds something.
    """
    directory = Path(directory).resolve()
    check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        ids = _special_ids(tokenizer)
        write_json(partial / "config.json", to_config_json(model.config, model.dtype) | ids)
        defaults = generation or GenerationDefaults()
        early = {name: getattr(defaults, field) for field, name in _GENERATION.items()}
        said = {key: value for key, value in (ids | early).items() if value is not None}
        write_json(partial / "generation_config.json", said)
        if tokenizer is not None:
            tokenizer.save(partial)
        _write_weights(unstacked(model), partial, shard_bytes, track)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_destination(directory: Path) -> None:
    """Raises CheckpointError unless the directory is new or empty."""
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory}: is not an empty directory: choose a new one")


def _special_ids(tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """Null where unknown: transformers would put in Llama-2's 1 and 2."""
    eos = list(tokenizer.eos_ids) if tokenizer else []
    return {
        "bos_token_id": tokenizer.bos_id if tokenizer else None,
        "eos_token_id": eos if len(eos) > 1 else next(iter(eos), None),
    }


def _write_weights(model: Llama, directory: Path, shard_bytes: int, track: Track) -> None:
    """One file, or several and an index of them."""
    parameters = named_leaves(model)
    files: list[list[Part]] = [[]]
    filled = total = 0
    for path, parameter in parameters.items():
        for part in parts_of(path, "huggingface"):
            size = math.prod(part.stored_shape(parameter.shape)) * parameter.dtype.itemsize
            if filled and filled + size > shard_bytes:
                files.append([])
                filled = 0
            files[-1].append(part)
            filled, total = filled + size, total + size
    tracked = iter(track([part for parts in files for part in parts]))
    weight_map: dict[str, str] = {}
    for number, parts in enumerate(files, 1):
        several = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file = _WEIGHTS if len(files) == 1 else several
        tensors = {
            part.tensor: part.stored(parameters[part.path]) for part in islice(tracked, len(parts))
        }
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / _INDEX, index)
