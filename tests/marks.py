"""Marks of tests."""

import pytest


def long(*values):
    """Further values of a grid, which only `make test-all` tries; a tuple has one for each name."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for value in values
    ]
