"""How programs are compiled for users, where the tests would leave LLVM's passes out."""

# For `jax.jit` and `compile`: of programs that are looked at, or that compute for long.
OPTIMISED = {"xla_backend_optimization_level": 3}
