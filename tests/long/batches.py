"""Batches of random tokens."""

import numpy as np


def whole_rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A batch whose rows are one document each, from [B, T+1] tokens."""
    rows, steps = tokens.shape[0], tokens.shape[1] - 1
    return dict(
        tokens_BT=tokens[:, :-1],
        labels_BT=tokens[:, 1:],
        segments_BT=np.ones((rows, steps), np.int32),
        positions_BT=np.broadcast_to(np.arange(steps, dtype=np.int32), (rows, steps)),
    )
