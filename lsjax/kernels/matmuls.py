"""Matrix products, and the rows and the order in which they are fast.

Gradients are those of the plain expressions, up to rounding. They have no forward-mode derivative.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lsjax.platforms import platform, tuning


def enough_steps(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
    """Appends zero steps, so that B * U is at least the platform's `layer_rows`."""
    batch, steps, _ = x_BTD.shape
    return with_steps(x_BTD, max(steps, -(-tuning().layer_rows // batch)))


def with_steps(x: Float[Array, "B T *rest"], steps: int) -> Float[Array, "B U *rest"]:
    """x with zero steps appended, up to `steps`."""
    more = steps - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


def enough_rows(x: Float[Array, "*batch R I"]) -> Float[Array, "*batch n I"]:
    """x as the left side of a matmul, with zero rows appended up to the platform's `left_rows`. The
    barrier keeps XLA from removing them."""
    missing = tuning().left_rows - x.shape[-2]
    if missing <= 0:
        return x
    return lax.optimization_barrier(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]))


def with_table(x_RD: Float[Array, "R D"], table_VD: Float[Array, "V D"]) -> Float[Array, "R V"]:
    """x @ table.T in float32 or wider: a head's logits of R rows.

    With the table as left operand, XLA:CPU reads it near memory bandwidth for one row, but not for
    a few. The sums of products are one loop that does (docs/performance.md). On a mesh, XLA would
    gather a sharded table for them.
    """
    wide = jnp.promote_types(x_RD.dtype, jnp.float32)
    is_sharded = jax.sharding.get_abstract_mesh().size > 1
    if 1 < len(x_RD) <= tuning().summed_rows and not is_sharded:
        return (table_VD.astype(wide) * x_RD[:, None].astype(wide)).sum(-1)
    return jnp.matmul(table_VD, enough_rows(x_RD).T, preferred_element_type=wide).T[: len(x_RD)]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*batch I"], w: Float[Array, "I *O"], may_recompute: bool = False
) -> Float[Array, "..."]:
    """tensordot(x, w, 1): [*batch, *O]. The gradient of w has the layout of w, [I, *O]; autodiff
    would transpose it in every layer. may_recompute: the backward pass under remat may compute the
    matmul again instead of keeping it. A batch axis of size 1 has this effect under
    dots_with_no_batch_dims_saveable."""
    return _linear_forward(x, w, may_recompute)[0]


def _linear_forward(x, w, may_recompute):
    if may_recompute and tuning().recomputes_projection:
        y = lax.dot_general(x[None], w[None], (((x.ndim,), (1,)), ((0,), (0,))))[0]
    else:
        y = jnp.tensordot(x, w, axes=1)
    return y, (x, w)


def _linear_backward(may_recompute, residuals, dy):
    x, w = residuals
    rows, outputs = tuple(range(x.ndim - 1)), w.ndim - 1
    over_outputs = tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(1, w.ndim))
    dx = lax.dot_general(dy, w, (over_outputs, ((), ())))
    dw = lax.dot_general(x, dy, ((rows, rows), ((), ())))
    return dx, dw


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def gradients_first(x: Any, parameters: Any) -> tuple[Any, Any]:
    """Returns both unchanged. With `parameters_first`, the gradients of the parameters are computed
    before that of x."""
    return x, parameters


def _gradients_first_backward(_, gradients):
    return lax.optimization_barrier(gradients) if tuning().parameters_first else gradients


gradients_first.defvjp(lambda *both: (both, None), _gradients_first_backward)


def in_order(first: Any, then: Any) -> tuple[Any, Any]:
    """Returns both unchanged. With `delays_head`, `then` is not read before `first` is computed."""
    return lax.optimization_barrier((first, then)) if tuning().delays_head else (first, then)


def computed_once(x: Any) -> Any:
    """x unchanged. Keeps XLA from computing it again in each of the matmuls that read it."""
    return lax.optimization_barrier(x) if tuning().keeps_logit_gradients else x


def default_dtype(own: DTypeLike) -> DTypeLike:
    """dtype of a computation: bfloat16 on accelerators, the model's own on CPUs."""
    return own if platform() == "cpu" else jnp.bfloat16


def splits_matrices() -> bool:
    """Whether training runs faster with a matrix for each part of qkv and gate_up."""
    return tuning().splits_matrices
