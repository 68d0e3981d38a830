"""What a run is given beside its configuration: its optimizer, and functions in place of the
paper's."""

import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import jax
import numpy as np
import optax

from lsjax.config import StepConfig, check
from lsjax.training.early_exit import (
    EXIT_LOSSES,
    ExitLoss,
    ExitWeights,
    exit_counts,
    exit_weights,
)
from lsjax.training.layer_dropout import DropRates, drop_rates


@dataclass(frozen=True)
class Recipe:
    """Keywords of `make_train_step` (lsjax/training/step.py); the defaults are the paper's."""

    optimizer: optax.GradientTransformation | None = None  # by default that of the configuration
    drop_rates: DropRates = drop_rates
    exit_weights: ExitWeights = exit_weights
    exit_loss: ExitLoss | None = None  # by default that of the target in the configuration

    def loss_of_exits(self, config: StepConfig) -> ExitLoss:
        """The loss of each exit but the last."""
        return self.exit_loss or EXIT_LOSSES[config.early_exit.target]

    def check(self, config: StepConfig, num_layers: int) -> None:
        """Raises ConfigError for an optimizer of another type, for a function without effect, and
        for bad weights of exits."""
        check(
            self.optimizer is None or isinstance(self.optimizer, optax.GradientTransformation),
            f"optimizer {self.optimizer!r} is not an optax.GradientTransformation: call the "
            "function that makes one, such as optax.lion(1e-4)",
        )
        check(
            self.drop_rates is drop_rates or config.layer_dropout.p_max > 0,
            "drop_rates has no effect while layer_dropout.p_max is 0: set p_max, or leave "
            "drop_rates out",
        )
        if config.exit_blocks.exits:
            check(
                self.exit_weights is exit_weights,
                "exit_weights has no effect on exit blocks, which weigh the same: leave it out",
            )
            return
        counts = exit_counts(config.early_exit, num_layers, config.num_steps, self.exit_weights)
        check(
            self.exit_loss is None or counts.max() > 0,
            "exit_loss has no effect, as only the last exit is in the loss: set "
            "early_exit.curriculum, or pass exit_weights",
        )

    def given(self) -> dict[str, dict[str, str]]:
        """Name and hash of the source of each function that differs from the default."""
        default = vars(PAPER)
        found = {key: value for key, value in vars(self).items() if value is not default[key]}
        return {key: {"name": _name(value), "sha256": _hash(value)} for key, value in found.items()}


PAPER = Recipe()


def _name(given: Any) -> str:
    """The function's name. An optimizer has that of the function that made it, and a chain those of
    its parts."""
    function = inspect.unwrap(getattr(given, "update", given))
    name = getattr(function, "__qualname__", type(function).__qualname__).partition(".<locals>")[0]
    enclosed = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    if name == "with_extra_args_support":  # optax's wrapper of a part of a chain
        return _name(enclosed["tx"])
    parts = enclosed.get("update_fns", ())  # of optax.chain
    return f"{name}({', '.join(map(_name, parts))})" if parts else name


def _hash(given: Any) -> str:
    """SHA-256 of the sources of a function and of the values that it encloses."""
    return hashlib.sha256("\n".join(_sources(given, {})).encode()).hexdigest()


def _sources(value: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Texts that change if the source of a function does, or a value that it uses. seen: functions
    and objects by id, which are kept, so that no other one gets the id."""
    match value:
        case bool() | int() | float() | complex() | str() | bytes() | None | np.generic():
            yield repr(value)
        case type() | ModuleType():
            yield value.__name__
        case tuple() | list():
            for part in value:
                yield from _sources(part, seen)
        case dict():
            yield from _sources(list(value.items()), seen)
        case np.ndarray() | jax.Array():
            yield f"{value.dtype}{value.shape}{np.asarray(value).tobytes().hex()}"
        case partial():
            yield from _sources((value.func, value.args, value.keywords), seen)
        case MethodType():
            yield from _sources((value.__func__, value.__self__), seen)
        case _ if id(value) in seen:
            yield f"number {[*seen].index(id(value))}"
        case _:
            seen[id(value)] = value
            if inspect.isfunction(inspect.unwrap(value)):
                yield from _sources_of_function(inspect.unwrap(value), seen)
            else:
                yield type(value).__qualname__
                yield from _sources(getattr(value, "__dict__", {}), seen)


def _sources_of_function(function: Any, seen: dict[int, Any]) -> Iterator[str]:
    try:
        yield inspect.getsource(function)
    except OSError:  # typed at a prompt
        yield function.__qualname__
    yield from _sources((function.__defaults__, function.__kwdefaults__), seen)
    used = inspect.getclosurevars(function)
    yield from _sources(dict(used.nonlocals), seen)
    for name, value in used.globals.items():
        if getattr(value, "__module__", function.__module__) == function.__module__:
            yield from _sources((name, value), seen)
