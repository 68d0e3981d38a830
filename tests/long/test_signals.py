"""Programs that end before their work does. Long: each test starts programs of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsjax.data.token_rows import INDEX
from lsjax.terminal import CONTROLS
from tests.cli.test_tokenize import CONFIG
from tests.long.processes import assert_group_ends

ROOT = Path(__file__).parents[2]
PLAIN = ["--strategy", "autoregressive"]


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


KILLED = """
import os
import signal

from lsjax.decoding.engine import Engine
from lsjax.interrupts import command

generate = Engine.generate

def killed(self, requests, *, on_completion):
    def ended(index, completion):
        on_completion(index, completion)
        os.kill(os.getpid(), {number})

    return generate(self, requests, on_completion=ended)

Engine.generate = killed
signal.signal(signal.SIGINT, signal.default_int_handler)
command("decode")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_done(model_directory, tmp_path, number):
    """Texts that wait for the one before them are written too."""
    file, prompts = tmp_path / "lines.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": "a", "max_new_tokens": 60}, {"prompt": "b", "max_new_tokens": 2}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    given = ["--model", model_directory, "--prompt-file", prompts, "--batch-size", "2"]
    program = [sys.executable, "-c", KILLED.format(number=int(number)), *given, "--json", file]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 128 + number
    assert ended.stderr.splitlines()[-1] == "interrupted: the finished texts are written"
    assert "Traceback" not in ended.stderr
    assert [line["prompt"] for line in lines_of(file.read_text())] == ["b"]
    assert ended.stdout.startswith("b")


def test_a_reader_of_lines_that_stops_ends_the_program_quietly(model_directory, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab"}\n' * 50)
    given = ["--model", model_directory, "--prompt-file", file, "--max-new-tokens", "8", *PLAIN]
    program = [sys.executable, "-X", "dev", "decode.py", *map(str, given), "--json", "-"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(program, cwd=ROOT, encoding="utf-8", **pipes) as process:
        assert json.loads(process.stdout.readline())["prompt"] == "ab"
        process.stdout.close()
        notes = process.stderr.read()
    assert process.returncode == 141
    assert [line for line in notes.splitlines() if "parameters" not in line] == []


def test_unknown_keys_of_a_model_are_shown_in_a_terminal(model_directory, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "evil")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"evil\x9b2J": 1}))
    program = [sys.executable, "decode.py", "--model", directory, "--prompt", "a", *PLAIN]
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    assert r"unknown keys are ignored: evil\x9b2J" in done.stderr
    assert not CONTROLS.search(done.stderr)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_in_a_terminal(tmp_path, workers):
    """Reaches every process: none goes on, and there is one line in all."""
    (tmp_path / "config.py").write_text(CONFIG)
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    (tmp_path / "many.jsonl").write_text(line * 3000)
    program = ("-m", "lsjax", "tokenize", "--config", "config.py", "--workers", str(workers))
    started = subprocess.Popen(
        # A shell starts programs of the background with Ctrl-C ignored.
        ["env", "--default-signal=INT", sys.executable, *program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LSJAX_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    while not list(tmp_path.rglob("0*.json")):
        assert started.poll() is None
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=120)
    said = "interrupted: the same command makes the missing shards\n"
    assert (started.returncode, errors) == (130, said)
    assert_group_ends(started.pid)
    assert not list(tmp_path.rglob(INDEX))
