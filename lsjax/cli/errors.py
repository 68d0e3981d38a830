"""How programs end after bad input: with one line and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lsjax.terminal import SafeConsole, shown_warnings, written_output

# Packages that reach buckets. Their errors tell of the network, of the bucket, or of its rights.
BUCKETS = ("gcsfs", "google", "aiohttp", "requests")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns bad input into one line on stderr and exit code 2, and Ctrl-C into exit code 130. Bad
    input is an OSError, or an error of this package or of a bucket. Bugs keep their traceback.

    If the reader of the output is gone, the program ends without a word, with exit code 141."""
    try:
        with shown_warnings(), written_output():
            yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in ("lsjax", *BUCKETS):
            raise
        console = SafeConsole(stderr=True, soft_wrap=True)
        console.print("error: ", style="bold red", end="")
        console.print(" ".join(str(error).split()))
        sys.exit(2)
