"""Trains a Llama with layer dropout and the early-exit loss (lsjax/cli/train.py)."""

from lsjax.interrupts import run_program

if __name__ == "__main__":
    run_program("lsjax.cli.train")
