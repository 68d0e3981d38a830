"""What programs accept. Nothing here imports jax, so that help appears at once."""
