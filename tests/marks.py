"""Marks of tests."""

import importlib.util

import pytest

from lsjax.aot.chips import COMPILERS


def long(*values):
    """Further values of a grid, which only `make test-all` tries; a tuple has one for each name."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for value in values
    ]


def with_extra(name: str) -> pytest.MarkDecorator:
    """Skips a test where the compiler of an extra is missing: tpu or cuda."""
    missing = not any(map(importlib.util.find_spec, COMPILERS[name][0]))
    return pytest.mark.skipif(missing, reason=f"needs the {name} extra")
