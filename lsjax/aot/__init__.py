"""Costs of programs for TPUs and GPUs, compiled on a machine without them."""
