"""Saving a run and resuming it: what comes back, what stays, and every kind of damage."""

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lsjax.checkpoints import steps
from lsjax.checkpoints.saving import Checkpoints, in_units, wait_for_all
from lsjax.checkpoints.steps import orbax, saved_steps, sealed
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import CheckpointConfig, ConfigError, LlamaConfig, TrainConfig
from lsjax.model.llama import Llama
from lsjax.training.step import TrainState, init_state

CONFIG = TrainConfig(
    num_steps=100,
    batch_size=2,
    seq_len=8,
    model=LlamaConfig.tiny(num_layers=2),
    checkpoints=CheckpointConfig(keep_last=3, keep_best=1),
)


@partial(jax.jit, donate_argnums=0)
def advance(state: TrainState) -> TrainState:
    """Stands for a training step: changes every array, and takes the memory over."""

    def change(x):
        if x.ndim == 0:
            return x + 1
        noise = jnp.cos(jnp.arange(x.size, dtype=jnp.float32) ** 2 + state.step)
        return (x * 0.5 + noise.reshape(x.shape)).astype(x.dtype)

    return jax.tree.map(change, state)


@pytest.fixture(scope="module")
def fresh():
    """Makes the state before the first step, always the same."""
    return jax.jit(lambda: init_state(CONFIG, Llama(CONFIG.model, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def like(fresh):
    return jax.eval_shape(fresh)


def save(checkpoints: Checkpoints, state: TrainState) -> None:
    step = int(state.step)
    checkpoints.save(state, step=step, data={"rows_taken": 2 * step})


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def open_(
    directory: Path, report=lambda line: pytest.fail(line), losses=None, **changes
) -> Checkpoints:
    config = CheckpointConfig(**({"keep_last": 3, "keep_best": 1} | changes))
    return Checkpoints(directory, config, report, losses)


def numbers(directory: Path) -> list[int]:
    return [step.number for step in saved_steps(directory)]


@pytest.fixture(scope="module")
def saved(fresh, tmp_path_factory) -> tuple[Path, list[TrainState]]:
    """Steps 1, 2 and 3 on disk, and the same states in memory."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    state, states = fresh(), []
    with open_(directory) as checkpoints:
        for _ in range(3):
            state = advance(state)
            save(checkpoints, state)
            states.append(jax.device_get(state))
    return directory, states


@pytest.fixture(scope="module", autouse=True)
def dropped_readers_end_here():
    """And not in the tests of another file."""
    yield
    time.sleep(0.5)
    gc.collect()


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of the steps, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def test_nothing_saved_yet(tmp_path, like):
    assert open_(tmp_path / "checkpoints").restore(like) is None


def test_going_on_equals_not_stopping(fresh, like, tmp_path):
    """Saved while the next steps already take over the memory of what is saved."""
    state = fresh()
    with open_(tmp_path) as checkpoints:
        for step in range(1, 7):
            state = advance(state)
            if step == 3:
                save(checkpoints, state)
    undisturbed = bits(state)
    restored = open_(tmp_path).restore(like)
    assert (restored.step, restored.data) == (3, {"rows_taken": 6})
    state = restored.state
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for _ in range(3):
        state = advance(state)
    assert bits(state) == undisturbed


def test_dtypes_come_back(tmp_path):
    make = partial(Llama, CONFIG.model, dtype=jnp.bfloat16)
    state = jax.jit(lambda: init_state(CONFIG, make(rngs=nnx.Rngs(1))))()
    strange = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40] * 16, jnp.float32)
    state = dataclasses.replace(state, skipped=strange)
    with open_(tmp_path) as checkpoints:
        save(checkpoints, state)
    restored = open_(tmp_path).restore(jax.eval_shape(lambda: state)).state
    assert restored.model.dtype == jnp.bfloat16 and restored.skipped.dtype == jnp.float32
    assert bits(restored) == bits(state)


def test_the_last_and_the_best_stay(fresh, like, tmp_path):
    """A step's loss is known after it was saved."""
    state, losses = fresh(), {}
    with open_(tmp_path, losses=losses, keep_last=2) as checkpoints:
        for loss in (3.0, 1.0, None, None, 2.0, None):
            state = advance(state)
            save(checkpoints, state)
            save(checkpoints, state)  # once is enough
            if loss is not None:
                losses[int(state.step)] = loss
        checkpoints.wait()
        assert numbers(tmp_path) == [6, 5, 2]
    with open_(tmp_path, losses=losses, keep_last=1, keep_best=2) as checkpoints:
        checkpoints.restore(like)
        save(checkpoints, advance(state))
    assert numbers(tmp_path) == [7, 5, 2]


def largest(directory: Path) -> Path:
    """The file with the most numbers in it, those of several arrays."""
    return max(directory.glob("ocdbt*/d/*"), key=lambda file: file.stat().st_size)


def zero_a_page(step: Path, item: str = "params") -> None:
    with largest(step / item).open("r+b") as file:
        file.seek(file.seek(0, os.SEEK_END) // 2)
        file.write(bytes(4096))


def truncate(step: Path) -> None:
    os.truncate(largest(step / "params"), 10_000)


def empty_manifest(step: Path) -> None:
    (step / "params" / "manifest.ocdbt").write_bytes(b"")


def change_meta(step: Path) -> None:
    file = step / "meta" / "metadata"
    file.write_text(file.read_text().replace('"rows_taken": 6', '"rows_taken": 8'))


def cut_meta(step: Path) -> None:
    os.truncate(step / "meta" / "metadata", 100)


def make_empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "zeroed page": (
        zero_a_page,
        r'params: (cannot be read \(.*"[a-z_.]+/|[a-z_.]+ has changed since)',
    ),
    "zeroed page of the optimizer": (
        partial(zero_a_page, item="train"),
        r'train: (cannot be read \(.*"opt_state\.|opt_state\.[0-9a-z_.]+ has changed since)',
    ),
    "truncated file": (truncate, r'params: cannot be read \(.*"[a-z_.]+/'),
    "no params": (
        lambda step: shutil.rmtree(step / "params"),
        r"params: .*\(is missing",
    ),
    "no optimizer state": (
        lambda step: shutil.rmtree(step / "train"),
        r"train: .*\(is missing",
    ),
    "no meta": (lambda step: shutil.rmtree(step / "meta"), r"meta: cannot be read \(is missing"),
    "empty manifest": (empty_manifest, r"params: cannot be read \("),
    "changed meta": (change_meta, r"meta: cannot be read \(it has changed since it was saved"),
    "cut meta": (cut_meta, r"meta: cannot be read \("),
    "empty step": (make_empty, r"meta: cannot be read \(is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_step_before_is_used(damage, copy, saved, like):
    do, expected = DAMAGES[damage]
    do(copy / "3")
    lines: list[str] = []
    with open_(copy, lines.append) as checkpoints:
        restored = checkpoints.restore(like)
        (line,) = lines
        assert line.startswith("step 3 is damaged and skipped: ") and "\n" not in line
        assert re.search(expected, line), line
        assert restored.step == 2 and restored.data == {"rows_taken": 4}
        assert bits(restored.state) == bits(saved[1][1])
        assert (copy / "3.damaged").is_dir() and numbers(copy) == [2, 1]


def test_a_damaged_step_is_saved_once_more(copy, saved, like):
    truncate(copy / "3")
    with open_(copy, [].append) as checkpoints:
        save(checkpoints, advance(checkpoints.restore(like).state))
    again = open_(copy).restore(like)
    assert again.step == 3 and bits(again.state) == bits(saved[1][2])


def test_one_wrong_bit_in_an_array(copy, like, monkeypatch):
    """What storage hands back without a word: the fingerprint names the array."""

    read = steps._read_arrays

    def flipped(path, targets):
        arrays = read(path, targets)
        if path == copy / "3" / "params":
            table = np.array(arrays["layers.feed_forward.down.kernel"])
            table.view(np.uint32)[1, 100, 3] ^= 1
            arrays["layers.feed_forward.down.kernel"] = jnp.asarray(table)
        return arrays

    monkeypatch.setattr(steps, "_read_arrays", flipped)
    lines: list[str] = []
    assert open_(copy, lines.append).restore(like).step == 2
    assert re.search(
        r"3/params: layers\.feed_forward\.down\.kernel has changed since it was saved \(its",
        lines[0],
    )


def test_several_damaged_steps(copy, like, saved):
    zero_a_page(copy / "3")
    make_empty(copy / "2")
    (copy / "4.orbax-checkpoint-tmp").mkdir()  # what a killed save leaves
    lines: list[str] = []
    restored = open_(copy, lines.append).restore(like)
    assert restored.step == 1 and bits(restored.state) == bits(saved[1][0])
    assert [line.split(" is damaged")[0] for line in lines] == ["step 3", "step 2"]


def test_nothing_is_begun_anew_over_damaged_steps(copy, like):
    for step in copy.iterdir():
        make_empty(step)
    with pytest.raises(CheckpointError, match="none of the 3 saved steps can be read; the last"):
        open_(copy, lambda line: None).restore(like)
    assert numbers(copy) == [3, 2, 1]


def test_another_shape_is_no_damage(copy, like):
    config = LlamaConfig.tiny(num_layers=3)
    other = jax.eval_shape(lambda: init_state(CONFIG, Llama(config, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError) as error:
        open_(copy).restore(other)
    assert re.search(
        r"params: layers\.[a-z_.]+ is float32\[2, 64.*\], but the config expects float32\[3, 64",
        str(error.value),
    )
    tied = LlamaConfig.tiny(num_layers=2, tie_embeddings=True)
    other = jax.eval_shape(lambda: init_state(CONFIG, Llama(tied, rngs=nnx.Rngs(0))))
    with pytest.raises(CheckpointError, match="params: head is .* config expects no such array"):
        open_(copy).restore(other)
    assert numbers(copy) == [3, 2, 1]


@pytest.mark.parametrize("version", [99, 2])
def test_another_version_is_no_damage(version, copy, like):
    file = copy / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())["meta"]
    file.write_text(json.dumps(sealed(meta | {"version": version})))
    message = f"3/meta: version is {version}, but this lsjax reads 3: convert the run with the"
    with pytest.raises(ConfigError, match=message):
        open_(copy).restore(like)
    assert numbers(copy) == [3, 2, 1]


def test_readers_that_orbax_drops_are_not_logged(caplog):
    """Their errors come whenever Python collects them. Those of others are logged."""
    orbax()
    log = logging.getLogger("asyncio")
    log.error("future exception was never retrieved: TensorStore({'driver': 'ocdbt'})")
    log.error("future exception was never retrieved: another")
    assert [record.getMessage()[-7:] for record in caplog.records] == ["another"]


def test_what_can_not_be_written_is_said_and_the_next_step_is_saved(
    fresh, like, tmp_path, full_disk, capfd, caplog
):
    lines: list[str] = []
    with open_(tmp_path, lines.append) as checkpoints:
        state = advance(fresh())
        with full_disk(20_000):
            save(checkpoints, state)
            state = advance(state)
            save(checkpoints, state)
            with pytest.raises(CheckpointError) as error:
                checkpoints.wait()
        (line,) = lines
        size = in_units(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        for step, said, then in (
            (1, line, "; the run continues"),
            (2, str(error.value), ", then run the same command again, which begins with the first"),
        ):
            assert re.fullmatch(
                rf"step {step} could not be saved: it needs {size} in {tmp_path}, where [\d.]+ GB "
                rf"are free: make room there and check that it is writable{then}.*File too large.*",
                said,
            )
        state = advance(state)
        save(checkpoints, state)
    assert numbers(tmp_path) == [3]
    assert bits(open_(tmp_path).restore(like).state) == bits(state)
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_a_run_does_not_end_well_without_its_last_step(fresh, tmp_path, full_disk):
    """The error names the step that is saved; an older step stays until the new one is saved."""
    unsaved = pytest.raises(CheckpointError, match="step 2 could .*which resumes after step 1 ")
    with unsaved, open_(tmp_path, keep_last=1) as checkpoints:
        save(checkpoints, advance(fresh()))
        checkpoints.wait()
        with full_disk(20_000):
            save(checkpoints, advance(advance(fresh())))
            checkpoints.wait()
    assert numbers(tmp_path) == [1]
    unsaved = pytest.raises(CheckpointError, match="step 2 could .*which resumes after step 1 ")
    with full_disk(20_000), unsaved, open_(tmp_path, keep_last=1) as checkpoints:
        save(checkpoints, advance(advance(fresh())))


def test_a_process_whose_save_failed_does_not_wait_for_the_others(monkeypatch):
    """A thread of orbax waits in `finally`. The main thread may run in an `except` of the user."""
    waits, errors = [], []
    monkeypatch.setattr(
        steps.orbax().multihost, "get_barrier_sync_fn", lambda: lambda **how: waits.append(how)
    )

    def fail():
        try:
            try:
                raise OSError("no room")
            finally:
                wait_for_all(key="failed", timeout_ms=1)
        except OSError as error:
            errors.append(str(error))

    for target in (partial(wait_for_all, key="saved", timeout_ms=2), fail):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert waits == [dict(key="saved", timeout_ms=2)] and errors == ["no room"]
    fail()
    assert waits[1:] == [dict(key="failed", timeout_ms=1)]


def test_units():
    assert [in_units(size) for size in (0, 999, 1000, 1_550_000, 7 * 10**15)] == [
        "0.0 bytes",
        "999.0 bytes",
        "1.0 kB",
        "1.6 MB",
        "7000.0 TB",
    ]


def test_the_directory_itself_can_not_be_written(fresh, tmp_path):
    """What fails at once is like what fails in the background."""
    (tmp_path / "checkpoints").write_text("no directory")
    unsaved = pytest.raises(CheckpointError, match="step 1 could not be saved")
    with unsaved, open_(tmp_path / "checkpoints") as checkpoints:
        save(checkpoints, advance(fresh()))


def test_a_state_of_version_0_1_is_read(fresh, like, tmp_path):
    """Its AdamW had no clipping and no schedule. The schedule has counted the steps of the run."""
    state = dataclasses.replace(advance(fresh()), step=jnp.int32(7))
    adam = state.opt_state[1]
    before = dataclasses.replace(state, opt_state=(adam, optax.EmptyState()))
    with open_(tmp_path) as checkpoints:
        save(checkpoints, before)
    with open_(tmp_path) as checkpoints:
        found = checkpoints.restore(like).state
    assert bits(found.opt_state[1]) == bits(adam) and bits(found.model) == bits(before.model)
    assert found.opt_state[3].count == found.step == 7
    advance(found)  # takes all of its arrays over
