"""Compiles Llama-2 7B's training step for a slice of TPUs, in lsjax and in MaxText, and counts both
alike: a table with lsjax's plain step, its step with LayerSkip, and MaxText's.

    python scripts/beside_maxtext.py --maxtext ../maxtext --python ../env/bin/python
    python scripts/beside_maxtext.py --maxtext ../maxtext --python ../env/bin/python \\
        --topology v6e:8x8 --remat-policy full --lsjax="--remat nothing_saveable"

Needs libtpu (pip install 'lsjax[tpu]'), no TPU. MaxText is a checkout of AI-Hypercomputer/maxtext,
and its own train_compile runs in an environment with Python 3.12:

    python3.12 -m venv ../env
    ../env/bin/pip install "jax[tpu]==0.10.2" absl-py aqtp drjax flax grain huggingface_hub \\
        jinja2 jaxtyping numpy omegaconf optax orbax-checkpoint pathwaysutils pillow psutil \\
        pydantic pyyaml qwix sentencepiece sympy tensorboardX tiktoken tokamax transformers

jax and libtpu should have the versions that lsjax's environment has. Rows, tokens and the mesh are
those of configs/continual_llama2_7b.py; all else is MaxText's default. Three programs take
several minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lsjax.aot.chips import CHIPS, Chip, slice_size
from lsjax.aot.costs import CostAnalysis
from lsjax.aot.hlo import parse
from lsjax.aot.programs import cost_figures, memory_figures

CONFIG = Path(__file__).parents[1] / "configs" / "continual_llama2_7b.py"
COLUMNS = (
    "program",
    "slice",
    "data x fsdp",
    "GiB a device",
    "a step takes at least, s",
    "plain FLOPs of peak",
    "sent GB",
)
# Runs MaxText's program, and keeps what the compiler makes of it.
KEEP = """
import json, pathlib, runpy, sys
import jax
directory = pathlib.Path(sys.argv.pop(1))
compile = jax.stages.Lowered.compile
def kept(*arguments, **options):
    compiled = compile(*arguments, **options)
    found = compiled.memory_analysis()
    names = [name for name in dir(found) if name.endswith("_in_bytes")]
    sizes = {name: getattr(found, name) for name in names}
    (directory / "memory.json").write_text(json.dumps(sizes))
    (directory / "program.txt").write_text(compiled.as_text())
    return compiled
jax.stages.Lowered.compile = kept
runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Arguments:
    """What is compiled."""

    maxtext: Path
    """Checkout of MaxText."""
    python: Path = Path(sys.executable)
    """Interpreter of MaxText's environment."""
    topology: str = "v5p:4x4x4"
    """Chip and slice."""
    remat_policy: str = "minimal"
    """MaxText's."""
    lsjax: str = ""
    """Further flags of lsjax.cli.aot, behind an equals sign."""


def main(arguments: Arguments) -> int:
    """Prints the table."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "lsjax.json"
        command = [sys.executable, "-m", "lsjax.cli.aot", "--config", str(CONFIG)]
        command += ["--programs", "train", "--beside-plain", "--topology", arguments.topology]
        run([*command, "--output", str(output), *arguments.lsjax.split()], {})
        found = json.loads(output.read_text())
        other = of_maxtext(arguments, found, Path(name))
    print("| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", sep="\n")
    for cells in [*rows_of_lsjax("continual_llama2_7b", found), row_of_maxtext(found, other)]:
        print("| " + " | ".join(cells) + " |")
    return 0


def of_maxtext(arguments: Arguments, found: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """MaxText's report: its program for the slice, rows and tokens of lsjax's report `found`.

    directory: for what MaxText writes.
    """
    training, mesh = found["training"], found["meshes"]["train"]
    flags = {
        "model_name": "llama2-7b",
        "per_device_batch_size": training["batch_size"] / training["devices"],
        "max_target_length": training["seq_len"],
        "remat_policy": arguments.remat_policy,
        "ici_data_parallelism": mesh["data"],
        "ici_fsdp_parallelism": mesh["fsdp"],
        "ici_tensor_parallelism": mesh["tensor"],
        "allow_split_physical_axes": True,
        "internal_compile": True,
        "internal_compile_num_devices": slice_size(arguments.topology),
        "compile_topology": arguments.topology,
        "compile_topology_num_slices": 1,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "base_output_directory": directory,
        "run_name": "beside",
    }
    source = arguments.maxtext / "src"
    command = [str(arguments.python), "-c", KEEP, str(directory)]
    command += [str(source / "maxtext/configs/base.yml")]
    command += [f"{name}={value}" for name, value in flags.items()]
    # Without Google Cloud's packages, and on shapes alone.
    environment = {"PYTHONPATH": str(source), "DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu"}
    run(command, environment)
    chip = next(chip for chip in CHIPS if chip.name == arguments.topology.partition(":")[0])
    return {**counted(directory, mesh, chip), "mesh": mesh, "policy": arguments.remat_policy}


def run(command: list[str], environment: Mapping[str, str]) -> None:
    """Shows what the command says only where it fails."""
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def counted(directory: Path, mesh: Mapping[str, int], chip: Chip) -> dict[str, Any]:
    """The program in the directory, counted as lsjax's own are."""
    program = parse((directory / "program.txt").read_text())
    costs = CostAnalysis(program, mesh, {}, chip).program()
    sizes = json.loads((directory / "memory.json").read_text())
    memory = memory_figures(sizes.__getitem__, chip)
    return {"memory": memory, **cost_figures(costs, chip)}


def rows_of_lsjax(name: str, found: Mapping[str, Any]) -> list[list[str]]:
    """Rows of a report that has the plain step beside the step with LayerSkip."""
    programs = {program["name"]: program for program in found["programs"]}
    plain, layerskip = programs["plain"], programs["train"]
    ratio = f" ({layerskip['seconds'] / plain['seconds']:.3f}x)"
    mesh = found["meshes"]["train"]
    return [
        row(f"{name}, plain", mesh, plain, found, ""),
        row(f"{name}, LayerSkip", mesh, layerskip, found, ratio),
    ]


def row_of_maxtext(found: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Row of MaxText's report."""
    return row(f"MaxText llama2-7b, {other['policy']}", other["mesh"], other, found, "")


def row(name: str, mesh: Mapping[str, int], program, found, ratio: str) -> list[str]:
    """Cells of a program. Only the FLOPs of plain training count as useful."""
    training = found["training"]
    useful = training["plain_flops"] / training["peak_flops"]
    return [
        name,
        found["topology"],
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{program['memory']['total'] / 2**30:.1f}",
        f"{program['seconds']:.3f}{ratio}",
        f"{useful / program['seconds']:.1%}",
        f"{program['sent_bytes'] / 1e9:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
