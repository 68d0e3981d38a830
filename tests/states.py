"""States of decoding, made from a shape alone."""

from collections.abc import Sequence
from typing import Any

from jax.typing import DTypeLike

from lsjax.config import LlamaConfig
from lsjax.decoding.request import Request
from lsjax.decoding.state import DecodeState
from lsjax.model.cache import KVCache


def new_state(
    config: LlamaConfig,
    requests: Sequence[Request],
    *,
    capacity: int,
    num_layers: int,
    dtype: DTypeLike,
    **options: Any,
) -> DecodeState:
    """Rows of requests with an empty cache. options: as for `DecodeState.create`."""
    cache = KVCache.create(config, len(requests), capacity, dtype, num_layers)
    return DecodeState.create(requests, cache=cache, capacity=capacity, **options)
