"""Trains a Llama with layer dropout and the early-exit loss: `lsjax train` in a checkout."""

from lsjax.interrupts import command

if __name__ == "__main__":
    command("train")
