"""TOPv2's trees, and what counts as the same."""

import pytest

from lsjax.decoding.request import Request
from lsjax.evaluation.answers import Question
from lsjax.evaluation.scores import DEEPEST, decoupled, parse_tree, tree_match
from lsjax.evaluation.tasks import TASKS

ALARM = "[IN:CREATE_ALARM set alarm [SL:DATE_TIME for 2 hours ] ]"
NESTED = (
    "[IN:GET_EVENT what [SL:CATEGORY_EVENT plays ] are near "
    "[SL:LOCATION the [IN:GET_LOCATION [SL:POINT_ON_MAP Met ] museum ] ] ]"
)


def test_a_tree_is_read_whatever_the_white_space():
    tree = ("IN:CREATE_ALARM", "set", "alarm", ("SL:DATE_TIME", "for", "2", "hours"))
    assert parse_tree(ALARM) == tree
    assert parse_tree("\n[IN:CREATE_ALARM  set alarm[SL:DATE_TIME for 2 hours]]  ") == tree


@pytest.mark.parametrize(
    "text",
    ["", "set alarm", ALARM[:-1], f"{ALARM} ]", f"{ALARM} {ALARM}", f"{ALARM} now", f"x {ALARM}"],
)
def test_what_is_no_tree(text):
    assert parse_tree(text) is None
    assert tree_match(text, "set alarm") == {"tree_match": 0}


def test_words_that_are_no_value_are_left_out():
    where = ("IN:GET_LOCATION", ("SL:POINT_ON_MAP", "Met"))
    assert decoupled(parse_tree(NESTED)) == (
        *("IN:GET_EVENT", ("SL:CATEGORY_EVENT", "plays"), ("SL:LOCATION", where)),
    )


@pytest.mark.parametrize(
    ("text", "exact", "tree"),
    [
        (ALARM, 1, 1),
        (f"\n{ALARM} ", 1, 1),
        ("[IN:CREATE_ALARM set an alarm [SL:DATE_TIME for 2 hours ] ]", 0, 1),
        (ALARM.replace(" ]", "]"), 0, 1),
        (ALARM.replace("2", "3"), 0, 0),
        (ALARM.replace("CREATE", "DELETE"), 0, 0),
        ("[IN:CREATE_ALARM set alarm [SL:DATE_TIME for ] [SL:DATE_TIME 2 hours ] ]", 0, 0),
    ],
)  # fmt: skip
def test_scores(text, exact, tree):
    question = Question(id="1", request=Request(prompt="p"), reference=ALARM)
    found = TASKS["topv2"].score(text, question)
    assert found == {"exact_match": exact, "tree_match": tree}


@pytest.mark.parametrize("levels", [600, 100_000])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_is_no_tree(levels, closed):
    text = "[IN:A " * levels + "] " * (levels if closed else 0)
    assert tree_match(text, ALARM) == {"tree_match": 0}
    assert tree_match(text, text) == {"tree_match": 0}


def test_nesting_of_the_limit_is_a_tree():
    text = "[IN:A " * DEEPEST + "] " * DEEPEST
    assert tree_match(text, f" {text}") == {"tree_match": 1}
    assert parse_tree(f"[IN:B {text} ]") is None
