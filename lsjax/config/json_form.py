"""Configurations as JSON: an object of each dataclass's fields, with the version of the form."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from lsjax.config.checked import Checked, ConfigError, check, field_types, members, shown

VERSION = 2
T = TypeVar("T", bound=Checked)


def versioned(config: Checked) -> dict[str, Any]:
    """The fields of a configuration as `json.dumps` takes them, and the version of this form."""
    return {"version": VERSION, **dataclasses.asdict(config)}


def without_version(raw: Any, where: str) -> dict[str, Any]:
    """The fields of what `versioned` made.

    Raises ConfigError for anything but an object of this version.
    """
    check(isinstance(raw, Mapping), f"{where}: holds {shown(raw)}, but must be a JSON object")
    fields = dict(raw)
    version = fields.pop("version", None)
    check(
        version == VERSION and type(version) is int,
        f"{where}: version is {shown(version)}, but this lsjax reads {VERSION}: use the lsjax that "
        "wrote it, or begin another run",
    )
    return fields


def from_json(kind: type[T], raw: Any, where: str = "") -> T:
    """The dataclass with these fields; those that are left out get their defaults.

    where: what is read, for messages.
    Raises ConfigError for unknown and missing keys, and for what the dataclass itself refuses.
    """
    try:
        check(isinstance(raw, Mapping), f"{shown(raw)} must be an object, as a {kind.__name__} is")
        return _decoded(kind, raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _decoded(kind: Any, raw: Any) -> Any:
    """Gives lists and objects the type of the field; the dataclass refuses what has another."""
    for one in members(kind):
        if dataclasses.is_dataclass(one) and isinstance(raw, Mapping):
            return _dataclass(one, raw)
        if get_origin(one) is tuple and isinstance(raw, list | tuple):
            return tuple(_decoded(get_args(one)[0], item) for item in raw)
        if one is float and type(raw) is int:
            return float(raw)
    return raw


def _dataclass(kind: type[Checked], raw: Mapping[str, Any]) -> Checked:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}"
            raise ConfigError(f"{kind.name_of(key)} is no key of {kind.__name__}: {fix}")
    for name, field in fields.items():
        check(
            name in raw or field.default is not dataclasses.MISSING,
            f"{kind.name_of(name)} is missing: {kind.__name__} needs it",
        )
    kinds = field_types(kind)
    return kind(**{name: _decoded(kinds[name], value) for name, value in raw.items()})


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
