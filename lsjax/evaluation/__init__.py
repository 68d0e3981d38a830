"""Evaluation: scores of every exit, tasks, and comparisons of strategies."""
