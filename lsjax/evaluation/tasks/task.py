"""What a task is: how a row becomes a prompt with its reference, and how a text is scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task.

    id: of the row, unique in its data. prompt: text, shots included. reference: what a text is
    compared with; empty where the row has none. group: the category that it is counted in beside
    the whole. seen: whether its prompt is also among given training rows. row: its fields, for
    scores that need more.
    """

    id: str
    prompt: str
    reference: str
    group: str = ""
    seen: bool = False
    row: Row = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    prompt_template, response_template: as in DataConfig; their fields are those of the rows.
    score: figures of a text, each from 0 to 1, the main one first; some examples may have none.
    score_by_running: the same, and runs the text as a program. max_new_tokens, num_shots, stop:
    unless asked otherwise. shot_response: changes the response of a shot. between_shots: what
    follows each shot. after_shots: what follows all of them. tfds: name of the TensorFlow data
    set, its split, and that of its shots. fields: changes a row before the templates see it;
    raises ConfigError that goes on from where the row stands. id: the field that is a row's id;
    where it stands, by default. group: the field that holds its category.
    """

    name: str
    prompt_template: str
    response_template: str
    score: Callable[[str, Example], dict[str, float]]
    max_new_tokens: int
    score_by_running: Callable[[str, Example], dict[str, float]] | None = None
    num_shots: int = 0
    shot_response: Callable[[str], str] = str
    between_shots: str = "\n"
    after_shots: str = ""
    stop: tuple[str, ...] = ()
    tfds: tuple[str, str, str] | None = None
    fields: Callable[[Row], Row] = dict
    id: str | None = None
    group: str | None = None
    needs_reference: bool = True
