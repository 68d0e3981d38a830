"""The flags of a dataclass, with their values, defaults and texts."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro

from lsjax.config import AnyPath
from lsjax.config.checked import UNIONS

VALUES = {int: "INT", float: "FLOAT", str: "TEXT", AnyPath: "PATH", bool: ""}


class Flag(NamedTuple):
    """A flag of the command line."""

    field: str  # optimizer.learning_rate
    names: tuple[str, ...]  # --optimizer.learning-rate, and others
    values: str  # what follows
    default: Any
    text: str
    negated: str = ""  # the flag that turns it off


def flags_of(kind: type, default: Any = None, prefix: str = "", path: str = "") -> Iterator[Flag]:
    """The flags of a dataclass and its parts. default: an instance with the default values.
    prefix, path: of the names of its flags and fields."""
    hints, texts = get_type_hints(kind, include_extras=True), field_texts(kind)
    for field in dataclasses.fields(kind):
        annotation, marks = hints[field.name], ()
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
        args = [mark for mark in marks if hasattr(mark, "aliases")]
        name = next((arg.name for arg in args if arg.name is not None), field.name)
        value = field.default if default is None else getattr(default, field.name)
        part = next((one for one in (annotation, *get_args(annotation)) if _is_part(one)), None)
        if part is not None:
            is_flat = name == "" or tyro.conf.OmitArgPrefixes in marks
            below = "" if is_flat else f"{prefix}{name}."
            own = value if dataclasses.is_dataclass(value) else None
            yield from flags_of(part, own, below, "" if is_flat else f"{path}{field.name}.")
        elif tyro.conf.Positional in marks:
            yield Flag(path + field.name, (args[0].metavar,), "", value, texts[field.name])
        else:
            names = [f"--{prefix}{name}".replace("_", "-")]
            names += [alias for arg in args for alias in arg.aliases or ()]
            text = texts.get(field.name, "")
            off = f"--{prefix}no-{name}".replace("_", "-") if annotation is bool else ""
            values = described_values(annotation)
            yield Flag(path + field.name, tuple(names), values, value, text, off)


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def described_values(kind: Any) -> str:
    """What follows a flag of this type: INT, {a,b}, TEXT ..."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        return "|".join(described_values(one) for one in arguments if one is not NoneType)
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin is tuple:
        return f"{described_values(arguments[0])} ..."
    return VALUES[kind]


@cache
def field_texts(kind: type) -> dict[str, str]:
    """The docstring below each field, from the source of the class and its bases, in one line."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found
