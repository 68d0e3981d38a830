"""Decoding: autoregressive, early exit and self-speculative, each in one jitted while-loop."""
