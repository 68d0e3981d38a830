"""Checks and measures lsjax on the device that JAX finds, usually an accelerator.

    python scripts/accelerator.py --stage a b --output build/accelerator
    python scripts/accelerator.py --stage all

    a      all strategies compared with autoregressive decoding, in float32 and bfloat16
    b, b8  decoding of a 1B and an 8B shape; on GPUs also with other uses of command buffers
    c      training steps of a 1B shape
    d      the quickstart's configuration; only this stage needs all dependencies of lsjax
    page   writes docs/accelerators.md from the results on accelerators
    all    all of these, one after the other

A stage writes a JSON file and takes --minutes at most. Each of its parts runs in its own process.
A part that fails prints one line, and the others still run. Exit code 1 if anything failed.
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
from xla_flags import known_flags  # noqa: E402

# Module and function of each stage, and its parts.
STAGES = {
    "a": ("decoding", "run_equality", ("float32", "bfloat16")),
    "b": ("decoding", "run_speed", ("1b", "1b-off", "1b-loops")),
    "b8": ("decoding", "run_speed", ("8b", "8b-off", "8b-loops")),
    "c": ("training", "run_steps", ("plain", "layerskip", "dropout-mask", "dropout-gather")),
    "d": ("training", "run_quickstart", ("quickstart",)),
}
FLAGS = {  # for GPUs: no command buffers, or command buffers with loops and branches
    "off": "--xla_gpu_enable_command_buffer=",
    "loops": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the requested stages. Returns 1 if anything failed."""
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
    """Parses the flags."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, "page", "all"], required=True)
    parser.add_argument("--part", nargs="+", help="runs these parts alone, in this process")
    parser.add_argument("--output", type=Path, default=Path("build/accelerator"))
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of each stage")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a trial on CPUs")
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
    """Starts a process for each part, while there is time."""
    deadline, good = time.monotonic() + 60 * arguments.minutes, True
    *_, parts = STAGES[stage]
    for part in parts:
        first = read(arguments.output, stage).get(parts[0], {})
        if flags_of(part) and first.get("platform") != "gpu":
            print(f"{stage} {part}: skipped: it is for GPUs", flush=True)
            continue
        rest = max(0.0, deadline - time.monotonic())
        results = PartResults(arguments.output, stage, part, deadline)
        results.put()  # overwrites the results of an earlier run
        words = [sys.executable, __file__, "--stage", stage, "--part", part]
        words += ["--output", str(arguments.output), "--minutes", f"{rest / 60}"]
        words += ["--tiny"] if arguments.tiny else []
        try:
            code = subprocess.run(words, timeout=rest).returncode
            fault = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, fault = None, f"no result within {arguments.minutes:g} minutes"
        good &= code == 0
        if code not in (0, 1):  # the part did not record an error
            results.values = read(arguments.output, stage)[part]
            results.fail(part, fault)
    return good


def run_parts(stage: str, arguments: argparse.Namespace) -> bool:
    """Runs parts in this process."""
    if "lsjax" not in sys.modules:
        # Imports the package without its __init__, which loads tokenizer libraries.
        where = [str(ROOT / "lsjax")]
        spec = importlib.util.spec_from_file_location(
            "lsjax", f"{where[0]}/__init__.py", submodule_search_locations=where
        )
        sys.modules["lsjax"] = importlib.util.module_from_spec(spec)
    # If time runs out, a second run reuses the compiled programs of the first.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(arguments.output.resolve() / "xla"))
    deadline, good = time.monotonic() + 60 * arguments.minutes, True
    module, function, _ = STAGES[stage]
    for part in arguments.part:
        results = PartResults(arguments.output, stage, part, deadline)
        try:
            flags = flags_of(part)
            if flags and not known_flags([flags]):
                raise RuntimeError(f"XLA does not know {flags}: skip this part")
            # Must be set before jax is imported.
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
            run = getattr(importlib.import_module(f"accelerator_stages.{module}"), function)
            run(part, results, arguments.tiny)
        except Exception as error:  # in one line; the traceback is in the file
            results.fail(part, error)
        good &= not results.values["errors"]
    return good


def flags_of(part: str) -> str:
    """Compiler flags of a part of b or b8; empty for most."""
    return FLAGS.get(part.rpartition("-")[2], "")


if __name__ == "__main__":
    sys.exit(main())
