"""Trains a Llama with layer dropout and the early-exit loss, from scratch or from a checkpoint.

    python train.py --config configs/quickstart.py --workdir runs/quickstart
    python train.py --config configs/quickstart.py --workdir runs/b --optimizer.learning-rate 3e-3
    python decode.py --model runs/quickstart --prompt "import " --strategy self_speculative \\
        --exit-layer 4 --num-draft-tokens 4

Running the same command again resumes a stopped run. Fields of the configuration are flags:
`python train.py --config configs/quickstart.py --help` lists them.
"""

from lsjax.interrupts import keeps, run_program

if __name__ == "__main__":  # before the other imports, which take seconds
    run_program("lsjax.cli.train")

from collections.abc import Sequence

import lsjax
from lsjax.cli import training
from lsjax.cli.setup import keep_compiled_programs, keep_freed_memory, one_line_errors
from lsjax.cli.shown_run import shown_run
from lsjax.config import AnyPath, TrainConfig, check
from lsjax.terminal import SafeConsole
from lsjax.training.hosts import ending_together, is_first, start
from lsjax.training.run import Interrupted, TooManySkipped


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Returns 1 if training fails, or 128 + the number of a signal that stopped
    it. Bad input, another trainer on the run, and an unsaved last step exit with code 2."""
    with ending_together(), one_line_errors():
        flags = training.parse_config(training.TrainingFlags, argv, __doc__)
        check(flags.workdir is not None, "--workdir is missing: name the directory of the run")
        start(flags.distributed)
        return train(flags.fields, flags.workdir)


def train(config: TrainConfig, workdir: AnyPath) -> int:
    """Trains as configured, and prints the progress."""
    keeps("saved steps are kept, and the same command resumes after the newest")
    keep_freed_memory()
    keep_compiled_programs()
    console = SafeConsole(soft_wrap=True, quiet=not is_first())
    try:
        shown_run(config, workdir, console, began=lsjax.IMPORTED)
    except Interrupted as stopped:
        console.print(f"{stopped}: the same command resumes it")
        return 128 + stopped.number
    except TooManySkipped as failure:
        console.print(f"error: {failure}", style="bold red")
        return 1
    console.print(f"done: python decode.py --model {workdir} --prompt ...")
    return 0
