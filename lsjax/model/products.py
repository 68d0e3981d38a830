"""Operations with backward passes of their own, where autodiff makes slower or larger ones.

Each gives the same values and gradients as the plain expression in its docstring, up to rounding;
docs/performance.md has what they save. They have no forward-mode derivative.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsjax.sharding import platform

# Fewest rows for which XLA uses the matrix unit well (docs/performance.md).
ROWS = {"tpu": 8, "gpu": 16}
# Tokens of a block of flash.py, which divides its sequences.
FLASH_BLOCK = 128
# Name of the residuals of splash and flash, for remat policies.
SAVED = "attention"


def enough_steps(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B U D"]:
    """On accelerators adds zeros behind the steps, so that B * U is at least ROWS."""
    batch, steps, _ = x_BTD.shape
    return with_steps(x_BTD, max(steps, -(-ROWS.get(platform(), 0) // batch)))


def with_steps(x: Float[Array, "B T *rest"], steps: int) -> Float[Array, "B U *rest"]:
    """x with zeros behind its steps, up to so many."""
    more = steps - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) if more else x


def enough_rows(x: Float[Array, "*batch R I"]) -> Float[Array, "*batch S I"]:
    """x as the left side of a product: on TPUs with zeros behind its rows up to ROWS. The barrier
    keeps XLA from dropping them."""
    missing = ROWS["tpu"] - x.shape[-2]
    if platform() != "tpu" or missing <= 0:
        return x
    return lax.optimization_barrier(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(
    x: Float[Array, "*batch I"], w: Float[Array, "I *O"], again: bool = False
) -> Float[Array, "..."]:
    """tensordot(x, w, 1): [*batch, *O].

    The gradient of w has the layout of w, [I, *O]; autodiff would transpose it in every layer.

    again: a layer under remat computes the product once more and does not keep it. A batch axis of
    1 tells the policy dots_with_no_batch_dims_saveable.
    """
    return _linear_forward(x, w, again)[0]


def _linear_forward(x, w, again):
    if again:
        y = lax.dot_general(x[None], w[None], (((x.ndim,), (1,)), ((0,), (0,))))[0]
    else:
        y = jnp.tensordot(x, w, axes=1)
    return y, (x, w)


def _linear_backward(again, residuals, dy):
    x, w = residuals
    rows, outputs = tuple(range(x.ndim - 1)), w.ndim - 1
    over_outputs = tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(1, w.ndim))
    dx = lax.dot_general(dy, w, (over_outputs, ((), ())))
    dw = lax.dot_general(x, dy, ((rows, rows), ((), ())))
    return dx, dw


linear.defvjp(_linear_forward, _linear_backward)


def gradients_first(x: Any, parameters: Any) -> tuple[Any, Any]:
    """Returns both unchanged. On GPUs the gradients of the parameters are computed before that of
    x: XLA would compute them at the end of a layer, and hold their operands until then."""
    return _gradients_first(x, parameters) if platform() == "gpu" else (x, parameters)


@jax.custom_vjp
def _gradients_first(x, parameters):
    return x, parameters


_gradients_first.defvjp(
    lambda *both: (both, None), lambda _, gradients: lax.optimization_barrier(gradients)
)


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*batch 2 F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up (Shazeer, 2020).

    Keeps only its input for the backward pass, and writes the gradient once.
    """
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _swiglu_forward(gate_up):
    return swiglu(gate_up), gate_up


def _swiglu_backward(gate_up, dy):
    dgate, dup = _halves_of_gradient(gate_up[..., 0, :], gate_up[..., 1, :], dy)
    if platform() == "gpu":  # for a choice XLA:GPU would write both halves first
        return (jnp.stack([dgate, dup], -2),)
    # As a choice for each element: XLA:CPU joins arrays on one thread.
    is_gate = jnp.arange(2)[:, None] == 0
    return (jnp.where(is_gate, dgate[..., None, :], dup[..., None, :]),)


def _halves_of_gradient(gate, up, dy):
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return dgate, dy * silu


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def split_swiglu(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]
) -> Float[Array, "*batch F"]:
    """`swiglu` of separate halves, for TPUs (`split_matrices`).

    Barriers keep XLA:TPU from fusing it into the products around it, which slows them down.
    """
    return _split_swiglu_forward(gate, up)[0]


def _split_swiglu_forward(gate, up):
    return lax.optimization_barrier(jax.nn.silu(gate) * up), (gate, up)


def _split_swiglu_backward(halves, dy):
    dhalves = _halves_of_gradient(*halves, lax.optimization_barrier(dy))
    return lax.optimization_barrier(dhalves)


split_swiglu.defvjp(_split_swiglu_forward, _split_swiglu_backward)
