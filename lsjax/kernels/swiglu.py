"""SwiGLU (Shazeer, 2020) with a backward pass that keeps its input only.

Its gradients are those of the plain expression, up to rounding. They have no forward-mode
derivative.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lsjax.platforms import tuning


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*batch 2 F"] | tuple[Array, Array]) -> Float[Array, "*batch F"]:
    """silu(gate) * up (Shazeer, 2020); gate and up as one array, or apart (`split_matrices`). Keeps
    only its input for the backward pass, and writes the gradient once. If they are apart, barriers
    keep XLA from fusing it into matmuls, which would be slower on TPUs."""
    gate, up = _halves(gate_up)
    y = jax.nn.silu(gate) * up
    return lax.optimization_barrier(y) if isinstance(gate_up, tuple) else y


def _halves(gate_up):
    return gate_up if isinstance(gate_up, tuple) else (gate_up[..., 0, :], gate_up[..., 1, :])


def _swiglu_backward(gate_up, dy):
    gate, up = _halves(gate_up)
    apart = isinstance(gate_up, tuple)
    dy = lax.optimization_barrier(dy) if apart else dy
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    dgate, dup = dy * up * (sigmoid + silu * (1 - sigmoid)), dy * silu
    if apart:
        return (lax.optimization_barrier((dgate, dup)),)
    if tuning().stacks_gradients:
        return (jnp.stack([dgate, dup], -2),)
    is_gate = jnp.arange(2)[:, None] == 0
    return (jnp.where(is_gate, dgate[..., None, :], dup[..., None, :]),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)
