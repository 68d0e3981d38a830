"""Self-speculation that chooses its drafts: source and length are chosen anew in each round.

A round drafts with an exit, looks drafts up in the text (`look_up`), or drafts nothing. Without
drafts it is an autoregressive step. It takes the choice with the most expected tokens per second:

    expected tokens   from counts of what the full model accepted lately. An exit whose drafts pass
                      with probability a gives 1 + a + ... + a^d tokens. A lookup passes with a
                      probability that grows with the number of matching tokens.
    seconds           measured for each choice on this machine (measure.py)

A draft of an exit then ends where further tokens cost more seconds than they are worth. Their
chance to pass depends on the exit's top probability, again by counts. Often nothing is drafted.

A text begins with how often each exit was right in training, if the model's files say so. A greedy
text begins with what was learned in the last one instead. A sampled one does not: the same seed
gives the same text, whatever was decoded before. Rows of a batch draft together, so they share what
they learn.

Exits that did not draft are scored too, in every fourth round or less often. A round computes their
hidden states anyway. Lookups are scored in every round. All of this is part of the compiled loop.
The choice depends only on earlier rounds, so that sampling stays exact.

A choice costs time. If one was to draft nothing (`Choice.is_idle`), the loop of rounds ends
(`Adaptive.wants_another`). The host then runs another program, which decodes autoregressively
(`Adaptive.pause`), and returns to the loop. It appends 4 tokens, or after several such choices
twice as many each time, up to 32.
"""
