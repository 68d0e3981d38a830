"""The checker: what each kind of field takes, and how a refusal reads."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import pytest

from lsjax.config import AnyPath, Checked, ConfigError, bounded


@dataclass(frozen=True, kw_only=True)
class Flags(Checked, prefix="--"):
    file: AnyPath | None = None
    kind: Literal["a", 1] = "a"
    num_samples: Annotated[int, "of something else"] = bounded(1, low=1, hint="1 is one answer")
    share: float = bounded(0.5, above=0, below=1)
    lengths: tuple[int, ...] = bounded((), low=1, high=9)
    inner: "Flags | None" = None


@dataclass(frozen=True, kw_only=True)
class More(Flags):
    last: bool = False
    weights: tuple[float, ...] = ()
    limit: float | None = None


GOOD = [
    dict(file=AnyPath("x")),
    dict(kind=1),
    dict(num_samples=10**400),
    dict(share=0.1),
    dict(lengths=(1, 9)),
    dict(inner=Flags()),
]


@pytest.mark.parametrize("changes", GOOD)
def test_what_fits(changes):
    assert replace(More(), **changes) == More(**changes)


def test_what_json_has_becomes_a_tuple_or_dataclass():
    assert More(lengths=[1, 9], inner=dict(share=0.1)) == More(
        lengths=(1, 9), inner=Flags(share=0.1)
    )


def test_whole_numbers_become_floats():
    more = More(share=0.5, weights=(1, 2.5), limit=3)
    assert (type(more.weights[0]), type(more.limit), type(more.num_samples)) == (float, float, int)
    assert more.weights == (1.0, 2.5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(file="x"), "--file 'x' must be a path or None"),
        (dict(kind=True), "--kind True must be one of a, 1"),
        (
            dict(num_samples=0),
            "--num-samples 0 must be a whole number of at least 1: 1 is one answer",
        ),
        (dict(num_samples=1.0), "--num-samples 1.0 must be a whole number of at least 1: 1 is one"),
        (dict(share=0), "--share 0 must be a finite number above 0 and below 1"),
        (dict(share=float("nan")), "--share nan must be a finite number above 0 and below 1"),
        (dict(lengths=[0]), "--lengths [0] must be a tuple, each item a whole number"),
        (dict(lengths=1), "--lengths 1 must be a tuple, each item a whole number"),
        (dict(lengths=(1, 10)), "each item a whole number from 1 to 9"),
        (dict(inner=3), "--inner 3 must be a Flags or None"),
        (dict(limit=10**400), "... must be a finite number or None"),
        (dict(last=1), "--last 1 must be True or False"),
        (dict(file="x" * 99), "--file '" + "x" * 56 + "... must be a path or None"),
    ],
)
def test_what_does_not(changes, message):
    with pytest.raises(ConfigError) as error:
        More(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
