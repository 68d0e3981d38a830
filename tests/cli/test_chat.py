"""Chats, turn by turn. tests/long/test_terminals.py has terminals."""

import io
import signal
from pathlib import Path

import pytest
from rich.console import Console

import lsjax
from lsjax.cli import decode
from lsjax.cli.chat import COMMANDS, Chat
from lsjax.config import Sampling
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.self_speculative import SelfSpeculative
from tests.programs import program

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}/{% endif %}{% endfor %}"
)


class Interrupting(io.StringIO):
    """Presses Ctrl-C while text is shown, as often as it is told."""

    presses = 0

    def write(self, text: str) -> int:
        if text.strip() and self.presses:
            self.presses -= 1
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.fixture
def talk(model, monkeypatch):
    """Lets a chat go over these messages; a number before one is how often Ctrl-C is pressed in its
    answer. Gives the prompts, the completions, what was shown, and the notes."""

    def run(*inputs, strategy=None, sampling=None, max_new_tokens=20):
        tokenizer = ByteTokenizer(add_bos=False, chat_template=TEMPLATE)
        engine = Engine(model, tokenizer, strategy)
        shown, notes, prompts, completions = Interrupting(), io.StringIO(), [], []
        said = iter(inputs)

        def read(prompt):
            print(prompt, end="")
            one = next(said, EOFError)
            if isinstance(one, int):
                shown.presses = one
                one = next(said)
            if isinstance(one, str):
                return one
            raise one

        watch = engine.watch

        def watched(request, **options):
            prompts.append(request.prompt)
            return watch(request, **options)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(engine, "watch", watched)
        default = Request(prompt="", max_new_tokens=max_new_tokens, sampling=sampling or Sampling())
        Chat(
            engine,
            default,
            Console(file=shown, soft_wrap=True),
            Console(file=notes, soft_wrap=True),
            finish=lambda message, completion: completions.append(completion),
        ).run()
        return prompts, completions, shown.getvalue(), notes.getvalue()

    return run


@pytest.mark.parametrize("strategy", [None, SelfSpeculative(3, 4)], ids=["plain", "speculative"])
def test_a_turn_behind_an_interrupted_one(model, tokenizer, talk, strategy):
    """Says what a fresh engine says to the same history, the broken answer in it."""
    prompts, found, _, notes = talk("hi", 1, "and then?", "so", "bye", strategy=strategy)
    assert [c.finish_reason for c in found] == ["length", "interrupt", "length", "length"]
    assert 0 < found[1].num_new_tokens < 20
    fresh = Engine(model, tokenizer)
    for prompt, completion in zip(prompts, found, strict=True):
        (expected,) = fresh.generate([prompt], max_new_tokens=completion.num_new_tokens)
        assert completion.token_ids == expected.token_ids
    for before, after, message, c in zip(
        prompts, prompts[1:], ["and then?", "so", "bye"], found, strict=False
    ):
        assert after == [*before, *c.token_ids, *tokenizer.encode(f"/{message}")]
    assert "1 ended by interrupt" in notes


def test_a_second_ctrl_c_takes_the_turn_back(model, tokenizer, talk):
    prompts, found, _, notes = talk("hi", 2, "never mind", "so")
    assert len(found) == 2 and "this message and its answer are forgotten" in notes
    assert prompts[2] == [*prompts[0], *found[0].token_ids, *tokenizer.encode("/so")]
    (expected,) = Engine(model, tokenizer).generate([prompts[2]], max_new_tokens=20)
    assert found[1].token_ids == expected.token_ids


def test_what_is_no_message(talk):
    """The chat goes on behind it."""
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    prompts, found, _, notes = talk("", "  ", broken, KeyboardInterrupt, "\udcff", "a" * 600, "hi")
    assert prompts[-1] == list(b"hi") and len(found) == 1
    for words in ("that was not UTF-8", COMMANDS, "lone surrogate", "do not fit the length of 512"):
        assert words in notes


def test_unknown_commands_are_refused(talk):
    """A message may begin with a slash."""
    prompts, _, _, notes = talk("/exit", " /Help ", "/usr/bin", "/a b")
    assert prompts[0] == list(b"/usr/bin") and len(prompts) == 2
    for command in ("/exit", "/Help"):
        assert f"{command} is not a command. {COMMANDS}" in notes


def test_each_turn_has_the_next_seed(talk):
    sampling = Sampling(temperature=1.0, seed=2**32 - 2)
    _, found, *_ = talk("hi", "/new", "hi", "/new", "hi", sampling=sampling)
    assert [c.seed for c in found] == [2**32 - 2, 2**32 - 1, 0]
    assert len({tuple(c.token_ids) for c in found}) == 3


def test_the_prompt_is_for_people(talk):
    """It goes where the answers go, which with --json - is not standard output."""
    _, (completion,), shown, _ = talk("hi", max_new_tokens=3)
    assert shown == f"> {completion.text}\n> \n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-new-tokens", 0), "max_new_tokens 0 is below 1"),
        (("--max-length", 100), "128 new ones do not fit the length of 100"),
    ],
)
def test_what_no_turn_could_be_asked(model, tmp_path, refused, monkeypatch, options, words):
    """Refused before the model is loaded, and not turn by turn."""
    tokenizer = ByteTokenizer(add_bos=False, chat_template=TEMPLATE)
    lsjax.save(model, tmp_path / "model", tokenizer=tokenizer)
    monkeypatch.delattr(decode, "load_engine")
    given = ["--model", tmp_path / "model", "--interactive", *options]
    assert words in refused(program("decode"), *given)
