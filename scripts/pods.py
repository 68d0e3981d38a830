"""Compiles configurations for slices of TPUs, and prints the tables of docs/pods.md.

    python scripts/pods.py --directory build/pods
    python scripts/pods.py --directory build/pods --only continual_llama2_7b
    python scripts/pods.py --directory build/pods --maxtext ../maxtext --python ../env/bin/python

A second table has the rows with --beside-plain, and MaxText's steps if there is a checkout of it
(scripts/beside_maxtext.py). Needs libtpu (pip install 'lsjax[tpu]') but no TPU. Existing reports in
the directory are reused.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from beside_maxtext import COLUMNS as BESIDE, of_maxtext, row as row_beside

NOTHING = "--remat nothing_saveable"
# Configuration, slice, and flags that differ from the file.
ROWS = (
    ("continual_llama2_7b", "v5p:4x4x4", "--beside-plain"),
    ("continual_llama2_13b", "v5p:4x4x4", "--beside-plain"),
    ("continual_llama2_7b", "v5e:16x16", f"--mesh.fsdp 32 {NOTHING}"),
    ("continual_llama2_7b", "v6e:8x8", f"--beside-plain {NOTHING}"),
    ("continual_llama3_8b", "v5p:4x4x4", ""),
    ("continual_llama3_2_1b", "v5p:4x4x4", ""),
    ("from_scratch_7b", "v5p:4x4x4", ""),
    ("from_scratch_1_5b", "v5p:2x4x4", ""),
    ("finetune_code", "v5p:2x4x4", ""),
    ("finetune_topv2", "v5p:2x2x2", ""),
    ("continual_llama2_13b", "v5e:16x16", f"--mesh.fsdp 32 --micro-batches 1 {NOTHING}"),
    ("continual_llama2_13b", "v6e:8x16", f"--mesh.fsdp 32 --micro-batches 1 {NOTHING}"),
    ("continual_llama3_8b", "v5e:16x16", f"--mesh.fsdp 64 --micro-batches 1 {NOTHING}"),
    ("continual_llama3_8b", "v6e:8x8", f"--micro-batches 2 {NOTHING}"),
    ("continual_llama3_2_1b", "v5e:16x16", ""),
    ("continual_llama3_2_1b", "v6e:8x8", NOTHING),
    ("from_scratch_7b", "v5e:8x16", f"--mesh.fsdp 32 {NOTHING}"),
    ("from_scratch_7b", "v6e:8x8", NOTHING),
    ("from_scratch_1_5b", "v5e:8x8", "--micro-batches 2"),
    ("from_scratch_1_5b", "v6e:4x8", NOTHING),
    ("finetune_code", "v5e:8x8", "--mesh.fsdp 32 --micro-batches 2"),
    ("finetune_code", "v6e:4x8", NOTHING),
    ("finetune_topv2", "v5e:4x4", "--remat dots_with_no_batch_dims_saveable"),
    ("finetune_topv2", "v6e:2x4", ""),
    ("continual_qwen3_0_6b", "v5e:8x8", ""),
    ("continual_qwen3_0_6b", "v6e:4x8", NOTHING),
    ("continual_llama3_70b", "v5p:4x8x8", ""),
    ("continual_qwen3_8b", "v5p:4x4x4", ""),
    ("continual_qwen3_8b", "v5e:16x16", f"--mesh.fsdp 32 {NOTHING}"),
    ("continual_qwen3_8b", "v6e:8x8", NOTHING),
    ("continual_smollm3_3b", "v5p:4x4x4", ""),
    ("continual_smollm3_3b", "v5e:16x16", NOTHING),
    ("continual_smollm3_3b", "v6e:8x8", NOTHING),
    ("continual_olmo2_1b", "v5p:2x4x4", ""),
    ("continual_olmo2_1b", "v5e:8x8", "--micro-batches 4"),
    ("continual_olmo2_1b", "v6e:4x8", NOTHING),
)
COLUMNS = (
    "configuration",
    "slice",
    "data x fsdp",
    "micro-batches",
    "remat",
    "GiB a device",
    "of HBM",
    "without overlap, s",
    "sending alone, s",
    "plain FLOPs of peak",
    "exits' FLOPs",
)
REMAT = {"dots_with_no_batch_dims_saveable": "dots", "nothing_saveable": "nothing", "none": "none"}
REMAT |= {"attention": "attention", "attention_output": "attention output"}


@dataclass(frozen=True)
class Arguments:
    """The tables of docs/pods.md."""

    directory: Path = Path("build/pods")
    """Folder of the reports."""
    only: str = ""
    """Configuration whose rows are printed; all by default."""
    maxtext: Path | None = None
    """Checkout of MaxText."""
    python: Path = Path(sys.executable)
    """Interpreter of MaxText's environment."""


def main(arguments: Arguments) -> int:
    """Prints each row when it is ready. Returns 1 if a program could not be compiled."""
    arguments.directory.mkdir(parents=True, exist_ok=True)
    failed, beside = False, []
    print_row(COLUMNS, head=True)
    for config, topology, flags in ROWS:
        if arguments.only not in ("", config):
            continue
        file = arguments.directory / f"{config}-{topology.replace(':', '-')}.json"
        if not is_report(file):
            command = f"--config configs/{config}.py --topology {topology} --programs train {flags}"
            program = [sys.executable, "-m", "lsjax", "aot", *command.split()]
            done = subprocess.run(
                [*program, "--output", str(file)], capture_output=True, text=True, check=False
            )
            if not is_report(file):
                print(f"{command}: {done.stderr[-2000:]}", file=sys.stderr)
                failed = True
                continue
        report = json.loads(file.read_text())
        print_row(row(config, report))
        if "--beside-plain" in flags:
            beside.append((config, report))
    if beside:
        print_row(BESIDE, head=True)
    for config, report in beside:
        programs = {program["name"]: program for program in report["programs"]}
        plain, layerskip = programs["plain"], programs["train"]
        ratio = f" ({layerskip['serial_seconds'] / plain['serial_seconds']:.3f}x)"
        print_row(row_beside(f"{config}, plain", report, plain))
        print_row(row_beside(f"{config}, LayerSkip", report, layerskip, ratio))
        if arguments.maxtext is not None and config == "continual_llama2_7b":
            other = maxtext_report(arguments, report)
            print_row(row_beside(f"MaxText llama2-7b, {other['policy']}", report, other))
    return int(failed)


def print_row(cells: Sequence[str], head: bool = False) -> None:
    """Prints a row of a table. head: whether it is the header."""
    above, below = ("\n", "\n" + "|---" * len(cells) + "|") if head else ("", "")
    print(f"{above}| {' | '.join(cells)} |{below}", flush=True)


def maxtext_report(arguments: Arguments, report: dict) -> dict:
    """Report of MaxText's step for comparison with ours, made once."""
    topology = report["topology"]
    directory = arguments.directory / f"maxtext-{topology.replace(':', '-')}"
    file = directory / "report.json"
    if not is_report(file):
        directory.mkdir(exist_ok=True)
        policy = {"nothing": "full"}.get(REMAT[report["training"]["remat"]], "minimal")
        found = of_maxtext(arguments.maxtext, arguments.python, policy, report, directory)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def is_report(file: Path) -> bool:
    """Whether the report exists."""
    return file.exists() and file.stat().st_size > 0


def row(config: str, report: dict) -> list[str]:
    """Cells of a report."""
    (train, *_), training = report["programs"], report["training"]
    mesh = report["meshes"]["train"]
    layout = [
        config,
        report["topology"],
        f"{mesh['data']} x {mesh['fsdp']}",
        str(training["micro_batches"]),
        REMAT[training["remat"]],
    ]
    exits = f"{training['exit_flops'] / training['plain_flops']:.1%}"
    if train["memory"] is None:
        return [*layout, "too large", "", "", "", "", exits]
    memory = train["memory"]
    utilisation = training["plain_flops"] / training["peak_flops"] / train["serial_seconds"]
    return [
        *layout,
        f"{memory['total'] / 2**30:.1f}",
        f"{memory['total'] / memory['hbm']:.0%}",
        f"{train['serial_seconds']:.2f}",
        f"{train['sent_seconds']:.2f}",
        f"{utilisation:.0%}",
        exits,
    ]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
