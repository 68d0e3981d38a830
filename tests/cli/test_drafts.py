"""Marks of drafted, rejected and corrected tokens: in colours, and without."""

import io
import re
from contextlib import contextmanager

import numpy as np
import pytest
from rich.segment import Segment, Segments
from rich.style import Style

from lsjax.cli.drafts import (
    ACCEPTED,
    ADDED,
    CORRECTED,
    GAP,
    LOOKED_UP,
    REJECTED,
    MarkedText,
    WordDiff,
    has_colours,
    legend,
    marked,
    show_unmarked,
    stream,
)
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.completion import Completion, Trace
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.terminal import SafeConsole

PROMPT = "Once\tupon :smile: [bold]a"
NEW = 24


def console(*, colours: bool) -> SafeConsole:
    if colours:
        return SafeConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    return SafeConsole(file=io.StringIO())


def parts(shown: Segments) -> list[tuple[str, Style]]:
    """Neighbours of one style are one part."""
    return [(one.text, one.style) for one in Segment.simplify(shown.segments)]


def completion_of(text: str, tokens: bytes, accepted: str, replaced: dict[int, int]) -> Completion:
    """accepted: y or n for each token; replaced: by index, the draft's token."""
    n = len(tokens)
    trace = Trace(
        np.frombuffer(tokens, np.uint8).astype(np.int32),
        np.array([letter == "y" for letter in accepted]),
        np.array([replaced.get(i, -1) for i in range(n)], np.int32),
        np.ones(n, np.int32),
    )
    rest = dict(prompt="", num_prompt_tokens=1, prefill_seconds=0.0, compile_seconds=0.0)
    return Completion.of(
        trace,
        strategy=SelfSpeculative(1, 2),
        decode_seconds=1.0,
        text=text,
        seed=None,
        finish_reason="stop",
        **rest,
    )


@pytest.mark.parametrize(
    "text, tokens, accepted, replaced, shown",
    [
        (
            "abcXdef",
            b"abcXdef",
            "nyynyyn",
            {3: ord("\r")},
            [("a", ADDED), ("bc", ACCEPTED), ("\\r", REJECTED), ("X", CORRECTED)]
            + [("de", ACCEPTED), ("f", ADDED)],
        ),
        ("ab", b"ab", "nn", {1: 257}, [("a", ADDED), ("</s>", REJECTED), ("b", CORRECTED)]),
        ("ab", b"ab", "nn", {1: 0xC3}, [("a", ADDED), ("�", REJECTED), ("b", CORRECTED)]),
        ("ab", b"ab", "nn", {1: ord(" ")}, [("a", ADDED), ("␣", REJECTED), ("b", CORRECTED)]),
        ("é", "é".encode(), "ny", {}, [("é", ACCEPTED)]),  # of the token that completes it
        ("a", b"aEND", "nyyy", {}, [("a", ADDED)]),  # ended by a stop string
        ("a", b"aN\xc3D", "nyyy", {}, [("a", ADDED)]),  # the last token adds two characters
        ("aE", b"aE", "nn", {}, [("aE", ADDED)]),
    ],
)
def test_colours_of_a_trace(tokenizer, text, tokens, accepted, replaced, shown):
    completion = completion_of(text, tokens, accepted, replaced)
    styled = [(piece, Style.parse(style)) for piece, style in shown]
    assert parts(marked(console(colours=True), tokenizer, [65], completion)) == styled


@pytest.mark.parametrize("stop", [[], ["Z"]])
@pytest.mark.parametrize("prompt", [PROMPT, "é".encode()[:1], "a", "bc"])
def test_colours_of_a_real_completion(model, tokenizer, prompt, stop):
    """Without the rejected tokens it is the completion's text; each rejected token is there."""
    ids = list(prompt) if isinstance(prompt, bytes) else tokenizer.encode(prompt)
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4))
    (completion,) = engine.generate([ids], max_new_tokens=NEW, stop=stop)
    shown = marked(console(colours=True), tokenizer, ids, completion).segments
    struck = Style.parse(REJECTED)
    assert sum(one.style == struck for one in shown) == (completion.trace.replaced_n >= 0).sum()
    assert "".join(one.text for one in shown if one.style != struck) == completion.text


class Words(ByteTokenizer):
    """A byte that is a digit stands for a word with a space before it."""

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        return f" w{chr(token_id)}".encode() if chr(token_id).isdigit() else b"-"


def test_the_space_before_a_rejected_word_is_not_struck():
    completion = completion_of(" w1 w2", b"12", "nn", {1: ord("3")})
    shown = marked(console(colours=True), Words(add_bos=False), [65], completion)
    expected = [(" w1", ADDED), (" ", GAP), ("w3", REJECTED), (" w2", CORRECTED)]
    assert parts(shown) == [(piece, Style.parse(style)) for piece, style in expected]


def unmarked(text: str) -> str:
    """What `WordDiff` was given: without rejected drafts and marks."""
    text = re.sub(r"\[-.*?-\]", "", text, flags=re.DOTALL)
    return re.sub(r"{\+(.*?)\+}", r"\1", text.replace("\\n+}\n", "+}\n"), flags=re.DOTALL)


@pytest.mark.parametrize(
    "text, tokens, accepted, replaced, shown",
    [
        ("abcXdef", b"abcXdef", "nyynyyn", {3: ord("\r")}, "{+a+}bc[-\\r-]{+X+}de{+f+}"),
        ("abcd", b"abcd", "nnny", {2: ord("x")}, "{+ab+}[-x-]{+c+}d"),  # two of the full model
        ("a\n\nb", b"a\n\nb", "nnnn", {}, "{+a\\n+}\n{+\\n+}\n{+b+}"),
        ("a\nb", b"a\nb", "nyn", {}, "{+a+}\n{+b+}"),
        ("a\n", b"a\n", "yn", {}, "a{+\\n+}\n"),
        ("x{+y", b"x{+y", "nnnn", {}, "{+x{+y+}"),  # a model's own marks
        ("é", "é".encode(), "ny", {}, "é"),
        ("é", "é".encode(), "yn", {}, "{+é+}"),
        ("a", b"aEND", "nyyy", {}, "{+a+}"),
        ("ab", b"ab", "nn", {1: ord(" ")}, "{+a+}[-␣-]{+b+}"),
    ],
)
def test_marks_of_a_trace_without_colours(tokenizer, text, tokens, accepted, replaced, shown):
    completion = completion_of(text, tokens, accepted, replaced)
    found = marked(console(colours=False), tokenizer, [65], completion).segments
    assert "".join(one.text for one in found) == shown
    assert not any(one.style for one in found) and unmarked(shown) == text


def test_marks_stay_open_from_piece_to_piece():
    """Text that arrives in pieces has the marks of the whole text."""
    pieces = [("a", ADDED), ("b", CORRECTED), ("", ACCEPTED), ("x", REJECTED), ("c", ADDED)]
    pieces += [("d", LOOKED_UP), ("e", ACCEPTED), ("f\n", ADDED), ("g", ADDED)]
    whole = "".join(one.text for one in WordDiff()(pieces, True))
    assert whole == "{+ab+}[-x-]{+c+}de{+f\\n+}\n{+g+}"
    marks, texts = WordDiff(), []
    for number, piece in enumerate(pieces, start=1):
        texts += [one.text for one in marks([piece], number == len(pieces))]
    assert "".join(texts) == whole


def test_streamed_marks_equal_those_of_the_whole(model, tokenizer):
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4))
    text = MarkedText(console(colours=False), tokenizer, [97])
    shown = ""
    for update in engine.watch([97], max_new_tokens=NEW):
        last = update.completion is not None
        pushed = text.push(update.trace, update.text, last=last)
        shown += "".join(one.text for one in pushed.segments)
    whole = marked(console(colours=False), tokenizer, [97], update.completion)
    assert shown == "".join(one.text for one in whole.segments)
    assert unmarked(shown) == update.completion.text
    trace = update.completion.trace
    assert shown.count("[-") == (trace.replaced_n >= 0).sum() > 0


def test_nothing_is_said_in_the_middle_of_a_text(shallow, tokenizer):
    """A larger cache needs further programs there; a terminal would erase the unfinished line."""
    said = []

    @contextmanager
    def compiling(line):
        said.append((line, people.file.getvalue()))
        yield

    people = console(colours=True)
    engine = Engine(shallow, tokenizer, compiling=compiling, ignore_end=True)
    request = Request(prompt=[5, 6, 7] * 80, max_new_tokens=100)
    completion = stream(people, engine, request, show_drafts=False, opening="prompt")
    assert completion.num_new_tokens == 100 and len(engine.programs) == 4
    ((line, shown),) = said
    assert line.startswith("compiling 2 programs, once for this machine: rounds") and not shown
    assert people.file.getvalue().startswith("\x1b[2mprompt\x1b[0m")
    assert engine.programs.compiling is compiling


def test_where_colours_are_seen(monkeypatch):
    assert has_colours(console(colours=True)) and not has_colours(console(colours=False))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(console(colours=True))


@pytest.mark.parametrize("colours", [True, False])
def test_the_text_by_itself_follows_marks_only(colours):
    shown = console(colours=colours)
    show_unmarked(shown, "a\tb")
    assert shown.file.getvalue() == ("" if colours else "\na\tb\n\n")
    words = legend(shown, SelfSpeculative(1, 2)).plain
    assert ("[-rejected draft-]{+its correction+}" in words) == (not colours)
