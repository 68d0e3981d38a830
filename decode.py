"""Continues prompts with a Llama (lsjax/cli/decode.py)."""

from lsjax.interrupts import run_program

if __name__ == "__main__":
    run_program("lsjax.cli.decode")
