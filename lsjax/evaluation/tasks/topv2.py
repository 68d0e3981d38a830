"""TOPv2 (Chen et al., 2020): from an utterance to its semantic parse.

    set alarm for 2 hours  ->  [IN:CREATE_ALARM set alarm [SL:DATE_TIME for 2 hours ] ]

An intent (IN) holds words and slots, a slot (SL) words or an intent.
"""

import re
from dataclasses import dataclass

from lsjax.evaluation.tasks.task import Example, Row, Task


@dataclass(frozen=True)
class Tree:
    """An intent or a slot, with words and trees in it."""

    label: str
    children: tuple["str | Tree", ...]


def parse_tree(text: str) -> Tree | None:
    """The tree that a text spells, whatever the white space; None if it spells none, or more."""
    opened: list[tuple[str, list]] = []
    pieces = re.findall(r"\[(?:IN|SL):\w*|\]|[^\s\[\]]+|\[", text)
    for number, piece in enumerate(pieces, 1):
        if re.match(r"\[(IN|SL):\w", piece):
            opened.append((piece[1:], []))
        elif not opened:
            return None
        elif piece != "]":
            opened[-1][1].append(piece)
        else:
            label, children = opened.pop()
            tree = Tree(label, tuple(children))
            if not opened:
                return tree if number == len(pieces) else None
            opened[-1][1].append(tree)
    return None


def normalised(tree: Tree) -> Tree:
    """The tree without the words that only repeat the utterance: words stay where they are the
    value of a slot, in a slot that holds no intent (decoupled form, Aghajanyan et al., 2020)."""
    trees = tuple(normalised(child) for child in tree.children if isinstance(child, Tree))
    if tree.label.startswith("SL:") and not trees:
        return tree
    return Tree(tree.label, trees)


def english_columns(row: Row) -> Row:
    """The row with its query and parse under the names of the Hinglish-TOP files, which have
    TOPv2's English rows; TOPv2's own files say utterance and semantic_parse."""
    names = {"en_query": "utterance", "en_parse": "semantic_parse"}
    return {new: row[old] for new, old in names.items() if old in row} | dict(row)


def score(text: str, example: Example) -> dict[str, float]:
    """exact_match: the same text, but for white space around it. tree_match: the same intents,
    slots and values of slots in the same order."""
    expected, found = parse_tree(example.reference), parse_tree(text)
    same = expected is not None and found is not None and normalised(expected) == normalised(found)
    return {
        "exact_match": float(text.strip() == example.reference.strip()),
        "tree_match": float(same),
    }


TOPV2 = Task(
    name="topv2",
    prompt_template="{en_query}\n",
    response_template="{en_parse}",
    score=score,
    max_new_tokens=80,
    fields=english_columns,
    group="domain",
)
