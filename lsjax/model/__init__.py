"""Llama: the model, its kernels, its cache, and the table of its parameters."""
