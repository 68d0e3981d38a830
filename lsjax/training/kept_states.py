"""States of a frozen model, computed once and kept on disk, so that exit blocks train without it.

A record belongs to a row of tokens. It holds the states after each exit with a block, and the most
probable tokens of the last exit, with their log-probabilities. Others count as impossible. The
files are in the cache, named by a hash of all that they depend on. A killed program resumes with
the files that are missing.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from rich.progress import Progress

from lsjax.config import AnyPath, StepConfig, check
from lsjax.data.pipeline import Pipeline
from lsjax.data.records import Records
from lsjax.io.files import write_whole
from lsjax.model.exit_blocks import block_exits
from lsjax.model.llama import Llama
from lsjax.model.matrices import cast_matrices
from lsjax.platforms import with_kernels
from lsjax.sharding import context_shards
from lsjax.terminal import SafeConsole
from lsjax.training.block_loss import drafting_head, frozen_states

FORMAT = 1  # raise it if the same settings make other records
LIKELY = 32  # K: tokens of a position
FIELDS = ("exit_states_BETD", "likely_ids_BTK", "likely_log_probs_BTK")  # of a record, and a batch
FILE_BYTES = 1 << 26  # of a file, about
POSITIONS = 256  # that pass through the head together


def keep_states(
    config: StepConfig,
    pipeline: Pipeline,
    model: Llama,
    base: str,
    draft_ids_W: Int[np.ndarray, " W"] | None,
    *,
    place: Callable[[Mapping[str, np.ndarray]], dict[str, Array]],
    cache: AnyPath,
    say: Callable[[str], None],
) -> None:
    """Adds the model's states to the batches of the pipeline; computes missing ones first.

    base: fingerprint of the model. place: puts a batch on its devices. Raises ConfigError for a run
    of several processes, and for rows whose positions are sharded.
    """
    check(
        jax.process_count() == 1 and context_shards() == 1,
        "exit_blocks.keep_states needs one process and mesh.context 1: choose these, or leave it "
        "out",
    )
    rows, compute = pipeline.rows, jax.jit(partial(states_and_tokens, config))
    padding = place(rows.read(np.full(pipeline.batch_size, -1)))
    shapes = jax.eval_shape(compute, model, padding, draft_ids_W)
    layout = np.dtype(
        [(name, array.dtype, array.shape[1:]) for name, array in zip(FIELDS, shapes, strict=True)]
    )
    drafted = None if draft_ids_W is None else draft_ids_W.tolist()
    known = FORMAT, rows.fingerprint, base, block_exits(model), f"{layout}", drafted
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    each, total = max(1, FILE_BYTES // layout.itemsize), len(rows)
    sizes = np.array([min(each, total - first) for first in range(0, total, each)])
    records = Records(cache / "states" / name, "states", layout, sizes)
    whole = [int(size) * layout.itemsize for size in sizes]
    missing = [number for number, size in enumerate(whole) if size_of(records.file(number)) != size]
    if missing:
        gigabytes = total * layout.itemsize / 1e9
        say(f"computes states of {total} rows once: {gigabytes:.2f} GB in {records.directory}")
        records.directory.mkdir(parents=True, exist_ok=True)

    def make(number: int) -> bytes:
        found = np.empty(sizes[number], layout)
        for begin in range(0, len(found), pipeline.batch_size):
            part = found[begin : begin + pipeline.batch_size]
            asked = np.full(pipeline.batch_size, -1)  # rows of padding at the end
            asked[: len(part)] = number * each + begin + np.arange(len(part))
            arrays = compute(model, place(rows.read(asked)), draft_ids_W)
            for field, array in zip(FIELDS, arrays, strict=True):
                part[field] = np.asarray(array)[: len(part)]
        return found.tobytes()

    notes = SafeConsole(stderr=True)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        for number in progress.track(missing, description="states of the exits"):
            write_whole(records.file(number), make(number))
    pipeline.beside(partial(read_states, records))


def size_of(file: AnyPath) -> int | None:
    """Bytes of a file, or None without one."""
    return file.stat().st_size if file.exists() else None


def read_states(records: Records, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """What a batch needs of these rows, instead of the model's layers."""
    kept = records.read(numbers)
    return {name: kept[name] for name in FIELDS}


def states_and_tokens(
    config: StepConfig,
    model: Llama,
    batch: dict[str, Array],
    draft_ids_W: Int[Array, " W"] | None,
) -> tuple[Float[Array, "B E T D"], Int[Array, "B T K"], Float[Array, "B T K"]]:
    """States after the exits, and the last exit's most probable tokens with their logs. Ids are
    indices in the draft vocabulary, if there is one."""
    with with_kernels(config.kernels):
        model = cast_matrices(model, config.dtype)
        *before, final_BTD = frozen_states(config, model, batch)
        head = drafting_head(model, draft_ids_W)
        wide = jnp.promote_types(final_BTD.dtype, jnp.float32)

        def likely(x_D: Float[Array, " D"]) -> tuple[Float[Array, " K"], Int[Array, " K"]]:
            table_WD = head.table_VD.astype(x_D.dtype)
            logits_W = jnp.einsum("D,WD->W", head.norm(x_D), table_WD, preferred_element_type=wide)
            log_probs_W = jax.nn.log_softmax(logits_W).astype(jnp.float32)
            return lax.top_k(log_probs_W, min(LIKELY, len(log_probs_W)))

        flat_ND = final_BTD.reshape(-1, final_BTD.shape[-1])
        log_probs_NK, ids_NK = lax.map(likely, flat_ND, batch_size=POSITIONS)
        shape = *final_BTD.shape[:2], -1
        return jnp.stack(before, 1), ids_NK.reshape(shape), log_probs_NK.reshape(shape)
