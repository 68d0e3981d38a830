"""Trains a Llama with layer dropout and the early-exit loss, from scratch or from a checkpoint."""

from functools import partial

import lsjax
from lsjax.cli.errors import one_line_errors
from lsjax.cli.flags.train import Arguments
from lsjax.cli.setup import keep_compiled_programs, keep_freed_memory
from lsjax.cli.shown_run import PICTURES, shown_run, to_its_end
from lsjax.config import check
from lsjax.interrupts import keeps
from lsjax.terminal import SafeConsole
from lsjax.training.hosts import ending_together, is_first, start


def train(arguments: Arguments) -> int:
    """Trains as configured. Returns 1 if training fails, or 128 + the number of a signal that
    stopped it. Bad input, another trainer on the run, and an unsaved last step exit with code 2."""
    with ending_together(), one_line_errors():
        workdir = arguments.workdir
        check(workdir is not None, "--workdir is missing: name the directory of the run")
        start(arguments.distributed)
        keeps("saved steps are kept, and the same command resumes after the newest")
        keep_freed_memory()
        keep_compiled_programs()
        console = SafeConsole(soft_wrap=True, quiet=not is_first())
        given = arguments.fields, workdir, console
        code = to_its_end(partial(shown_run, *given, began=lsjax.IMPORTED), console)
        if code:
            return code
        drawn = [str(workdir / name) for name in PICTURES if (workdir / name).exists()]
        if drawn:
            console.print(f"pictures: {', '.join(drawn)}")
        console.print(f"done: python decode.py --model {workdir} --prompt ...")
        return 0
