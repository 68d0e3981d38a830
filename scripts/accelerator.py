"""A day with an accelerator: checks and measures on the device that jax finds.

    python scripts/accelerator.py --stage a b --output build/accelerator
    python scripts/accelerator.py --stage all

    a      all strategies against autoregressive decoding, in float32 and in bfloat16
    b, b8  decoding of a 1B and of an 8B shape, on GPUs also by other uses of command buffers
    c      training steps of a 1B shape
    d      the quickstart's configuration; the only one that needs all that lsjax depends on
    page   writes docs/accelerators.md from what the others have found on accelerators
    all    all of these, one after the other

A stage writes a JSON file and takes --minutes at most. Each of its parts runs in a process of its
own; one that fails says so in a line, and the others go on. Exit code 1 if anything failed.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from accelerator_stages.results import PartResults, read, write_page  # noqa: E402

# Module and function of each stage, and its parts.
STAGES = {
    "a": ("decoding", "run_equality", ("float32", "bfloat16")),
    "b": ("decoding", "run_speed", ("1b", "1b-off", "1b-loops")),
    "b8": ("decoding", "run_speed", ("8b", "8b-off", "8b-loops")),
    "c": ("training", "run_steps", ("plain", "layerskip", "dropout-mask", "dropout-gather")),
    "d": ("training", "run_quickstart", ("quickstart",)),
}
FLAGS = {  # of GPUs: no command buffers, and loops and branches in them too
    "off": "--xla_gpu_enable_command_buffer=",
    "loops": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; 1 if anything failed."""
    arguments = parse(argv)
    failed = False
    for stage in arguments.stage:
        if stage == "page":
            good = write_page(arguments.output, ROOT / "docs")
        else:
            good = (run_parts if arguments.part else run_stage)(stage, arguments)
        if not good:
            failed = True
            print(f"stage {stage}: FAILED", flush=True)
    return int(failed)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "page", "all"], required=True)
    parser.add_argument("--part", nargs="+", help="runs these parts alone, in this process")
    parser.add_argument("--output", type=Path, default=Path("build/accelerator"))
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of each stage")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try it on CPUs")
    arguments = parser.parse_args(argv)
    if "all" in arguments.stage:
        arguments.stage = [*STAGES, "page"]
    if arguments.part and len(arguments.stage) > 1:
        parser.error("--part needs one stage")
    *_, known = STAGES.get(arguments.stage[0], [()])
    for part in arguments.part or ():
        if part not in known:
            parser.error(f"stage {arguments.stage[0]} has no part {part}: use {', '.join(known)}")
    return arguments


def run_stage(stage: str, arguments: argparse.Namespace) -> bool:
    """Starts a process for each part, for as long as there is time."""
    deadline, good = time.monotonic() + 60 * arguments.minutes, True
    *_, parts = STAGES[stage]
    for part in parts:
        first = read(arguments.output, stage).get(parts[0], {})
        if flags_of(part) and first.get("platform") != "gpu":
            print(f"{stage} {part}: left out, it is for GPUs", flush=True)
            continue
        rest = max(0.0, deadline - time.monotonic())
        results = PartResults(arguments.output, stage, part, deadline)
        results.put()  # forgets what an earlier run has found
        words = [sys.executable, __file__, "--stage", stage, "--part", part]
        words += ["--output", str(arguments.output), "--minutes", f"{rest / 60}"]
        words += ["--tiny"] if arguments.tiny else []
        try:
            code = subprocess.run(words, timeout=rest).returncode
            fault = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, fault = None, f"no result within {arguments.minutes:g} minutes"
        good &= code == 0
        if code not in (0, 1):  # it could not say what was wrong
            results.values = read(arguments.output, stage)[part]
            results.fail(part, fault)
    return good


def run_parts(stage: str, arguments: argparse.Namespace) -> bool:
    """Runs parts in this process."""
    if "lsjax" not in sys.modules:
        # The package without its __init__, which loads libraries of tokenizers.
        where = [str(ROOT / "lsjax")]
        spec = importlib.util.spec_from_file_location(
            "lsjax", f"{where[0]}/__init__.py", submodule_search_locations=where
        )
        sys.modules["lsjax"] = importlib.util.module_from_spec(spec)
    # Where the time was over, a second run finds what the first has compiled.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.output.resolve() / "xla"))
    deadline, good = time.monotonic() + 60 * arguments.minutes, True
    module, function, _ = STAGES[stage]
    for part in arguments.part:
        # Before jax is imported.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags_of(part)}".strip()
        results = PartResults(arguments.output, stage, part, deadline)
        try:
            run = getattr(importlib.import_module(f"accelerator_stages.{module}"), function)
            run(part, results, arguments.tiny)
        except Exception as error:  # in one line; the traceback is in the file
            results.fail(part, error)
        good &= not results.values["errors"]
    return good


def flags_of(part: str) -> str:
    """The compiler's flags of a part of b or b8; none for most."""
    return FLAGS.get(part.rpartition("-")[2], "")


if __name__ == "__main__":
    sys.exit(main())
