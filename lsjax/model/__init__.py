"""Llama: the model, its cache, and how checkpoints become one."""
