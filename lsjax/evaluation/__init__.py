"""Evaluation: scores of every exit, tasks, and comparisons of strategies."""

from importlib import import_module
from typing import Any

from lsjax.config import ConfigError


def installed(module: str, extra: str) -> Any:
    """Imports a module, or raises ConfigError with the extra that installs what is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'lsjax[{extra}]'") from None
