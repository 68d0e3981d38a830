"""Tensors in safetensors files: one file, or several with an index, read and written one by one.

A safetensors file is 8 bytes with the length of its header, the header (JSON: dtype, shape and
place of each tensor) and the numbers. What a file claims is checked here before anything is
allocated, and no more than one tensor is ever copied; the library's writer wants all of a file.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lsjax.checkpoints.parts import Part, model_parts
from lsjax.checkpoints.tensors import CheckpointError, Track, named_parameters, take
from lsjax.model.llama import Llama

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHERS |= {"F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
_ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in _FLOATS.items()} | _OTHERS


class Entry(NamedTuple):
    """Where a tensor lies, and as what."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file

    def read(self) -> np.ndarray:
        """The tensor in its stored dtype, mapped from the file."""
        if self.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.file}: dtype {self.dtype} of a weight is not one of {', '.join(_FLOATS)}: "
                "convert the checkpoint to bfloat16 first"
            )
        dtype = np.dtype(_FLOATS[self.dtype])
        return np.memmap(self.file, dtype, "r", offset=self.offset, shape=self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error}): download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds a {type(raw).__name__}, but must be a JSON object")
    return raw


def read_entries(directory: Path) -> dict[str, Entry]:
    """Where each tensor lies, from model.safetensors or from the files that an index names."""
    single, index = directory / _WEIGHTS, directory / _INDEX
    if single.exists():
        return _read_header(single)
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
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise CheckpointError(f"{index}: {file!r} is missing: download it again")
        for name, entry in _read_header(directory / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{directory / file}: holds tensor {name!r}, which {_INDEX} places in "
                    f"{weight_map.get(name)!r}: the files are not of one checkpoint"
                )
            entries[name] = entry
    for name in weight_map:
        if name not in entries:
            raise CheckpointError(
                f"{directory / weight_map[name]}: lacks tensor {name!r}, which {_INDEX} places "
                "there: the files are not of one checkpoint"
            )
    return entries


def _read_header(file: Path) -> dict[str, Entry]:
    """Checks and reads what a safetensors file says about its tensors."""

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise CheckpointError(f"{file}: {problem}: damaged or cut short, download it again")

    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        room = min(size - 8, _MAX_HEADER_BYTES)
        check(2 <= length <= room, f"a header of {length} bytes does not fit in {max(room, 0)}")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    check(isinstance(header, dict), f"the header starts with {text[:8]!r}, but must be JSON")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, said in header.items():
        match said:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
                numbers = (*shape, begin, end)
            case _:
                dtype, numbers = None, ()  # fails the next check
        good = 2 <= len(numbers) <= 10 and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        check(good, f"tensor {name!r} has no proper dtype, shape and data_offsets")
        check(dtype in _ITEM_BYTES, f"tensor {name!r} has an unknown dtype {dtype!r}")
        wanted = math.prod(shape) * _ITEM_BYTES[dtype]
        check(
            end - begin == wanted,
            f"tensor {name!r} takes {wanted} bytes, but its data_offsets {begin}, {end} "
            f"leave {end - begin}",
        )
        available = size - 8 - length
        check(end <= available, f"tensor {name!r} ends at byte {end} of {available}")
        entries[name] = Entry(file, dtype, tuple(shape), 8 + length + begin)
        spans.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(spans):
        check(begin == reached, f"tensor {name!r} starts at byte {begin}, not at {reached}")
        reached = end
    check(reached == size - 8 - length, f"{size - 8 - length} bytes of data, not {reached}")
    return entries


def write_weights(model: Llama, directory: Path, shard_bytes: int, track: Track) -> None:
    """One file, or several and an index of them."""
    parameters, _ = named_parameters(model)
    parts = [part for part in model_parts(model.config) if part.parameter in parameters]
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for part in parts:
        parameter = parameters[part.parameter][...]
        shape = part.stored_shape(parameter.shape)
        size = math.prod(shape) * parameter.dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        dtype = next(name for name, kind in _FLOATS.items() if parameter.dtype == kind)
        place = [filled, filled + size]
        shards[-1][part.tensor] = {"dtype": dtype, "shape": shape, "data_offsets": place}
        filled, total = filled + size, total + size
    tensors = (_stored(part, parameters[part.parameter][...]) for part in track(parts))
    weight_map: dict[str, str] = {}
    for number, header in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = _WEIGHTS if len(shards) == 1 else several
        _write_shard(directory / file, header, itertools.islice(tensors, len(header)))
        weight_map |= dict.fromkeys(header, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / _INDEX, index)


def _write_shard(file: Path, header: Mapping[str, Any], tensors: Iterable[np.ndarray]) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stream.write(np.ascontiguousarray(tensor).view(np.uint8).data)


def _stored(part: Part, parameter: Any) -> np.ndarray:
    """A tensor as the file has it: the inverse of `parameter_reader`."""
    view = part.view(np.asarray(parameter))
    if part.is_kernel:
        view = np.moveaxis(view, 0, -1)
    return view.reshape(part.stored_shape(parameter.shape))


def write_json(file: Path, content: Any) -> None:
    """Indented, with a newline at the end."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
