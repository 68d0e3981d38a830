"""Training: layer dropout, the early-exit loss, and the step that they are part of."""
