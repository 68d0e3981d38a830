"""A model of five layers, a packed batch, and the objective compiled for a config."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsjax.config import LlamaConfig, StepConfig
from lsjax.model.llama import Llama, stacked
from lsjax.training.loss import objective

LAYERS, VOCAB = 5, 23


@pytest.fixture(scope="session")
def small() -> Llama:
    """Stacked, float32."""
    config = LlamaConfig.tiny(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        head_dim=4,
        init_std=0.3,
    )
    return jax.jit(lambda: stacked(Llama(config, rngs=nnx.Rngs(3))))()


@pytest.fixture
def wide(small):
    """float64, and the same model in it."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda leaf: leaf.astype(jnp.float64), small)


@pytest.fixture(scope="session")
def packed() -> dict[str, np.ndarray]:
    """Rows of nine tokens: two documents, a prompt without labels, padding, an empty row."""
    rng = np.random.default_rng(5)
    segments = np.array([[1] * 4 + [2] * 5, [1] * 7 + [0] * 2, [0] * 9, [1] * 1 + [2] * 8])
    positions = np.array([[*range(4), *range(5)], [*range(7), 0, 0], [0] * 9, [0, *range(8)]])
    tokens = rng.integers(0, VOCAB, segments.shape) * (segments > 0)
    labels = np.roll(tokens, -1, axis=1)
    same = (segments == np.roll(segments, -1, axis=1)) & (segments > 0)
    same[:, -1] = False
    labels = np.where(same, labels, -1)
    labels[0, 4:6] = -1  # the prompt of the second document
    labels[0, -1] = 7  # a document that continues in another row
    batch = dict(tokens_BT=tokens, labels_BT=labels, segments_BT=segments, positions_BT=positions)
    return {name: array.astype(np.int32) for name, array in batch.items()}


@pytest.fixture(scope="session")
def evaluate():
    """(config, model, batch, step) -> (loss, sums_L), gradients; of a whole batch."""

    @partial(jax.jit, static_argnums=0)
    def run(config: StepConfig, model, batch, step=0):
        rows_B = jnp.arange(len(batch["tokens_BT"]))
        num_labels = (batch["labels_BT"] >= 0).sum()
        differentiated = jax.value_and_grad(partial(objective, config), has_aux=True)
        return differentiated(model, batch, step, rows_B, num_labels)

    return run
