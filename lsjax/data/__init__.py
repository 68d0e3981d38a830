"""Text to batches: tokenizers, chat templates, sources and the input pipeline."""
