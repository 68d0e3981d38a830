"""Checks of dataclass fields by annotation and bounds, and conversion from and to JSON."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

VERSION = 3  # format of configurations and of saved steps
UNIONS = (Union, types.UnionType)
T = TypeVar("T", bound="Checked")


class ConfigError(ValueError):
    """An invalid value; the message names the value, the limit and the fix."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a field's numbers: `low` and `high` are included, `above` and `below` are not."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    hint: str = ""  # ends the message

    def hold(self, number: float) -> bool:
        """Whether the number is finite and within all limits."""
        return self.low <= number <= self.high and self.above < number < self.below

    def __str__(self):
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"from {self.low} to {self.high}"
        words = ("of at least", self.low), ("above", self.above)
        words += ("at most", self.high), ("below", self.below)
        return " and ".join(f"{word} {limit}" for word, limit in words if math.isfinite(limit))


def bounded(default: Any = dataclasses.MISSING, **bounds: Any) -> Any:
    """A field of a Checked dataclass whose numbers, including tuple items, are within `Bounds`."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


class Checked:
    """Base of dataclasses that check and convert their fields on creation (see `_fitted`). Checks
    that relate fields belong in the subclass's `__post_init__`, after this one."""

    _prefix = ""

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        """prefix: of names in messages, "early_exit."; with "--", names are written as flags."""
        super().__init_subclass__()
        cls._prefix = cls._prefix if prefix is None else prefix

    def __post_init__(self):
        kinds = _field_types(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            bounds = field.metadata.get("bounds", Bounds())
            try:
                object.__setattr__(self, field.name, _fitted(value, kind, bounds))
            except _Unfit:
                hint = f": {bounds.hint}" if bounds.hint else ""
                raise ConfigError(
                    f"{self.name_of(field.name)} {shown(value)} must be "
                    f"{described(kind, bounds)}{hint}"
                ) from None

    @classmethod
    def name_of(cls, field: str) -> str:
        """Name of a field in messages."""
        return cls._prefix + (field.replace("_", "-") if cls._prefix.startswith("--") else field)


_field_types = lru_cache(get_type_hints)


def shown(value: Any) -> str:
    """Text of a value in messages, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def described(kind: Any, bounds: Bounds | None = None) -> str:
    """Description of the values of a field of this type."""
    limits = f" {bounds}" if bounds and str(bounds) else ""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        return " or ".join(described(one, bounds) for one in arguments)
    if origin is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin is tuple:
        return f"a tuple, each item {described(arguments[0], bounds)}"
    words = {int: f"a whole number{limits}", float: f"a finite number{limits}", str: "text"}
    words |= {bool: "True or False", PurePath: "a path", type(None): "None"}
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"


class _Unfit(Exception):
    """A value that its field does not accept."""


def _fitted(value: Any, kind: Any, bounds: Bounds) -> Any:
    """The value in the type of its field. Integers become floats, and what JSON has instead of
    tuples and dataclasses becomes these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        for one in arguments:
            with suppress(_Unfit):
                return _fitted(value, one, bounds)
    elif origin is Literal:
        if any(type(value) is type(one) and value == one for one in arguments):
            return value
    elif origin is tuple:
        if isinstance(value, tuple | list):
            return tuple(_fitted(item, arguments[0], bounds) for item in value)
    elif kind in (int, float):
        right = isinstance(value, int if kind is int else int | float)
        if right and not isinstance(value, bool) and bounds.hold(value):
            with suppress(OverflowError):  # an integer may be too large for a float
                return kind(value)
    elif isinstance(value, origin or kind):
        return value
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _made(kind, value)
    raise _Unfit


def versioned(config: Checked) -> dict[str, Any]:
    """The fields of a configuration for `json.dumps`, with the format version."""
    return {"version": VERSION, **dataclasses.asdict(config)}


def without_version(raw: Any, where: str) -> dict[str, Any]:
    """The fields of an output of `versioned`. Raises ConfigError for anything else."""
    check(isinstance(raw, Mapping), f"{where}: holds {shown(raw)}, but must be a JSON object")
    fields = dict(raw)
    version = fields.pop("version", None)
    check(
        version == VERSION,
        f"{where}: version is {shown(version)}, but this lsjax reads {VERSION}: convert the "
        "run with the lsjax that wrote it (`lsjax convert`), or start a new one",
    )
    return fields


def from_json(kind: type[T], raw: Any, where: str) -> T:
    """The dataclass with these fields; missing ones get their defaults. Raises ConfigError for
    unknown and missing keys and for rejected values. where: source of the fields, for messages."""
    try:
        check(isinstance(raw, Mapping), f"{shown(raw)} must be an object, as a {kind.__name__} is")
        return _made(kind, raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _made(kind: type[T], raw: Mapping[str, Any]) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in raw:
        near = difflib.get_close_matches(str(key), fields, n=1)
        fix = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(fields)}"
        check(key in fields, f"{kind.name_of(key)} is not a key of {kind.__name__}: {fix}")
    for name, field in fields.items():
        check(
            name in raw or field.default is not dataclasses.MISSING,
            f"{kind.name_of(name)} is missing: {kind.__name__} needs it",
        )
    return kind(**raw)


def differences(one: Any, other: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Differences of two JSON values: (dotted path, first value, second value)."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [
            found
            for key in {**one, **other}
            for found in differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if one == other else [(path, one, other)]
