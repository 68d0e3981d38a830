"""Continues prompts with a Llama: `lsjax decode` in a checkout."""

from lsjax.interrupts import command

if __name__ == "__main__":
    command("decode")
