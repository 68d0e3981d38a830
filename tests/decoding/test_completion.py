"""Figures of a trace by hand, and text that is cut at stop strings while it comes."""

import codecs
import dataclasses

import numpy as np
import pytest

from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.completion import Completion, RowText, Trace
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import EOS, LENGTH, RUNNING
from lsjax.decoding.strategy import Autoregressive, EarlyExit


def trace_of(tokens, accepted=None, replaced=None, rounds=None) -> Trace:
    """By default every token is a round of its own, as autoregressive decoding has it."""
    n = len(tokens)
    return Trace(
        np.array(tokens, np.int32),
        np.array([False] * n if accepted is None else accepted, bool),
        np.array([-1] * n if replaced is None else replaced, np.int32),
        np.array([1] * n if rounds is None else rounds, np.int32),
    )


@pytest.fixture
def trace():
    """Prefill; 3 drafted, 2 right, 1 corrected; 2 drafted, both right, 1 more; 2 drafted and
    right, of which the second is the end token."""
    no, yes = False, True
    return trace_of(
        tokens=[10, 20, 21, 22, 30, 31, 32, 40, 41],
        accepted=[no, yes, yes, no, yes, yes, no, yes, yes],
        replaced=[-1, -1, -1, 99, -1, -1, -1, -1, -1],
        rounds=[1, 0, 0, 4, 0, 0, 3, 0, 3],
    )


@pytest.mark.parametrize(
    "count, rounds, drafted, accepted",
    [
        (9, 3, [3, 3, 1], [3, 3, 0]),
        (8, 3, [3, 2, 1], [3, 2, 0]),  # before the end token
        (7, 2, [2, 2, 1], [2, 2, 0]),
        (6, 2, [2, 2, 1], [2, 2, 0]),  # without the verification's own token
        (5, 2, [2, 1, 1], [2, 1, 0]),
        (4, 1, [1, 1, 1], [1, 1, 0]),
        (3, 1, [1, 1], [1, 1]),  # the third draft, which was refused, lies behind the cut
        (2, 1, [1], [1]),
        (1, 0, [], []),
        (0, 0, [], []),
    ],
)
def test_cut_trace(trace, count, rounds, drafted, accepted):
    cut = trace.cut(count)
    assert len(cut) == count
    assert cut.tokens_n.tolist() == trace.tokens_n[:count].tolist()
    assert cut.rounds == rounds
    assert cut.by_position() == (drafted, accepted)
    assert trace.by_position() == ([3, 3, 1], [3, 3, 0]), "cutting changed the whole"


def completion_of(trace, strategy, decode_seconds) -> Completion:
    return Completion.of(
        trace,
        strategy=strategy,
        decode_seconds=decode_seconds,
        prompt="p",
        text="t",
        num_prompt_tokens=1,
        prefill_seconds=0.5,
        compile_seconds=0.0,
        seed=None,
        finish_reason="eos",
    )


def test_figures(trace):
    completion = completion_of(trace, SelfSpeculative(2, 3), decode_seconds=4.0)
    assert completion.to_json() == {
        "prompt": "p",
        "text": "t",
        "token_ids": [10, 20, 21, 22, 30, 31, 32, 40, 41],
        "num_prompt_tokens": 1,
        "num_new_tokens": 9,
        "prefill_seconds": 0.5,
        "decode_seconds": 4.0,
        "tokens_per_second": 2.0,  # (9 - 1) / 4
        "compile_seconds": 0.0,
        "strategy": "self_speculative",
        "exit_layer": 2,
        "num_draft_tokens": 3,
        "draft_vocab": None,
        "draft_confidence": None,
        "seed": None,
        "rounds": 3,
        "drafted": 7,
        "accepted": 6,
        "acceptance_rate": 6 / 7,
        "tokens_per_round": 8 / 3,
        "drafted_by_position": [3, 3, 1],
        "accepted_by_position": [3, 3, 0],
        "sources": None,
        "log_probs": None,
        "finish_reason": "eos",
    }


def test_rounds_and_tokens_of_each_source(trace):
    """Rounds of 3, 3 and 2 tokens."""
    source_n = np.array([0, 2, 2, 2, 2, 0, 0, 0, 1], np.int32)
    chosen = dataclasses.replace(trace, source_n=source_n)
    assert chosen.by_source() == {
        "exit 2": dict(rounds=1, tokens=3),
        "lookup": dict(rounds=1, tokens=3),
        "exit 1": dict(rounds=1, tokens=2),
    }
    assert trace.by_source() is None


def test_an_exit_that_ends_before_its_first_draft_keeps_its_round():
    """Four rounds of a token each: of exit 2 without a draft, of none, of exit 2, and of lookup."""
    trace = trace_of([10, 20, 30, 40, 50], rounds=[1, 1, 1, 2, 2])
    source_n = np.array([0, 2, 0, 2, 0], np.int32)
    assert dataclasses.replace(trace, source_n=source_n).by_source() == {
        "exit 2": dict(rounds=2, tokens=2),
        "none": dict(rounds=1, tokens=1),
        "lookup": dict(rounds=1, tokens=1),
    }


@pytest.mark.parametrize(
    "strategy, tokens, seconds, speed, tokens_per_round",
    [
        (Autoregressive(), [1, 2, 3], 0.5, 4.0, 1.0),
        (EarlyExit(2), [1, 2, 3], 0.0, None, 1.0),  # a clock that did not move
        (SelfSpeculative(1, 1), [1], 0.0, None, None),
    ],
)
def test_undefined_figures_are_none(strategy, tokens, seconds, speed, tokens_per_round):
    completion = completion_of(trace_of(tokens), strategy, seconds)
    assert completion.tokens_per_second == speed
    assert completion.tokens_per_round == tokens_per_round
    assert completion.acceptance_rate is None
    assert (completion.drafted, completion.accepted) == (0, 0)
    assert (completion.exit_layer, completion.num_draft_tokens) == (
        strategy.exit_layer,
        strategy.num_draft_tokens,
    )


class Pieces(Tokenizer):
    """Token i adds the i-th of the given bytes."""

    def __init__(self, pieces):
        self._pieces = dict(enumerate(pieces))
        self.special_spelling = {}

    def _encode_batch(self, texts, allow_special):
        raise NotImplementedError

    def _save_model(self, directory):
        raise NotImplementedError


def read(pieces, stop=(), finish=LENGTH, looks=None):
    """Lets a row come; `looks` are the numbers of tokens at which somebody looks, all at the end.

    Returns what each look showed, the row's text, the number of tokens kept, and the reason.
    """
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    row = RowText(Pieces(pieces), [], tuple(stop))
    whole, shown = trace_of(range(len(pieces))), []
    for count in [*(range(1, len(pieces)) if looks is None else looks), len(pieces)]:
        last = count == len(pieces)
        piece, cut, reason = row.read(whole.cut(count), finish if last else RUNNING)
        shown.append(piece)
        assert "".join(shown) == row.text[: len("".join(shown))]
        if reason is not None:
            break
    return shown, row.text, len(cut), reason


@pytest.mark.parametrize("looks", [None, []], ids=["each token", "once"])
@pytest.mark.parametrize(
    "pieces, stop, text, kept, reason",
    [
        (["ab", "cd"], [], "abcd", 2, "length"),
        (["ab", "cX", "Yd", "e"], ["XY"], "abc", 3, "stop"),  # over a token border
        (["a", "X", "Y", "Z", "b"], ["XYZ"], "a", 4, "stop"),  # over three tokens
        (["ab", "XYcd", "e"], ["XY"], "ab", 2, "stop"),  # inside a token
        (["a1b2c"], ["2", "1"], "a", 1, "stop"),  # the first in the text, not in the list
        (["a", "E", "ND", "x"], ["END", "E"], "a", 2, "stop"),  # one a prefix of another
        (["a", "E", "ND", "x"], ["ENDE", "END"], "a", 3, "stop"),
        (["END"], ["END"], "", 1, "stop"),  # at the very first character
        (["E", "N", "D"], ["END"], "", 3, "stop"),
        (["aE", "N", "d"], ["END"], "aENd", 3, "length"),  # begins like one, is none
        (["aE", "N"], ["END"], "aEN", 2, "length"),
        (["EE", "EN", "D"], ["END"], "EE", 3, "stop"),  # begins again inside itself
        (["aab", "aac"], ["aabaac", "baa"], "", 2, "stop"),  # two that overlap: the first
        (list("aabaac"), ["aabaac", "baa"], "aa", 5, "stop"),  # the one that is whole first
        ([b"\xf0\x9f", b"\x99\x82!"], [], "🙂!", 2, "length"),  # a character over tokens
        ([b"\xf0\x9f", b"\x99\x82", "x"], ["🙂"], "", 2, "stop"),
        ([b"a\xc3", "b"], [], "a�b", 2, "length"),
        (["a", b"\xf0\x9f"], [], "a�", 2, "length"),  # unfinished at the end
        (["a", b"\xf0\x9f"], ["�"], "a", 2, "stop"),
    ],
)
def test_row_text(pieces, stop, text, kept, reason, looks):
    shown, *found = read(pieces, stop, looks=looks)
    assert found == [text, kept, reason]
    assert "".join(shown) == text


@pytest.mark.parametrize("stop", [[], ["</s>"], ["b</s>"]])
def test_end_token_is_no_text(stop):
    """Even if it has a spelling that a stop string holds."""
    shown, text, kept, reason = read(["a", "b", "</s>"], stop, finish=EOS)
    assert ("".join(shown), text, kept, reason) == ("ab", "ab", 3, "eos")


def test_shows_what_is_safe():
    """What may begin a stop string waits until it is known not to; half a character too."""
    shown, *_ = read(["aE", "N", "Nb", b"\xc3", b"\xa9", "E"], ["END"])
    assert shown == ["a", "", "ENNb", "", "é", "E"]


@pytest.mark.parametrize("seed", range(200))
def test_pieces_make_the_text_whatever_the_looks(seed):
    """Against the plain rule: the text so far, all of it searched after every token."""
    random = np.random.default_rng(seed)

    def text_of(longest):
        return "".join(random.choice(list("abé🙂"), random.integers(1, longest)))

    content = text_of(30).encode()
    borders = np.unique(random.integers(0, len(content) + 1, 12)).tolist()
    pieces = [
        content[a:b] for a, b in zip([0, *borders], [*borders, len(content) + 1], strict=True)
    ]
    stop = [text_of(5) for _ in range(random.integers(0, 4))]
    looks = np.unique(random.integers(1, len(pieces) + 1, 4)).tolist()
    looks = [count for count in looks if count < len(pieces)]

    decoder, expected, kept, reason = codecs.getincrementaldecoder("utf-8")(), "", 0, "length"
    for kept, piece in enumerate(pieces, start=1):  # noqa: B007
        expected += decoder.decode(piece)
        if found := [expected.index(s) for s in stop if s in expected]:
            expected, reason = expected[: min(found)], "stop"
            break
    shown, *rest = read(pieces, stop, looks=looks)
    assert rest == [expected, kept, reason]
    assert "".join(shown) == expected
