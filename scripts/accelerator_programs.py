"""Compiles programs for TPUs and GPUs, and prints what docs/pods.md says about each of them.

    python scripts/accelerator_programs.py --directory build/accelerator_programs
    python scripts/accelerator_programs.py --only "7B, token"

Needs libtpu and the CUDA plugin (pip install 'lsjax[tpu]' 'lsjax[cuda]'), but neither a TPU nor a
GPU. Existing reports in the directory are reused. Times are "without overlap", in milliseconds.
Reads are the weights once, the cache slots in use, and the head.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from pods import is_report, print_row

LLAMA2_7B = "--config configs/continual_llama2_7b.py"
LLAMA3_8B = "--config configs/continual_llama3_8b.py"
LLAMA3_1B = "--config configs/continual_llama3_2_1b.py"
TOKEN = "--programs decode --decoding.strategy autoregressive"
ROUND = "--programs decode --decoding.strategy self_speculative"
AUTO = "--programs decode --decoding.strategy auto"
PROMPT = "--programs prefill --model.num-layers 8 --decoding.prompt-tokens 8000"
TRAIN = "--programs train"
INT8 = f"{TOKEN} --decoding.batch-size 1 8 --decoding.weights int8"
# Name of a program, slice, and flags.
PROGRAMS = (
    ("7B, token", "v5e:2x2", f"{LLAMA2_7B} {TOKEN} --decoding.batch-size 1 8"),
    ("7B, round (8, 4)", "v5e:2x2", f"{LLAMA2_7B} {ROUND} --decoding.batch-size 1 8"),
    ("7B, auto", "v5e:2x2", f"{LLAMA2_7B} {AUTO}"),
    ("7B, token, int8", "v5e:2x2", f"{LLAMA2_7B} {INT8}"),
    ("7B, token, int8", "v5e:1x1", f"{LLAMA2_7B} {INT8}"),
    ("7B, token", "h100:1", f"{LLAMA2_7B} {TOKEN} --decoding.batch-size 1 8"),
    ("7B, token, int8", "h100:1", f"{LLAMA2_7B} {INT8}"),
    ("8B, token", "v5e:2x2", f"{LLAMA3_8B} {TOKEN} --decoding.batch-size 1 8"),
    ("8B, token, int8", "v5e:2x2", f"{LLAMA3_8B} {INT8}"),
    ("8B, token, int8", "v5e:1x1", f"{LLAMA3_8B} {INT8}"),
    ("8B, token", "h100:1", f"{LLAMA3_8B} {TOKEN} --decoding.batch-size 1 8"),
    ("8B, token, int8", "h100:1", f"{LLAMA3_8B} {INT8}"),
    (
        "8B, 16 layers, token",
        "v5e:2x2",
        f"{LLAMA3_8B} {TOKEN} --model.num-layers 16 --decoding.batch-size 1 8 64",
    ),
    (
        "8B, 16 layers, round (4, 4)",
        "v5e:2x2",
        f"{LLAMA3_8B} {ROUND} --model.num-layers 16 --decoding.batch-size 1 8 64",
    ),
    ("8B, 8 layers, 8,000 tokens", "v5e:2x2", f"{LLAMA3_8B} {PROMPT}"),
    ("8B, 8 layers, 8,000 tokens", "h100:1", f"{LLAMA3_8B} {PROMPT}"),
    ("1B, token", "h100:1", f"{LLAMA3_1B} {TOKEN}"),
    ("1B, round (4, 4)", "h100:1", f"{LLAMA3_1B} {ROUND}"),
    ("1B, auto", "h100:1", f"{LLAMA3_1B} {AUTO}"),
    ("1B, training", "h100:8", f"{LLAMA3_1B} {TRAIN} --mesh.fsdp 8 --batch-size 32"),
    ("70B, training", "v5p:4x8x8", f"--config configs/continual_llama3_70b.py {TRAIN}"),
    ("7B, training", "v5p:4x4x4", f"{LLAMA2_7B} {TRAIN} --beside-plain"),
    (
        "7B, training",
        "v6e:8x8",
        f"{LLAMA2_7B} {TRAIN} --beside-plain --remat nothing_saveable",
    ),
    ("0.6B, training", "v5e:8x8", f"--config configs/continual_qwen3_0_6b.py {TRAIN}"),
)
COLUMNS = ("program", "slice", "rows", "drafts", "GiB", "ms", "over reads", "bytes over reads")
COLUMNS += ("once per call, ms", "kernels", "plain FLOPs of peak", "seconds to compile")


@dataclass(frozen=True)
class Arguments:
    """The programs to compile."""

    directory: Path = Path("build/accelerator_programs")
    """Folder of the reports."""
    only: str = ""
    """Part of the names of programs and slices, such as "v5e"; all by default."""


def main(arguments: Arguments) -> int:
    """Prints the rows of a program when they are ready. Returns 1 if one could not be compiled, and
    2 if --only names none."""
    titles = {f"{name}, {topology}": (name, topology, flags) for name, topology, flags in PROGRAMS}
    chosen = [title for title in titles if arguments.only in title]
    if not chosen:
        print(f"--only {arguments.only!r} names no program of PROGRAMS", file=sys.stderr)
        return 2
    arguments.directory.mkdir(parents=True, exist_ok=True)
    failed = False
    print_row(COLUMNS, head=True)
    for title in chosen:
        name, topology, flags = titles[title]
        words = "".join(letter if letter.isalnum() else "_" for letter in title)
        file = arguments.directory / f"{words}.json"
        if not is_report(file):
            command = [sys.executable, "-m", "lsjax", "aot", *flags.split()]
            command += ["--topology", topology, "--output", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not is_report(file):
                print(f"{title}: {done.stderr[-2000:]}", file=sys.stderr)
                failed = True
                continue
        report = json.loads(file.read_text())
        for program in report["programs"]:
            print_row(row(name, report, program))
    return int(failed)


def row(name: str, report: dict, program: dict) -> list[str]:
    """Cells of a program. A program of `auto` has a row for each kind of round."""
    place = [name + (", plain" if program["name"] == "plain" else ""), report["topology"]]
    if program["memory"] is None:
        return [*place, "", "", "too large", *[""] * (len(COLUMNS) - 5)]
    ms, kind, training = 1e3 * program["serial_seconds"], program["round"], report["training"]
    rows = drafts = over = read = once = useful = ""
    if kind:
        reads = 1e3 * (kind["weights_seconds"] + kind["cache_seconds"])
        rows, drafts, over = str(kind["rows"]), str(kind["num_draft_tokens"]), f"{ms / reads:.2f}"
        read = f"{1e3 * program['memory_seconds'] / reads:.2f}"
        once = f"{1e3 * kind['once_per_call']['serial_seconds']:.2f}"
    if program["name"] in ("train", "plain"):
        seconds = training["plain_flops"] / training["peak_flops"]
        useful = f"{seconds / program['serial_seconds']:.1%}"
    kernels, compiling = f"{program['operations']:.0f}", f"{program['compile_seconds']:.0f}"
    memory = f"{program['memory']['total'] / 2**30:.1f}"
    return [*place, rows, drafts, memory, f"{ms:.2f}", over, read, once, kernels, useful, compiling]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
