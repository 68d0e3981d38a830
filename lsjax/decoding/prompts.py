"""How prompts are read: in chunks of few sizes, and side by side if rows begin together."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from lsjax.decoding.request import Request
from lsjax.model.protocol import Cache

# A prompt is read in one chunk of the smallest size that fits, or in several of the largest.
PREFILL_CHUNKS = (32, 64, 128, 256, 512)
# Most tokens of a chunk of several prompts. Far fewer make computing take longer than reading the
# weights, so a larger chunk would only take more memory.
SIDE_BY_SIDE = 2048
TOGETHER = 4 * SIDE_BY_SIDE  # most tokens of prompts that a call reads, in a cache of their own
Admitted = dict[int, tuple[int, Request]]  # requests with their indices, by their rows


def chunk_size(unread: int, capacity: int) -> int:
    """Chunk size for reading `unread` tokens into a cache of `capacity` slots."""
    sizes = [size for size in PREFILL_CHUNKS if size <= capacity]
    return next((size for size in sizes if size >= unread), sizes[-1])


class Prompts(NamedTuple):
    """U different prompts of up to S tokens, and the rows of a batch that begin with them."""

    tokens_US: Int[Array, "U S"]
    length_U: Int[Array, " U"]
    source_B: Int[Array, " B"]  # which prompt a row begins with; -1: the row stays
    cache: Cache = None  # an empty one

    @classmethod
    def of(
        cls, requests: Mapping[int, Request], rows: int, capacity: int, multiple: int
    ) -> "Prompts":
        """Prompts of requests, by their rows of a batch with `capacity` slots. S is a power of two
        or the capacity. U is a power of two times `multiple`. So few programs are needed."""
        different = {tuple(one.prompt): 0 for one in requests.values()}
        number, longest = multiple, max(map(len, different))
        while number < len(different):
            number *= 2
        tokens_US = np.zeros((number, min(slots_of(longest), capacity)), np.int32)
        length_U = np.ones(number, np.int32)
        source_B = np.full(rows, -1, np.int32)
        for at, prompt in enumerate(different):
            tokens_US[at, : len(prompt)], length_U[at] = prompt, len(prompt)
            different[prompt] = at
        for row, request in requests.items():
            source_B[row] = different[tuple(request.prompt)]
        return cls(tokens_US, length_U, source_B)

    @property
    def chunk(self) -> int:
        """Positions of each prompt that are read at a time."""
        number, slots = self.tokens_US.shape
        return chunk_size(slots, max(PREFILL_CHUNKS[0], min(slots, SIDE_BY_SIDE // number)))


def slots_of(length: int) -> int:
    """Slots in which a prompt is read side by side with others: a power of two."""
    return max(PREFILL_CHUNKS[0], 1 << (length - 1).bit_length())


def side_by_side(taken: Admitted) -> Iterator[Admitted]:
    """Parts whose prompts one call reads: they have similar lengths, and TOGETHER tokens at most. A
    longer prompt is read by itself."""
    sizes: dict[int, dict[tuple[int, ...], Admitted]] = {}
    for row, given in taken.items():
        prompt = tuple(given[1].prompt)
        sizes.setdefault(slots_of(len(prompt)), {}).setdefault(prompt, {})[row] = given
    for size, of_prompts in sizes.items():
        own, most = [*of_prompts.values()], max(1, TOGETHER // size)
        for start in range(0, len(own), most):
            yield {row: given for one in own[start : start + most] for row, given in one.items()}
