"""Bad inputs of every program, as real processes: one line, the right exit code, no traceback.

    python -m pytest tests/proofs/test_bad_inputs.py

`make test` leaves this out, as each of the many processes takes seconds to import JAX. A case is a
command in a directory that holds a tiny model, a run of five steps and damaged files. Standard
error must hold one line that opens with "error: " and has the case's words. Notes may precede the
line if the program had to work first.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import lsjax
from lsjax.checkpoints.huggingface import GenerationDefaults
from lsjax.terminal import CONTROLS

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train", "decode")  # the others are modules of lsjax.cli
WITHIN = 300  # seconds in which a program must end
TINY = f"--config {shlex.quote(str(ROOT / 'scripts' / 'proofs' / 'tiny_run.py'))}"
NOTES = re.compile(r"tiny: 0M parameters|\d+ of \d+ answers are already stored|\s*$")
# Files may have at most this many bytes: a full disk for everyone, also for root.
LIMITED = """
import os, resource, sys
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Case(NamedTuple):
    """A command that must be refused."""

    program: str
    flags: str
    words: str  # pattern in the line
    room: int | None = None  # bytes that a file may have

    @property
    def title(self) -> str:
        """Name of the test."""
        return re.sub(r"\W+", "-", f"{self.program} {self.words}")[:60].strip("-")


TRAIN = [
    ("", "--config is missing: name a file"),
    ("--config nowhere.py --workdir new", "nowhere.py: FileNotFoundError"),
    ("--config syntax.py --workdir new", "syntax.py:2: SyntaxError"),
    ("--config other.py --workdir new", "`config` is missing or of another type"),
    (f"{TINY} --workdir new --batch-sise 4", "Unrecognized options: --batch-sise"),
    (f"{TINY} --workdir new --batch-size 0", "batch_size 0 must be a whole number of at least 1"),
    (f"{TINY} --workdir new --seq-len 100000", "seq_len 100000 is longer than the model's context"),
    (f"{TINY} --workdir new --mesh.data 3", "a mesh of data 3 needs 3 devices"),
    (f"{TINY} --workdir tiny", "tiny holds another model: choose a new one"),
    (f"{TINY} --workdir notes.txt", "notes.txt"),
    (f"{TINY} --workdir run --num-steps 6", "run was started with num_steps 5, now it is 6"),
    (f"{TINY} --workdir new --init-from nowhere", "nowhere: does not exist"),
    (f"{TINY} --workdir new --data.source jsonl", "data.source jsonl needs data.paths"),
    (
        f"{TINY} --workdir new --data.source jsonl --data.paths bad.jsonl",
        "bad.jsonl, line 2 is not an object",
    ),
]
DECODE = [
    ("--model nowhere --prompt a", "nowhere: does not exist"),
    ("--model tiny --prompt a --temperature nan", "temperature nan must be a finite number"),
    ("--model tiny --prompt a --strategy early_exit --exit-layer 9", "exit layer 9 is out of"),
    ("--model tiny --prompt-file bad.jsonl", "bad.jsonl, line 2 is not an object"),
    ("--model tiny --prompt a --json nowhere/out.jsonl", "out.jsonl can't be written"),
    ("--model tiny --prompt a --chat", "this model has no chat template"),
    ("--model tiny --prompt a --max-length 1", "max length 1 is out of range"),
    ("--model cut --prompt a", r"cut/model.safetensors: .*damaged or cut off"),
    ("--model no_json --prompt a", "no_json/config.json: is not JSON"),
    ("--model junk.gguf --prompt a", "junk.gguf: not a complete GGUF file"),
    ("--model run@4 --prompt a", "run: has no step 4: choose from"),
]
OTHERS = [
    ("benchmark", "--model tiny --batch-size 2", "--batch-size must be 1 here"),
    ("benchmark", "--model tiny --identity-tail 9", "--identity-tail 9 is out of range"),
    ("benchmark", "--model tiny --output notes.txt", r"notes.txt can't be written \(File exists"),
    ("evaluate", "--model tiny --task topv2 --output a.txt", "--output a.txt is not a .jsonl file"),
    ("evaluate", "--model tiny --task other --output a.jsonl", "invalid choice|Error parsing"),
    (
        "evaluate",
        "--model tiny --task topv2 --data short.tsv --output a.jsonl",
        "short.tsv, line 2 has 1 columns, but the header has 2",
    ),
    (
        "evaluate",
        "--model tiny --task topv2 --data good.tsv --output bad.jsonl",
        "bad.jsonl is not a file of answers",
    ),
    ("convert", "nowhere out", "nowhere: does not exist"),
    ("convert", "tiny run", "run: is not an empty directory"),
    ("tokenize", f"{TINY} --shard 4/3", "--shard 4/3 must be i/n with 1 <= i <= n"),
    (
        "tokenize",
        f"{TINY} --data.source text --data.paths latin.txt",
        "latin.txt, line 1 is not UTF-8 text",
    ),
    ("count_tokens", "--model tiny --text nowhere.txt", "nowhere.txt"),
    ("count_tokens", "--model tiny --text bad.jsonl", "bad.jsonl, line 2 is not an object"),
    ("aot", TINY, "--topology is missing"),
    ("aot", f"{TINY} --topology v9z:1", "v9z"),
    ("report", "--compare tiny tiny2 --output out", "no run tells which text is held out"),
    ("report", "--compare run --output out", "--compare has only run"),
    ("lm_eval", "--model tiny --tasks a --gen-kwargs x", "--gen-kwargs x must look like"),
    ("lm_eval", "--model tiny --tasks a --limit 0", "--limit 0.0 must be a finite number above 0"),
]
# What was accepted, ignored, or ended in a traceback.
REPAIRED = [
    # A failed save of the last step (the pictures need more room than metrics.jsonl).
    Case("train", f"{TINY} --workdir full --num-steps 30", r"step 30 .*full/checkpoints", 20_000),
    # Empty files.
    Case(
        "train",
        f"{TINY} --workdir new --data.source text --data.paths '*.empty'",
        r"\*\.empty: every file is empty: name others",
    ),
    Case(
        "evaluate",
        "--model tiny --task topv2 --data a.empty.tsv --output a.jsonl",
        "a.empty.tsv: every file is empty: name others",
    ),
    # --kernels.
    Case(
        "train",
        f"{TINY} --workdir new --kernels reference --attention flash",
        "attention .*kernels",
    ),
    Case("decode", "--model tiny --prompt a --kernels fast", "invalid choice 'fast'.*'--kernels'"),
    # Steps of what is no run.
    Case("decode", "--model tiny@5 --prompt a", "tiny is not a training run, so it has no steps"),
    Case("benchmark", "--model tiny@best", "tiny is not a training run, so it has no steps"),
    Case("convert", "tiny@5 out", "tiny is not a training run, so it has no steps"),
    Case("count_tokens", "--model tiny@5 --text notes.txt", "tiny is not a training run"),
    Case("decode", "--model junk.gguf@5 --prompt a", "junk.gguf is not a training run"),
    # Values that no class of flags checked.
    Case("tokenize", f"{TINY} --workers 0", "--workers 0 must be a whole number of at least 1"),
    Case("train", f"{TINY} --workdir ''", "--workdir '' must be a path"),
    Case("train", TINY, "--workdir is missing: name the directory of the run"),
    Case("decode", "--model '' --prompt a", "--model '' must be a path"),
    Case("convert", "tiny ''", "destination '' must be a path"),
    Case("aot", f"{TINY} --topology v5e:1 --decoding.batch-size 0", "each item a whole number"),
    # Files of a model.
    Case(
        "decode",
        "--model no_end --prompt a",
        r"no_end/generation_config.json: eos_token_id 'a' must be the number of a token",
    ),
    # Full disks.
    Case(
        "train",
        f"{TINY} --workdir small --num-steps 40 --checkpoints.every 1000 --evaluation.every 1000",
        r"small/metrics.jsonl can't be written \(File too large\): free space there",
        7_000,
    ),
    Case(
        "decode",
        "--model tiny --prompt-file many.jsonl --max-new-tokens 8 --json small.jsonl",
        r"small.jsonl can't be written \(File too large\): free space there",
        3_000,
    ),
    Case(
        "evaluate",
        "--model tiny --task topv2 --data good.tsv --num-shots 0 --max-new-tokens 8 "
        "--output small_answers.jsonl",
        r"small_answers.jsonl can't be written \(File too large\): free space there",
        1_800,
    ),
    Case("convert", "tiny small_model", r"small_model: can't be written .*File too large", 100_000),
    Case("tokenize", f"{TINY} --seq-len 31", r"tokens/.* can't be written \(File too large", 3_000),
]
CASES = [Case("train", *rest) for rest in TRAIN] + [Case("decode", *rest) for rest in DECODE]
CASES += [Case(*case) for case in OTHERS] + REPAIRED


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    """A tiny model, a run of five steps, and damaged files."""
    root = tmp_path_factory.mktemp("inputs")
    defaults = GenerationDefaults(exit_layer=3, num_draft_tokens=4)
    for name in ("tiny", "cut", "no_json", "no_end"):
        lsjax.save(model, root / name, generation=defaults, tokenizer=tokenizer)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (root / "no_json" / "config.json").write_text("{")
    (root / "no_end" / "generation_config.json").write_text('{"eos_token_id": "a"}')
    (root / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (root / "notes.txt").write_text("a note\n")
    (root / "latin.txt").write_bytes(b"caf\xe9\n")
    (root / "syntax.py").write_text("a = 1\nb = = 2\n")
    (root / "other.py").write_text("config = 3\n")
    (root / "bad.jsonl").write_text('{"text": "a", "prompt": "a"}\n["b"]\n')
    (root / "many.jsonl").write_text('{"prompt": "ab"}\n' * 20)
    header = "en_query\ten_parse\tdomain\n"
    queries = [f"alarm {n}\t[IN:A alarm {n} ]\talarm\n" for n in range(8)]
    (root / "good.tsv").write_text(header + "".join(queries))
    (root / "short.tsv").write_text("en_query\ten_parse\nalone\n")
    for name in ("a.empty", "b.empty", "a.empty.tsv"):
        (root / name).touch()
    done = run(root, "train", f"{TINY} --workdir run --num-steps 5")
    assert done.returncode == 0, done.stderr
    return root


def command(program: str, flags: str) -> list[str]:
    """The words that start a program."""
    start = [str(ROOT / f"{program}.py")] if program in SCRIPTS else ["-m", f"lsjax.cli.{program}"]
    return [*start, *shlex.split(flags)]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Finds this source, and stores nothing in the user's cache."""
    own = {"PYTHONPATH": str(ROOT), "LSJAX_CACHE": str(folder / "cache"), "COLUMNS": "100"}
    return os.environ | own | more


def run(folder: Path, program: str, flags: str, room: int | None = None, **options):
    """Runs a program in the folder to its end."""
    words, more = [sys.executable, *command(program, flags)], {}
    if room is not None:  # JAX would warn of what it can't cache
        words = [sys.executable, "-c", LIMITED, str(room), *words[1:]]
        more = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | options
    env = environment(folder, **more)
    return subprocess.run(words, cwd=folder, env=env, encoding="utf-8", timeout=WITHIN, **pipes)


def said(stderr: str) -> list[str]:
    """The lines on stderr that are no notes."""
    return [line for line in stderr.splitlines() if not NOTES.match(line)]


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_a_bad_input_is_one_line(folder, case):
    done = run(folder, case.program, case.flags, case.room)
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = said(done.stderr)
    assert line.startswith("error: ") and re.search(case.words, line), line
    assert done.returncode == 2


def test_an_empty_first_file_is_skipped_and_counted(folder):
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").touch()
    for name in "bcdefghijk":
        (folder / "corpus" / f"{name}.txt").write_text(f"document {name} of the corpus\n")
    flags = f"{TINY} --data.source text --data.paths 'corpus/*.txt' --data.validation-fraction 0.5"
    done = run(folder, "tokenize", flags)
    assert done.returncode == 0, done.stderr
    (line,) = said(done.stderr)
    assert line == "corpus/*.txt: 1 of 11 files are empty and skipped"


def test_a_second_trainer_is_refused_and_the_first_ends_with_its_step_saved(folder):
    flags = f"{TINY} --workdir twice --num-steps 100000"
    words = [sys.executable, *command("train", flags)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen(words, cwd=folder, env=environment(folder), **pipes) as first:
        try:
            end = time.monotonic() + WITHIN
            while not (folder / "twice" / "metrics.jsonl").exists():
                assert first.poll() is None and time.monotonic() < end
                time.sleep(0.1)
            second = run(folder, "train", flags)
        finally:
            first.send_signal(signal.SIGTERM)
        assert first.wait(WITHIN) == 143, first.stderr.read()
    (line,) = said(second.stderr)
    assert line.startswith("error: ") and "twice" in line and second.returncode == 2


@pytest.mark.parametrize(
    ("program", "flags", "seconds"),
    [
        ("train", f"{TINY} --workdir stopped", 0.3),
        ("decode", "--model tiny --prompt a", 1.5),
        ("evaluate", "--model tiny --task topv2 --data good.tsv --output stopped.jsonl", 1.0),
    ],
    ids=["train", "decode", "evaluate"],
)
def test_ctrl_c_is_one_line(folder, program, flags, seconds):
    """While it imports."""
    python = ["env", "--default-signal=INT", sys.executable]
    words = [*python, *command(program, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen(words, cwd=folder, env=environment(folder), **pipes) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WITHIN)
    assert process.returncode == 130 and len(said(stderr)) == 1 and "Traceback" not in stderr


def test_the_last_seed_is_followed_by_the_first(folder):
    flags = "--model tiny --prompt-file many.jsonl --max-new-tokens 2 --temperature 1 --json -"
    done = run(folder, "decode", f"{flags} --seed 4294967295")
    assert done.returncode == 0 and said(done.stderr)[:-1] == [], done.stderr
    assert '"seed": 4294967295,' in done.stdout and '"seed": 18,' in done.stdout


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("decode", "--model tiny --prompt-file many.jsonl --max-new-tokens 8 --json -"),
        ("decode", "--model tiny --prompt-file many.jsonl --max-new-tokens 8"),
        ("decode", "--help"),
        ("train", f"{TINY} --help"),
        ("train", f"{TINY} --workdir piped --num-steps 5"),
        ("benchmark", "--model tiny --new-tokens 2 --repeats 1"),
        ("tokenize", TINY),
        ("count_tokens", "--model tiny --text notes.txt"),
        ("convert", "tiny piped_model"),
        ("report", "--no-training --model run --prompts 1 --new-tokens 2 --output piped_report"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value.replace(TINY, ""))[:40],
)
def test_a_closed_pipe_ends_a_program_without_a_word(folder, program, flags):
    words = [sys.executable, *command(program, flags)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen(words, cwd=folder, env=environment(folder), **pipes) as process:
        process.stdout.close()
        stderr = process.stderr.read()
    assert process.wait(WITHIN) == 141 and said(stderr) == [], stderr


def test_standard_output_that_is_full_is_named(folder):
    flags = "--model tiny --prompt-file many.jsonl --max-new-tokens 8 --json -"
    with open("/dev/full", "w") as full:
        done = run(folder, "decode", flags, stdout=full)
    (line,) = said(done.stderr)
    assert line.startswith("error: standard output can't be written (No space left on device)")
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("decode", "--model 'no\x1b[2J\x9bwhere' --prompt a"),
        ("decode", "--model tiny --prompt 'a\x1b[2J\x9b' --max-new-tokens 24"),
        ("decode", "--model tiny --prompt 'a\x1b[2J' --max-new-tokens 24 --show-drafts"),
        ("train", f"{TINY} --workdir new --init-from 'no\x1b[2J\x9bwhere'"),
    ],
    ids=["model", "prompt", "drafts", "train"],
)
def test_a_terminal_is_shown_control_characters(folder, program, flags):
    """Only the escape sequences of the program's own colours remain, and the ends of lines."""
    main, terminal = os.openpty()
    words = [sys.executable, *command(program, flags)]
    env = environment(folder, TERM="xterm")
    process = subprocess.Popen(words, cwd=folder, env=env, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(main, 65536):
            shown += piece
    except OSError:  # the other end of a terminal is closed
        pass
    finally:
        os.close(main)
    process.wait(WITHIN)
    text = shown.decode().replace("\r\n", "\n")
    for own in (r"\x1b\[[\d;]*m", r"\x1b\[\?25[lh]", r"\r?\x1b\[\d?[AK]", r"\r"):
        text = re.sub(own, "", text)
    assert r"\x1b[2J" in text and not CONTROLS.search(text), text
