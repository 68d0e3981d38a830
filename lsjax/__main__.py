"""`python -m lsjax` is the command `lsjax`."""

from lsjax.interrupts import command

if __name__ == "__main__":
    command()
