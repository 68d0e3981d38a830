"""Configurations as JSON, checked key by key when they are read again.

A dataclass is an object of its fields, a tuple is a list, a path is a string. Where a field may
hold one of several dataclasses, the object says which in "type". A file has a "version" beside the
fields; it counts up when the fields of before are no longer those of now, and `CHANGES` makes the
new ones of them.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from lsjax.config.errors import ConfigError, check

VERSION = 2
T = TypeVar("T")


def to_json(config: Any) -> Any:
    """The dataclass, or a value of one of its fields, as what `json.dumps` takes.

    Raises ConfigError for a number that JSON does not have (NaN, infinity).
    """
    return _encode(config, type(config), type(config).__name__)


def from_json(kind: type[T], raw: Any, where: str = "") -> T:
    """The dataclass that `to_json` made this of; fields that it does not have get their defaults.

    where: what is read, for messages.
    Raises ConfigError with the key, the value and what is expected: for a key that there is not,
    for one that is missing, for a value of another type, and for what the dataclass itself refuses.
    """
    return _decode(kind, raw, _Place(where, ""))


def versioned(config: Any) -> dict[str, Any]:
    """`to_json` of a dataclass, with the version of this form."""
    return {"version": VERSION, **to_json(config)}


def without_version(raw: Any, where: str) -> dict[str, Any]:
    """The fields of what `versioned` made, now or when they were others.

    Raises ConfigError for what is no such object, or of a version that is not known here.
    """
    check(isinstance(raw, Mapping), f"{where}: holds {_shown(raw)}, but must be a JSON object")
    fields = dict(raw)
    version = fields.pop("version", None)
    good = isinstance(version, int) and not isinstance(version, bool) and version >= 1
    check(good, f"{where}: version is {_shown(version)}, but must be a whole number of at least 1")
    check(
        version <= VERSION,
        f"{where}: version {version} was written by a newer lsjax; this one reads up to version "
        f"{VERSION}: update lsjax",
    )
    for change in CHANGES[version - 1 :]:
        fields = change(fields)
    return fields


def _per_batch_to_skip(fields: dict[str, Any]) -> dict[str, Any]:
    """layer_dropout.per_batch, of the first runs of version 1, became one of three ways."""
    dropout = fields.get("layer_dropout")
    if not isinstance(dropout, Mapping) or "per_batch" not in dropout:
        return fields
    rest = {key: value for key, value in dropout.items() if key != "per_batch"}
    skip = "batch" if dropout["per_batch"] else "mask"
    return {**fields, "layer_dropout": {**rest, "skip": skip}}


# From version 1 to 2, and so on.
CHANGES = (_per_batch_to_skip,)


def differences(one: Any, other: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """What two JSON values differ in: (dotted path, the one value, the other)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            found
            for key in keys
            for found in differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if one == other else [(path, one, other)]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in what is read a value stands."""

    source: str
    path: str

    def __truediv__(self, key: str) -> "_Place":
        dot = "." if self.path and not key.startswith("[") else ""
        return _Place(self.source, f"{self.path}{dot}{key}")

    def error(self, problem: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self.source, problem) if part))

    def mismatch(self, raw: Any, kind: Any) -> ConfigError:
        subject = f"{self.path} is" if self.path else "it is"
        return self.error(f"{subject} {_shown(raw)}, but must be {_described(kind)}")


def _encode(value: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        hints, names = _fields(type(value))
        fields = {
            name: _encode(getattr(value, name), hints[name], f"{path}.{name}") for name in names
        }
        several = len([one for one in _members(kind) if dataclasses.is_dataclass(one)]) > 1
        return ({"type": type(value).__name__} if several else {}) | fields
    if isinstance(value, tuple):
        kinds = next((one for one in _members(kind) if _is_tuple(one)), tuple[Any, ...])
        return [
            _encode(item, _item_kind(kinds, index), f"{path}[{index}]")
            for index, item in enumerate(value)
        ]
    if isinstance(value, Path):
        return str(value)
    check(
        value is None or isinstance(value, bool | int | float | str),
        f"{path} is a {type(value).__name__}, which has no JSON form",
    )
    check(
        not isinstance(value, float) or math.isfinite(value),
        f"{path} is {value}, which JSON does not have",
    )
    return value


def _decode(kind: Any, raw: Any, place: _Place) -> Any:
    if len(_members(kind)) > 1:
        return _decode_union(kind, raw, place)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, raw, place)
    if _is_tuple(kind):
        return _decode_tuple(kind, raw, place)
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if raw == choice and type(raw) is type(choice):
                return choice
        raise place.mismatch(raw, kind)
    if not _fits(kind, raw):
        raise place.mismatch(raw, kind)
    return raw if kind in (Any, None, type(None)) else kind(raw)


def _decode_union(kind: Any, raw: Any, place: _Place) -> Any:
    members = _members(kind)
    fitting = [member for member in members if _fits(member, raw)]
    tagged = {one.__name__: one for one in members if dataclasses.is_dataclass(one)}
    if isinstance(raw, Mapping) and len(tagged) > 1:
        name = raw.get("type")
        if name not in tagged:
            raise (place / "type").error(
                f"{(place / 'type').path} is {_shown(name)}, but must be one of {', '.join(tagged)}"
            )
        rest = {key: value for key, value in raw.items() if key != "type"}
        return _decode_dataclass(tagged[name], rest, place)
    for member in fitting[:-1]:
        try:
            return _decode(member, raw, place)
        except ConfigError:
            continue
    if not fitting:
        raise place.mismatch(raw, kind)
    return _decode(fitting[-1], raw, place)


def _decode_dataclass(kind: Any, raw: Any, place: _Place) -> Any:
    if not isinstance(raw, Mapping):
        raise place.mismatch(raw, kind)
    hints, names = _fields(kind)
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}"
            raise place.error(f"{(place / str(key)).path} is no key of {kind.__name__}: {fix}")
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    for name in needed:
        if name not in raw:
            raise place.error(f"{(place / name).path} is missing: {kind.__name__} needs it")
    values = {name: _decode(hints[name], raw[name], place / name) for name in names if name in raw}
    try:
        return kind(**values)
    except ConfigError as error:
        inside = f"{place.path}: " if place.path else ""
        raise place.error(f"{inside}{error}") from error


def _decode_tuple(kind: Any, raw: Any, place: _Place) -> tuple:
    if not isinstance(raw, list | tuple):
        raise place.mismatch(raw, kind)
    kinds = typing.get_args(kind)
    if kinds and kinds[-1] is not ... and len(raw) != len(kinds):
        raise place.mismatch(raw, kind)
    return tuple(
        _decode(_item_kind(kind, index), item, place / f"[{index}]")
        for index, item in enumerate(raw)
    )


def _fits(kind: Any, raw: Any) -> bool:
    """Whether a value of this kind may be written so, seen from outside."""
    if kind is Any:
        return True
    if kind in (None, type(None)):
        return raw is None
    if dataclasses.is_dataclass(kind):
        return isinstance(raw, Mapping)
    if _is_tuple(kind):
        return isinstance(raw, list | tuple)
    if typing.get_origin(kind) is Literal:
        return any(raw == one and type(raw) is type(one) for one in typing.get_args(kind))
    if kind is bool or isinstance(raw, bool):
        return kind is bool and isinstance(raw, bool)
    if kind is float:
        return isinstance(raw, int | float) and math.isfinite(raw)
    if kind in (str, Path):
        return isinstance(raw, str)
    check(kind is int, f"{kind} has no JSON form")
    return isinstance(raw, int)


@lru_cache
def _fields(kind: type) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Types and names of the fields that a dataclass is made of."""
    return typing.get_type_hints(kind), tuple(
        field.name for field in dataclasses.fields(kind) if field.init
    )


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def _is_tuple(kind: Any) -> bool:
    return kind is tuple or typing.get_origin(kind) is tuple


def _item_kind(kind: Any, index: int) -> Any:
    kinds = typing.get_args(kind) or (Any, ...)
    return kinds[0] if kinds[-1] is ... else kinds[index]


def _shown(raw: Any) -> str:
    text = json.dumps(raw, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


_DESCRIBED = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    Path: "a path",
    type(None): "null",
    tuple: "a list",
    Any: "anything",
}


def _described(kind: Any) -> str:
    if len(members := _members(kind)) > 1:
        return " or ".join(_described(member) for member in members)
    if dataclasses.is_dataclass(kind):
        return f"an object with the keys of {kind.__name__}"
    if typing.get_origin(kind) is Literal:
        choices = [json.dumps(choice) for choice in typing.get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is ...:
            return f"a list, each of it {_described(kinds[0])}"
        return f"a list of {len(kinds)}: {', '.join(_described(one) for one in kinds)}"
    return _DESCRIBED.get(kind, str(kind))
