"""Branches that run only if needed.

Each is a while loop of at most one trip, because XLA copies the cache around a `cond` on GPUs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from lsjax.decoding.draft import Draft, Places
from lsjax.decoding.scopes import guard_of_length


def at_shortest_length(
    lengths: tuple[int, ...], draft: Draft, places: Places, verify: Callable[[Draft, Places], Any]
) -> Any:
    """`verify(draft, places)` on the columns of the shortest length that holds all drafts.

    The result has a field `cache`; other arrays are padded to all columns.
    """
    if len(lengths) == 1:
        return verify(draft, places)
    longest = draft.count_B.max()
    whole = jax.eval_shape(verify, draft, places)
    found = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), whole)
    found = replace(found, cache=draft.state.cache)

    def first_columns(length: int, found: Any) -> Any:
        some = jax.tree.map(lambda leaf: leaf[:, : 1 + length], places)
        one = verify(draft.with_cache(found.cache).first(1 + length), some)
        return jax.tree.map(_padded, one, whole)

    for shorter, length in pairwise((-1, *lengths)):
        fits = (shorter < longest) & (longest <= length)
        found = run_if(guard_of_length(length), fits, partial(first_columns, length), found)
    return found


def _padded(leaf: Array, whole: jax.ShapeDtypeStruct) -> Array:
    """With zeros at the end of each axis, up to the shape."""
    sizes = zip(leaf.shape, whole.shape, strict=True)
    return jnp.pad(leaf, [(0, size - own) for own, size in sizes])


def run_if(name: str, condition: Bool[Array, ""], run: Callable[[Any], Any], carry: Any) -> Any:
    """`run(carry)` if the condition holds, else the carry. name: in compiled programs."""

    def once(state):
        return jnp.zeros((), bool), run(state[1])

    with jax.named_scope(name):
        return lax.while_loop(lambda state: state[0], once, (condition, carry))[1]
