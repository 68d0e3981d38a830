"""Evaluation: what a model gives at every exit, and whether strategies agree."""
