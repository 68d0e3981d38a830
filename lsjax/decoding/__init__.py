"""Decoding: autoregressive, early exit and self-speculative, each one jitted while-loop."""
