"""kill -9 in the middle of a save, an evaluation and a tokenization. Long: programs start anew."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
from flax import nnx

from lsjax.checkpoints.steps import saved_steps
from lsjax.data.token_rows import INDEX
from lsjax.model.llama import Llama
from lsjax.training.step import init_state
from tests.checkpoints.test_saving import CONFIG, advance, bits, numbers, open_
from tests.long.processes import assert_group_ends
from tests.test_train import last_arrays, launch, rows_of, write_config

ROOT = Path(__file__).parents[2]

KILLED_WHILE_EVALUATING = """
import os, signal, sys
from lsjax.cli.main import main
from lsjax.evaluation import exits

score_exits, left = exits.score_exits, int(sys.argv[1])

def killed_at_last(*arguments, **options):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return score_exits(*arguments, **options)

exits.score_exits = killed_at_last
main(["train", *sys.argv[2:]])
"""


def test_a_run_that_is_killed_while_it_evaluates_loses_nothing(tmp_path, monkeypatch):
    """Before the first regular checkpoint, then after the last step; with accumulation."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    config = write_config(tmp_path)
    flags = ["--micro-batches", "2", "--checkpoints.every", "50", "--evaluation.every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(config, whole, *flags) == 0
    argv = ["--config", str(config), "--workdir", str(cut), *flags]
    # The second run first makes the evaluation of step 3, which the first one could not make.
    for evaluations, last in ((0, 3), (1, 6)):
        program = [sys.executable, "-c", KILLED_WHILE_EVALUATING, str(evaluations), *argv]
        assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
        assert saved_steps(cut / "checkpoints")[0].number == last
    assert launch(config, cut, *flags) == 0
    assert last_arrays(cut) == last_arrays(whole)
    assert rows_of(cut) == rows_of(whole)


SAVING = """
import sys
from pathlib import Path
import jax
from tests.checkpoints.test_saving import *

def main(directory, steps):
    make = jax.jit(lambda: init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0))))
    with Checkpoints(directory, CONFIG.checkpoints, print) as checkpoints:
        restored = checkpoints.restore(jax.eval_shape(make))
        state = make() if restored is None else restored.state
        print("from", int(state.step), flush=True)
        while int(state.step) < steps:
            state = advance(state)
            save(checkpoints, state)
            print(int(state.step), flush=True)

main(Path(sys.argv[1]), int(sys.argv[2]))
"""


def test_killed_while_saving(tmp_path):
    """kill -9 in the middle of a save: nothing before it is lost, and the end is the same."""
    steps, from_ = 12, []
    fresh = jax.jit(lambda: init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0))))
    for kill_after in (3, 2, None):
        with subprocess.Popen(
            [sys.executable, "-c", SAVING, tmp_path, str(10**6 if kill_after else steps)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ) as program:
            lines = iter(program.stdout.readline, "")
            first = next(lines)
            assert first.startswith("from "), first  # no damaged step was reported
            from_.append(int(first.split()[1]))
            for _ in range(kill_after or steps):
                reached = int(next(lines, reached if kill_after is None else "0"))
            if kill_after:
                program.send_signal(signal.SIGKILL)
        assert program.returncode == (-signal.SIGKILL if kill_after else 0)
        if kill_after:  # all but the save that was under way
            assert numbers(tmp_path)[0] >= reached - 1
    assert from_[0] == 0 < from_[1] < from_[2]
    state = fresh()
    for _ in range(steps):
        state = advance(state)
    restored = open_(tmp_path).restore(jax.eval_shape(fresh))
    assert restored.step == steps and bits(restored.state) == bits(state)
    assert not list(tmp_path.glob("*tmp*"))


TOKENIZING = """
import sys
from pathlib import Path
from lsjax.config import DataConfig
from lsjax.data import pieces
from lsjax.data.pipeline import packed_rows
from lsjax.data.tokenizer_backends import ByteTokenizer
if __name__ == "__main__":
    pieces.SMALLEST_PIECE = 50_000
    config = DataConfig(source="text", paths=(sys.argv[1],), separator="|")
    options = dict(split="train", seq_len=64, cache=Path(sys.argv[2]), workers=2)
    packed_rows(config, ByteTokenizer(), **options)
"""


def test_killed_processes_leave_whole_shards_and_no_process(tmp_path):
    """kill -9 of the first process in the middle; its workers end, and the end is bit-equal."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("|".join(f"{n} " * 40 for n in range(5_000)))
    program = tmp_path / "program.py"
    program.write_text(TOKENIZING)

    def command(cache):
        return [sys.executable, program, corpus, tmp_path / cache]

    options = dict(cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first = subprocess.Popen(command("killed"), **options, start_new_session=True)
    while len(list((tmp_path / "killed").rglob("*.json"))) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert_group_ends(first.pid)
    assert not list((tmp_path / "killed").rglob(INDEX))
    for cache in ("killed", "whole"):
        subprocess.run(command(cache), **options, check=True)
    (one,), (other,) = ((tmp_path / cache / "tokens").iterdir() for cache in ("killed", "whole"))
    names = sorted(file.name for file in other.iterdir())
    assert names == sorted(f.name for f in one.iterdir() if not f.name.startswith(".partial"))
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
