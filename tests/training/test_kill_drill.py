"""What the kill drill finds to be different."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lsjax.model.llama import Llama
from lsjax.training.checkpoint import Checkpoints
from lsjax.training.step import init_state
from scripts.kill_drill import differences, newest
from tests.training.test_checkpoint import CONFIG


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Makes a run of one saved step; `change` may change a parameter."""
    state = jax.jit(lambda: init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0))))()

    def make(change=lambda norm: norm, rows_taken: int = 6):
        directory = tmp_path_factory.mktemp("run")
        leaves, structure = jax.tree.flatten(state)
        copy = jax.tree.unflatten(structure, leaves)
        copy.model.norm.scale = nnx.Param(change(copy.model.norm.scale[...]))
        with Checkpoints(directory / "checkpoints", CONFIG.checkpoints) as checkpoints:
            data = {"rows_taken": rows_taken}
            checkpoints.save(copy, step=3, config=CONFIG, data=data)
        row = {"kind": "step", "step": 3, "loss": 1.5, "seconds": directory.name}
        (directory / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return directory

    return make


def test_equal_runs(run):
    one, other = run(), run()
    assert newest(one) == 3
    assert list(differences(one, other)) == []


def test_differences(run):
    one = run()
    assert list(differences(one, run(lambda norm: norm.at[5].set(jnp.nextafter(1.0, 2.0))))) == [
        "params: norm differs"
    ]
    assert list(differences(one, run(rows_taken=8))) == [
        "the position in the data is {'rows_taken': 8}, not {'rows_taken': 6}"
    ]
    other = run()
    file = other / "metrics.jsonl"
    file.write_text(file.read_text().replace("1.5", "1.25"))
    (other / "checkpoints" / "2.damaged").mkdir()
    left, losses = differences(one, other)
    assert left.endswith("2.damaged was left: a step was damaged, or half of one stayed")
    assert losses == "the losses in metrics.jsonl differ"
    shutil.move(other / "checkpoints" / "3", other / "checkpoints" / "4")
    assert "the last step is 4, not 3" in list(differences(one, other))
