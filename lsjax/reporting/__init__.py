"""Reports: whether LayerSkip pays for a model, a text and a budget, with the evidence."""
