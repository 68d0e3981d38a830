"""Chats in a terminal of their own. Long: programs start anew, and wait for keys."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lsjax
from lsjax.checkpoints.huggingface import GenerationDefaults
from lsjax.cli.chat import COMMANDS
from lsjax.config import LlamaConfig
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.evaluation.comparison import identity_tail
from lsjax.model.llama import Llama

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}/{% endif %}{% endfor %}"
)
# Where the tests run in the background Ctrl-C may be ignored, and a program inherits that.
IN_A_TERMINAL = """
import os, pty, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory) -> Path:
    """A model that says the alphabet from the last letter of its prompt on, and ends with y; z it
    says without end. After A it tells a terminal to erase the screen. Layers that add nothing, so
    that a token says which one is next."""
    config = LlamaConfig.tiny(num_layers=2, max_context=2**17)
    model = identity_tail(jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))(), 0)
    following = {ord(a): ord(a) + 1 for a in "abcdefghijklmnopqrstuvwx"}
    following |= {ord("y"): 257, ord("z"): ord("z")}
    following |= {ord("A"): 0x1B, 0x1B: ord("["), ord("["): ord("J"), ord("J"): 0x0D, 0x0D: 257}
    embedding = np.asarray(model.embedding[...])
    head = np.zeros_like(embedding)
    for token, after in following.items():
        head[after] += embedding[token]
    model.head = nnx.Param(jnp.asarray(head))
    directory = tmp_path_factory.mktemp("alphabet")
    tokenizer = ByteTokenizer(add_bos=False, chat_template=TEMPLATE)
    defaults = GenerationDefaults(exit_layer=1, num_draft_tokens=3)
    lsjax.save(model, directory, generation=defaults, tokenizer=tokenizer)
    return directory


class Terminal:
    """A program in a pseudo-terminal: what it shows, and keys for it."""

    def __init__(self, command: list[str]):
        self.shown, self._read = "", 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *command],
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def press(self, keys: str) -> None:
        self._process.stdin.write(keys.encode())

    def until(self, text: str, again: str = "") -> str:
        """What comes up to this text, which must come. again: keys to press while it does not."""
        end = time.monotonic() + 300
        while text not in self.shown[self._read :]:
            assert time.monotonic() < end, f"no {text!r} in {self.shown[self._read :]!r}"
            ready, _, _ = select.select([self._process.stdout], [], [], 2)
            if not ready:
                self.press(again)
                continue
            piece = os.read(self._process.stdout.fileno(), 65536)
            assert piece, f"ended without {text!r} in {self.shown[self._read :]!r}"
            self.shown += piece.decode().replace("\r\n", "\n")
        begin, self._read = self._read, self.shown.index(text, self._read) + len(text)
        return self.shown[begin : self._read]

    def ended(self, again: str = "") -> int:
        """The exit code. again: keys to press while it does not end."""
        end = time.monotonic() + 300
        while True:
            try:
                return self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                assert time.monotonic() < end, f"goes on after {self.shown[-200:]!r}"
                self.press(again)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        with self._process:  # the program ends with its terminal
            self._process.kill()


def test_ten_turns_in_a_terminal(alphabet, tmp_path):
    """With a Ctrl-C in an answer without end, one at the prompt, a new chat, and Ctrl-D."""
    options = ["--interactive", "--strategy", "self_speculative", "--max-new-tokens", "100000"]
    options += ["--model", str(alphabet), "--json", str(tmp_path / "chat.jsonl")]
    with Terminal([sys.executable, "-W", "error", "decode.py", *options]) as terminal:
        assert COMMANDS in terminal.until("> ")
        for message in ("a", "k", "x", "hello", "z", "v", "/new", "m", "", "zz", "q", "a"):
            terminal.press(message + "\n")
            if "z" in message:
                terminal.until("zzzzz")  # beyond the echo of the message
                terminal.press("\x03")
                assert "1 ended by interrupt" in terminal.until("\n> ")
                continue
            shown = terminal.until("\n> ")
            if message not in ("", "/new"):
                answer = "abcdefghijklmnopqrstuvwxy".partition(message[-1])[2]
                assert f"\n{answer}\n" in shown and "1 ended by eos" in shown
        terminal.press("\x03")  # lost if it comes just before `input` waits
        terminal.until(COMMANDS, again="\x03")
        terminal.until("> ")
        terminal.press("\x04")  # lost likewise
        assert terminal.ended(again="\x04") == 0, terminal.shown

    turns = [json.loads(line) for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    said = [turn["prompt"] for turn in turns]
    assert said == ["a", "k", "x", "hello", "z", "v", "m", "zz", "q", "a"]
    history = 0
    for number, turn in enumerate(turns):
        if number == 6:
            history = 0  # the new chat
        assert turn["num_prompt_tokens"] == history + len(turn["prompt"])
        if turn["prompt"][0] == "z":
            assert turn["finish_reason"] == "interrupt"
            assert turn["text"] == "z" * turn["num_new_tokens"] and len(turn["text"]) > 3
        else:
            assert turn["finish_reason"] == "eos" and turn["acceptance_rate"] in (1.0, None)
        history = turn["num_prompt_tokens"] + len(turn["text"]) + 1  # a slash


def test_a_terminal_is_shown_control_characters(alphabet):
    """Those of streamed answers, token by token."""
    options = ["--interactive", "--strategy", "autoregressive", "--model", str(alphabet)]
    with Terminal([sys.executable, "decode.py", *options]) as terminal:
        terminal.until("> ")
        terminal.press("A\n")
        shown = terminal.until("\n> ")
        assert r"\x1b[J\r" in shown and "\x1b[J" not in shown and "\r" not in shown
        terminal.press("\x04")  # lost if it comes just before `input` waits
        assert terminal.ended(again="\x04") == 0, terminal.shown
