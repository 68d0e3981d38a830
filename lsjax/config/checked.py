"""The one checker: a dataclass's annotations and bounds say what its fields may be."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal


class ConfigError(ValueError):
    """A value that cannot work; the message names the value, the limit and the fix."""


def check(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of the numbers in a field, and a hint for who breaks them."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str = ""

    def hold(self, number: float) -> bool:
        """Whether the number is finite and within all limits."""
        return (
            -math.inf < number < math.inf
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self):
        if self.low is not None and self.high is not None:
            return f"from {self.low} to {self.high}"
        words = ("of at least", self.low), ("above", self.above)
        words += ("at most", self.high), ("below", self.below)
        return " and ".join(f"{word} {limit}" for word, limit in words if limit is not None)


def bounded(default: Any = dataclasses.MISSING, **bounds: Any) -> Any:
    """A field of a Checked dataclass whose numbers keep the bounds, those in a tuple too.

    bounds: `low` and `high` may be reached, `above` and `below` not; `hint` ends the message.
    """
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds)})


class Checked:
    """Base of dataclasses that check their fields when they are made.

    A field has a type that `described` knows, and bounds if it is made by `bounded`. A subclass
    that relates two fields does so in `__post_init__`, after that of this class.
    """

    _prefix = ""

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        """prefix: what messages put before a field's name, such as "early_exit."; names after
        "--" are written as flags."""
        super().__init_subclass__()
        if prefix is not None:
            cls._prefix = prefix

    def __post_init__(self):
        kinds = field_types(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            bounds = field.metadata.get("bounds", Bounds())
            if not _fits(value, kind, bounds):
                hint = f": {bounds.hint}" if bounds.hint else ""
                raise ConfigError(
                    f"{self.name_of(field.name)} {shown(value)} must be "
                    f"{described(kind, bounds)}{hint}"
                )

    @classmethod
    def name_of(cls, field: str) -> str:
        """What messages call a field."""
        return cls._prefix + (field.replace("_", "-") if cls._prefix.startswith("--") else field)


@lru_cache
def field_types(kind: type) -> dict[str, Any]:
    """Type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def members(kind: Any) -> tuple[Any, ...]:
    """The types that a union joins; any other type alone."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def shown(value: Any) -> str:
    """A value as messages write it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def described(kind: Any, bounds: Bounds | None = None) -> str:
    """What a field of this type may be, in words."""
    limits = f" {bounds}" if bounds and str(bounds) else ""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if len(members(kind)) > 1:
        return " or ".join(described(one, bounds) for one in members(kind))
    if origin is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin is tuple and arguments[-1] is ...:
        return f"a tuple, each item {described(arguments[0], bounds)}"
    if origin is tuple:
        return f"a tuple of {', '.join(described(one, bounds) for one in arguments)}"
    if kind is int:
        return f"a whole number{limits}"
    if kind is float:
        return f"a finite number{limits}"
    words = {str: "text", bool: "True or False", Path: "a path", type(None): "None"}
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"


def _fits(value: Any, kind: Any, bounds: Bounds) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if len(members(kind)) > 1:
        return any(_fits(value, one, bounds) for one in members(kind))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(kinds) == len(value) and all(
            _fits(item, one, bounds) for item, one in zip(value, kinds, strict=True)
        )
    if kind in (int, float):
        number = int if kind is int else int | float
        return isinstance(value, number) and not isinstance(value, bool) and bounds.hold(value)
    return kind is Any or isinstance(value, origin or kind)
